"""Gradients of units' outputs: one layer's part of the way back, summed by document.

Axis letters: N owners (documents), T tokens of a micro-batch, L layers, H heads, O options, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.cache import WHOLE_MODEL
from lowmem_icl.engine.removed_units import RemovedUnits
from lowmem_icl.engine.row_masks import plain_segments
from lowmem_icl.engine.schedule import BlockRow
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.layer import DecoderLayer, LayerCut
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import Integers, Row

Values = NDArray[np.float64]
Choose = Callable[[Values], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class GradientJob:
    """Rows of one task and what their gradients are taken of.

    A row's tokens must each belong to one owner, an owner's tokens lie in one row, and rows have no stem.
    `choose` maps option log-probabilities [O] to which options [O] to differentiate; it is asked once all
    rows of a block are scored. `mask`: heads and FFNs that the model lacks; their own terms are 0.
    """

    rows: Sequence[Row]
    choose: Choose
    mask: Mask = WHOLE_MODEL


@dataclass(frozen=True, eq=False)
class UnitGradients:
    """First-order effects of every unit on the log-probability of the chosen options, by owner.

    With g the gradient of an owner's chosen log-probability, summed over its tokens t:
    `head_absolute` [N, L, H] = Σ_t |⟨z_t, g_t⟩| over a head's slice of z; `head_signed` [N, L, H] without the
    absolute value; `ffn_signed` [N, L] with the FFN's output in z's place, `ffn_absolute` [N, L] likewise.
    `logprobs` [O]: the options' log-probabilities on the way forward (0 where an option was not in the rows).
    `finished` [N]: whose are made.
    """

    head_absolute: Values
    head_signed: Values
    ffn_absolute: Values
    ffn_signed: Values
    logprobs: Values
    finished: NDArray[np.bool_]

    @classmethod
    def empty(cls, owners: int, options: int, layers: int, heads: int) -> "UnitGradients":
        """Return gradients of which none is made."""
        by_head, by_ffn = (owners, layers, heads), (owners, layers)
        return cls(
            np.zeros(by_head), np.zeros(by_head), np.zeros(by_ffn), np.zeros(by_ffn), np.zeros(options),
            np.zeros(owners, dtype=np.bool_),
        )  # fmt: skip

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class LayerCuts:
    """What each layer of each job's model lacks."""

    def __init__(self, model: StreamedModel, jobs: Sequence[GradientJob]) -> None:
        self._model = model
        self._removed = RemovedUnits([job.mask for job in jobs])

    def groups(
        self, number: int, block: Sequence[BlockRow], indices: Sequence[int]
    ) -> list[tuple[list[int], LayerCut]]:
        """Split rows of a block, by index, into those that have this layer's FFN and those that lack it.

        Each part comes with what its rows lack of the layer; a part without rows is left out.
        """
        heads = self._model.skeleton.heads
        keep_heads, keep_ffn = self._removed.keep_tensors(number, heads)
        groups = []
        for has_ffn in (True, False):
            part = [index for index in indices if keep_ffn[block[index].job] == has_ffn]
            if not part:
                continue
            keep: Tensor | None = None
            jobs = [block[index].job for index in part]
            if keep_heads is not None and not keep_heads[jobs].all():
                lengths = [len(block[index].row) for index in part]
                keep = torch.from_numpy(np.repeat(keep_heads[jobs], lengths, axis=0)).to(self._model.device)
            groups.append((part, LayerCut(keep, without_ffn=not has_ffn)))
        return groups


