"""Gradients of units' outputs: what one layer gives on the way back, summed by the document that tokens belong to.

Axis letters: N owners (documents), T tokens, L layers, H heads, O options, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.schedule import BlockRow
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.layer import Cut, DecoderLayer, Segment, attention_mask
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import Row

Values = NDArray[np.float64]
Choose = Callable[[Values], NDArray[np.bool_]]


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
    def unmade(cls, owners: int, options: int, layers: int, heads: int) -> "UnitGradients":
        """Return gradients that are all still to be made."""
        of_heads, of_ffns = (owners, layers, heads), (owners, layers)
        return cls(
            np.zeros(of_heads), np.zeros(of_heads), np.zeros(of_ffns), np.zeros(of_ffns), np.zeros(options),
            np.zeros(owners, dtype=np.bool_),
        )  # fmt: skip

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def embedded(model: StreamedModel, row: Row) -> Tensor:
    """Return a row's residual at the first layer's input, [T, D]."""
    return model.embed(torch.from_numpy(row.tokens), torch.from_numpy(row.positions))


def plain_segments(model: StreamedModel, members: Sequence[BlockRow]) -> list[Segment]:
    """Return the segments of rows without stems, each under one mask."""
    return [
        Segment(1, len(member.row), attention_mask(torch.from_numpy(member.row.ends).to(model.device)))
        for member in members
    ]


def forward_step(
    model: StreamedModel,
    layer: DecoderLayer,
    members: Sequence[BlockRow],
    residuals: list[Tensor],
    places: Sequence[int],
    cut: Cut,
) -> None:
    """Take rows, whose residuals [T, D] stand at `places`, through a layer together; `cut` removes heads from z."""
    after = layer.run(torch.cat([residuals[place] for place in places]), plain_segments(model, members), cut)
    for place, part in zip(places, after.split([len(member.row) for member in members]), strict=True):
        residuals[place] = part


def answer_gradients(
    model: StreamedModel,
    block: Sequence[BlockRow],
    residuals: Sequence[Tensor],
    results: Sequence[UnitGradients],
    choose: Sequence[Choose],
) -> list[Tensor]:
    """Score a block's rows and return the gradients of the chosen log-probabilities at the last residuals, [T, D] each.

    All rows go through the vocabulary together: its products have one size, however few places a row is read at.
    """
    rows = [member.row for member in block]
    reads = [row.reads for row in rows]
    at = [np.searchsorted(row.reads, row.read_at) for row in rows]
    logprobs, _ = model.log_probabilities(
        _at_places(model, residuals, reads), *_questions(model, reads, at, [row.targets for row in rows])
    )
    ends = np.cumsum([len(row.targets) for row in rows])[:-1]
    for member, values in zip(block, np.split(logprobs.double().cpu().numpy(), ends), strict=True):
        of_job = results[member.job].logprobs
        of_job[member.row.answered] = 0
        np.add.at(of_job, member.row.options, values)
    chosen = {job: choose[job](results[job].logprobs) for job in {member.job for member in block}}
    wanted = [chosen[member.job][member.row.options] for member in block]
    unique = [
        np.unique(row.read_at[flags], return_inverse=True) for row, flags in zip(rows, wanted, strict=True)
    ]
    reads, at = [list(one) for one in zip(*unique, strict=True)]
    targets = [row.targets[flags] for row, flags in zip(rows, wanted, strict=True)]
    gradients = [torch.zeros_like(residual) for residual in residuals]
    if sum(map(len, reads)):
        found = model.answer_gradient(
            _at_places(model, residuals, reads), *_questions(model, reads, at, targets)
        )
        for gradient, places, part in zip(
            gradients, reads, found.split([len(one) for one in reads]), strict=True
        ):
            gradient[torch.from_numpy(places).to(model.device)] = part
    return gradients


Places = NDArray[np.int64]


def _at_places(model: StreamedModel, residuals: Sequence[Tensor], places: Sequence[Places]) -> Tensor:
    """Return the residuals [T, D] of all rows at some places each, one after the other."""
    return torch.cat(
        [
            residual[torch.from_numpy(of_row).to(model.device)]
            for residual, of_row in zip(residuals, places, strict=True)
        ]
    )


def _questions(
    model: StreamedModel, reads: Sequence[Places], at: Sequence[Places], targets: Sequence[Places]
) -> tuple[Tensor, Tensor]:
    """Return where all rows' answers are read, counted through the places read of all rows, and their tokens."""
    starts = np.cumsum([0, *(len(one) for one in reads)])[:-1]
    read_at = np.concatenate([one + start for one, start in zip(at, starts, strict=True)])
    return tuple(torch.from_numpy(array).to(model.device) for array in (read_at, np.concatenate(targets)))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """Of every token of a micro-batch: by_head ⟨z, g⟩ [T, H] and by_ffn ⟨the FFN's output, g⟩ [T]."""

    by_head: Values
    by_ffn: Values


def one_layer_back(
    model: StreamedModel,
    layer: DecoderLayer,
    members: Sequence[BlockRow],
    residual: Tensor,
    gradient: Tensor,
    cut: Cut,
) -> tuple[Tensor, LayerTerms]:
    """Run a layer again with its graph, from residuals [T, D] and the gradient at its output, [T, D].

    Returns the gradient at its input, [T, D], and the terms of its units.
    """
    with torch.enable_grad():
        entering = residual.requires_grad_()
        leaving, z, ffn = layer.run_captured(entering, plain_segments(model, members), cut)
        before, of_z, of_ffn = torch.autograd.grad(leaving, (entering, z, ffn), gradient)
    with torch.no_grad():
        by_head = (z * of_z).unflatten(-1, (model.skeleton.heads, -1)).sum(-1).double().cpu().numpy()
        by_ffn = (ffn * of_ffn).sum(-1).double().cpu().numpy()
    return before, LayerTerms(by_head, by_ffn)


def cut_of(masks: Sequence[Mask], members: Sequence[BlockRow], number: int, model: StreamedModel) -> Cut:
    """Return what removes, in one layer, the heads of each row's job from z; `masks` are by job."""
    heads = model.skeleton.heads
    keep = np.ones((len(members), heads), dtype=np.float32)
    for place, member in enumerate(members):
        keep[place, list(masks[member.job].heads_in(number))] = 0
    if keep.all():
        return lambda z: z
    of_tokens = torch.from_numpy(np.repeat(keep, [len(member.row) for member in members], axis=0))
    on_device = of_tokens.to(model.device)
    return lambda z: (z.unflatten(-1, (heads, -1)) * on_device[..., None]).flatten(-2)


def add_by_owner(
    results: Sequence[UnitGradients], members: Sequence[BlockRow], number: int, terms: LayerTerms
) -> None:
    """Sum one layer's terms over the tokens of every owner."""
    start = 0
    for member in members:
        result, row = results[member.job], member.row
        # An owner's tokens stand together; of every owner the first.
        owners, starts = np.unique(row.owners, return_index=True)
        places = slice(start, start + len(row))
        heads, ffn = terms.by_head[places], terms.by_ffn[places]
        result.head_signed[owners, number] = np.add.reduceat(heads, starts, axis=0)
        result.head_absolute[owners, number] = np.add.reduceat(np.abs(heads), starts, axis=0)
        result.ffn_signed[owners, number] = np.add.reduceat(ffn, starts)
        result.ffn_absolute[owners, number] = np.add.reduceat(np.abs(ffn), starts)
        start += len(row)
