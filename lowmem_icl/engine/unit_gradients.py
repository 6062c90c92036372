"""Gradients of units' outputs: one layer's part of the way back, summed by document.

Axis letters: N owners (documents), T tokens of a micro-batch, L layers, H heads, O options, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.cache import WHOLE_MODEL
from lowmem_icl.engine.fills import DonatedValues, Fills, LayerFills, MaskFills, fill_of
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
    rows of a block are scored. `mask`: heads and FFNs that the model lacks; their own terms are 0. Its fill,
    one of `fills`, is what stands in their place, and what estimates for all others are of.
    """

    rows: Sequence[Row]
    choose: Choose
    mask: Mask = WHOLE_MODEL
    fills: Fills = field(default_factory=dict)

    @property
    def residual_mask(self) -> Mask:
        """The mask that residuals on the way depend on: what would fill the whole model's units does not
        matter.
        """
        return self.mask or WHOLE_MODEL


@dataclass(frozen=True, eq=False)
class UnitGradients:
    """First-order effects of every unit on the log-probability of the chosen options, by owner.

    With g the gradient of an owner's chosen log-probability, summed over its tokens t:
    `head_absolute` [N, L, H] = Σ_t |⟨z_t, g_t⟩| over a head's slice of z; `head_signed` [N, L, H] =
    Σ_t ⟨z_t − f, g_t⟩, f being what would stand in z's place, or 0; `ffn_absolute`, `ffn_signed` [N, L]
    likewise with the FFN's output in z's place.
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
    """What each layer of each job's model lacks, and what stands or would stand in its units' place.

    `donated`: what donors of values give at the layer in work.
    """

    def __init__(self, model: StreamedModel, jobs: Sequence[GradientJob]) -> None:
        self._model, self.donated = model, DonatedValues()
        self._removed = RemovedUnits([job.mask for job in jobs])
        widths = model.skeleton.attention_width, model.skeleton.width
        self._fills = MaskFills([fill_of(job.mask, job.fills) for job in jobs], *widths)

    def groups(
        self, number: int, block: Sequence[BlockRow], indices: Sequence[int]
    ) -> list[tuple[list[int], LayerCut]]:
        """Split rows of a block, by index, into those that have this layer's FFN and those that lack it.

        Each part comes with what its rows lack of the layer; a part without rows is left out.
        """
        heads = self._model.skeleton.heads
        keep_heads, keep_ffn = self._removed.keep_tensors(number, heads)
        fills = self._fills.at(number, self._model.device)
        groups = []
        for has_ffn in (True, False):
            part = [index for index in indices if keep_ffn[block[index].job] == has_ffn]
            if not part:
                continue
            keep: Tensor | None = None
            # The job of every token.
            jobs = np.concatenate([np.full(len(block[i].row), block[i].job) for i in part])
            if keep_heads is not None and not keep_heads[jobs].all():
                keep = torch.from_numpy(keep_heads[jobs]).to(self._model.device)
            members = [block[index] for index in part]
            given = (None, None) if fills is None else self._given(fills, members)
            groups.append((part, LayerCut(keep, not has_ffn, *given)))
        return groups

    def _given(self, fills: LayerFills, members: Sequence[BlockRow]) -> tuple[Tensor, Tensor]:
        """Return what stands, or would stand, in units' place at all tokens of rows, [T, Z] and [T, D]."""
        heads: list[Tensor] = []
        ffns: list[Tensor] = []
        for member in members:
            of_job, row = slice(member.job, member.job + 1), member.row
            for values, given in ((heads, self.donated.heads_in), (ffns, self.donated.ffns_in)):
                values.append(given(fills, of_job, row, None)[0].expand(len(row), -1))
        return torch.cat(heads), torch.cat(ffns)


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
    """Of every token of a micro-batch: by_head ⟨z, g⟩ [T, H] and by_ffn ⟨the FFN's output, g⟩ [T];
    head_drop, ffn_drop: the same less what would stand in their place.
    """

    by_head: Values
    by_ffn: Values
    head_drop: Values
    ffn_drop: Values


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

    def by_head(values: Tensor) -> Values:
        products = (values * z_gradient).unflatten(-1, (model.skeleton.heads, -1))
        return np.asarray(products.sum(-1).double().cpu().numpy())

    def by_ffn(values: Tensor | None) -> Values:
        if values is None:
            return np.zeros(len(entering))
        return np.asarray((values * ffn_gradient[0]).sum(-1).double().cpu().numpy())

    with torch.no_grad():
        heads, ffns = by_head(run.z), by_ffn(run.ffn)
        terms = LayerTerms(heads, ffns, heads, ffns)
        if cut.head_fill is not None and cut.ffn_fill is not None:
            ffn_change = None if run.ffn is None else run.ffn - cut.ffn_fill
            terms = LayerTerms(heads, ffns, by_head(run.z - cut.head_fill), by_ffn(ffn_change))
    return before, terms


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
        for summed, by_token in (
            (result.head_signed, terms.head_drop[tokens]),
            (result.head_absolute, np.abs(terms.by_head[tokens])),
            (result.ffn_signed, terms.ffn_drop[tokens]),
            (result.ffn_absolute, np.abs(terms.by_ffn[tokens])),
        ):
            summed[owners, number] = np.add.reduceat(by_token, starts, axis=0)
        start += len(row)