def answer_gradients(
    model: StreamedModel,
    jobs: Sequence[GradientJob],
    block: Sequence[BlockRow],
    residuals: Sequence[Tensor],
    results: Sequence[UnitGradients],
) -> list[Tensor]:
    """Score a block's rows; return the gradients of the chosen log-probabilities at the last residuals, [T,
    D] each.

    All rows go through the vocabulary together: its products have one size, however few tokens a row is read
    at.
    """
    rows = [member.row for member in block]
    reads = [row.reads for row in rows]
    read_at = [np.searchsorted(row.reads, row.read_at) for row in rows]
    logprobs, _ = model.vocabulary.log_probabilities(
        _at_reads(model, residuals, reads), *_questions(model, reads, read_at, [row.targets for row in rows])
    )
    ends = np.cumsum([len(row.targets) for row in rows])[:-1]
    for member, values in zip(block, np.split(logprobs.double().cpu().numpy(), ends), strict=True):
        job_logprobs = results[member.job].logprobs
        job_logprobs[member.row.answered] = 0
        np.add.at(job_logprobs, member.row.options, values)
    chosen = {job: jobs[job].choose(results[job].logprobs) for job in {member.job for member in block}}
    wanted = [chosen[member.job][member.row.options] for member in block]
    unique = [
        np.unique(row.read_at[flags], return_inverse=True) for row, flags in zip(rows, wanted, strict=True)
    ]
    reads, read_at = [list(part) for part in zip(*unique, strict=True)]
    targets = [row.targets[flags] for row, flags in zip(rows, wanted, strict=True)]
    gradients = [torch.zeros_like(residual) for residual in residuals]
    if sum(map(len, reads)):
        found = model.vocabulary.answer_gradient(
            _at_reads(model, residuals, reads), *_questions(model, reads, read_at, targets)
        )
        parts = found.split([len(row_reads) for row_reads in reads])
        for gradient, row_reads, part in zip(gradients, reads, parts, strict=True):
            gradient[torch.from_numpy(row_reads).to(model.device)] = part
    return gradients


def _at_reads(model: StreamedModel, residuals: Sequence[Tensor], reads: Sequence[Integers]) -> Tensor:
    """Return the residuals [T, D] of all rows at some tokens each, one row after the other."""
    return torch.cat(
        [
            residual[torch.from_numpy(row_reads).to(model.device)]
            for residual, row_reads in zip(residuals, reads, strict=True)
        ]
    )


def _questions(
    model: StreamedModel,
    reads: Sequence[Integers],
    read_at: Sequence[Integers],
    targets: Sequence[Integers],
) -> tuple[Tensor, Tensor]:
    """Return where all rows' answers are read, counted through the reads of all rows, and their tokens."""
    starts = np.cumsum([0, *(len(row_reads) for row_reads in reads)])[:-1]
    counted = np.concatenate([row + start for row, start in zip(read_at, starts, strict=True)])
    on_device = [torch.from_numpy(array).to(model.device) for array in (counted, np.concatenate(targets))]
    return on_device[0], on_device[1]


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """Of every token of a micro-batch: by_head ⟨z, g⟩ [T, H] and by_ffn ⟨the FFN's output, g⟩ [T]."""

    by_head: Values
    by_ffn: Values


def one_layer_back(
    model: StreamedModel,
    layer: DecoderLayer,
    rows: Sequence[Row],
    cut: LayerCut,
    entering: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, LayerTerms]:
    """Run a layer again with its graph, from the residual at its input and the gradient at its output, [T, D]
    each.

    Returns the gradient at its input, [T, D], and the terms of its units.
    """
    with torch.enable_grad():
        residual = entering.requires_grad_()
        run = layer.run_captured(residual, plain_segments(model, rows), cut)
        wanted = [residual, run.z] if run.ffn is None else [residual, run.z, run.ffn]
        before, z_gradient, *ffn_gradient = torch.autograd.grad(run.output, wanted, gradient)
    with torch.no_grad():
        heads = model.skeleton.heads
        by_head = (run.z * z_gradient).unflatten(-1, (heads, -1)).sum(-1).double().cpu().numpy()
        by_ffn = np.zeros(len(entering))
        if run.ffn is not None:
            by_ffn = (run.ffn * ffn_gradient[0]).sum(-1).double().cpu().numpy()
    return before, LayerTerms(by_head, by_ffn)


def add_by_owner(
    results: Sequence[UnitGradients], members: Sequence[BlockRow], number: int, terms: LayerTerms
) -> None:
    """Sum one layer's terms over the tokens of every owner."""
    start = 0
    for member in members:
        result, row = results[member.job], member.row
        # An owner's tokens stand together; of every owner the first.
        owners, starts = np.unique(row.owners, return_index=True)
        tokens = slice(start, start + len(row))
        heads, ffn = terms.by_head[tokens], terms.by_ffn[tokens]
        result.head_signed[owners, number] = np.add.reduceat(heads, starts, axis=0)
        result.head_absolute[owners, number] = np.add.reduceat(np.abs(heads), starts, axis=0)
        result.ffn_signed[owners, number] = np.add.reduceat(ffn, starts)
        result.ffn_absolute[owners, number] = np.add.reduceat(np.abs(ffn), starts)
        start += len(row)
