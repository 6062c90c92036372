"""The only loops over layers: sweeps forward under many masks, and one pass back for gradients.

Loop order is layers outside, rows inside, variants of a row in micro-batches innermost: a layer is read once
for all that is alive at it. Axis letters: V variants, T tokens, D width, H heads, d head width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.batches import Piece, gather, join, micro_batches, scatter, segments
from lowmem_icl.engine.cache import ResidualCache
from lowmem_icl.engine.waves import BlockRow, Job, SweepMemory, Variant, row_blocks, waves
from lowmem_icl.masks import Mask
from lowmem_icl.model.layer import DecoderLayer, Segment
from lowmem_icl.model.streamed import HEAD_ROWS, StreamedModel
from lowmem_icl.rows import PackedRows, Row

Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Scores:
    """Option scores of one job: logprobs [M, O] in nats, summed in float64; greedy [M, O], for M masks, O options."""

    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]


def sweep(
    model: StreamedModel,
    jobs: Sequence[Job],
    *,
    memory: SweepMemory,
    spill_folder: Path | None = None,
    advance: Advance = lambda layer_tokens: None,
) -> list[Scores]:
    """Score every job's options under every one of its masks, sharing each read of the weights.

    The result does not depend on `memory`, nor on which jobs and masks are swept together. `advance` is told the
    tokens that went through a layer. Raises DoesNotFit where one row exceeds the memory.
    """
    results = [
        Scores(
            np.zeros((len(job.masks), job.packed.option_count)),
            np.ones((len(job.masks), job.packed.option_count), dtype=np.bool_),
        )
        for job in jobs
    ]
    for block in row_blocks(jobs, model.skeleton.width, memory):
        plan = waves(jobs, block, model.skeleton.width, memory.alive_bytes)
        later = {variant.first_layer for wave in plan[1:] for variant in wave}
        with ResidualCache(memory.cache_bytes, spill_folder) as cache, torch.no_grad():
            for number, wave in enumerate(plan):
                _Wave(model, jobs, block, wave, cache, clean=number == 0, keep_at=later).run(results, advance)
    return results


class _Wave:
    """One wave over one block: residuals of the variants alive, row by row."""

    def __init__(
        self,
        model: StreamedModel,
        jobs: Sequence[Job],
        block: Sequence[BlockRow],
        wave: Sequence[Variant],
        cache: ResidualCache,
        *,
        clean: bool,
        keep_at: set[int],
    ) -> None:
        self.model, self.jobs, self.block, self.cache, self.clean = model, jobs, block, cache, clean
        self.keep_at = keep_at if clean else set()
        self.first_layer = 0 if clean else wave[0].first_layer
        # Per job: the first layer and the place in the job's masks of each slot; the clean run is slot 0, place -1.
        self.slots: dict[int, list[tuple[int, int]]] = defaultdict(list)
        if clean:
            for job in {member.job for member in block}:
                self.slots[job].append((0, -1))
        for variant in wave:
            self.slots[variant.job].append((variant.first_layer, variant.mask))
        self.residuals: list[Tensor] = []

    def run(self, results: list[Scores], advance: Advance) -> None:
        """Take all variants of the wave from their first layers to their option scores."""
        skeleton, device = self.model.skeleton, self.model.device
        for member in self.block:
            shape = (len(self.slots[member.job]), len(member.row), skeleton.width)
            self.residuals.append(torch.empty(shape, device=device))
            if self.clean:
                tokens, positions = (
                    torch.from_numpy(member.row.tokens),
                    torch.from_numpy(member.row.positions),
                )
                self.residuals[-1][0] = self.model.embed(tokens, positions)
        rows = [member.row for member in self.block]
        lengths = [len(row) for row in rows]
        for number, layer in self.model.layers(range(self.first_layer, skeleton.layers)):
            keeps = {job: self._keeps(job, number) for job in self.slots}
            alive = [self._branch(place, member, number) for place, member in enumerate(self.block)]
            for pieces in micro_batches(lengths, alive):
                kept = [keeps[self.block[piece.place].job] for piece in pieces]
                batch = gather(self.residuals, pieces)
                after = layer.run(
                    batch,
                    segments(pieces, rows, device),
                    join([heads for heads, _ in kept], pieces),
                    join([ffn for _, ffn in kept], pieces),
                )
                scatter(after, self.residuals, pieces)
                advance(len(batch))
        reader = _AnswerReader(self.model, results)
        for place, member in enumerate(self.block):
            self._read_answers(place, member, reader)
        reader.flush()
        self.residuals.clear()

    def _branch(self, place: int, member: BlockRow, number: int) -> int:
        """Start the variants whose first layer this is from the clean residual; return how many are alive."""
        slots = self.slots[member.job]
        residuals = self.residuals[place]
        new = [slot for slot, (first, mask) in enumerate(slots) if first == number and mask >= 0]
        if self.clean and number in self.keep_at:
            self.cache.keep(place, number, residuals[0])
        if new:
            source = residuals[0] if self.clean else self.cache.get(place, number, self.model.device)
            residuals[new[0] : new[-1] + 1] = source
        return sum(first <= number for first, _ in slots)

    def _keeps(self, job: int, number: int) -> tuple[Tensor | None, Tensor | None]:
        masks = [self.jobs[job].masks[mask] if mask >= 0 else Mask() for _, mask in self.slots[job]]
        return keep_tensors(masks, number, self.model.skeleton.heads, self.model.device)

    def _read_answers(self, place: int, member: BlockRow, reader: "_AnswerReader") -> None:
        masks = self.jobs[member.job].masks
        read, read_at = np.unique(member.row.read_at, return_inverse=True)
        hidden = self.residuals[place][:, torch.from_numpy(read)]
        for slot, (_, mask) in enumerate(self.slots[member.job]):
            clean = [number for number, asked in enumerate(masks) if asked.first_layer is None]
            for target in [mask] if mask >= 0 else clean:
                reader.add(member, target, hidden[slot], read_at)


class _AnswerReader:
    """Collects places where answers are read, of many rows and variants, for few large calls of the unembedding."""

    def __init__(self, model: StreamedModel, results: Sequence[Scores]) -> None:
        self.model, self.results = model, results
        self.waiting: list[tuple[BlockRow, int, Tensor, NDArray[np.intp]]] = []
        self.places = 0

    def add(self, member: BlockRow, mask: int, hidden: Tensor, read_at: NDArray[np.intp]) -> None:
        """Take the residuals [P, D] of one row under one mask; answer a is read at hidden[read_at[a]]."""
        self.waiting.append((member, mask, hidden, read_at))
        self.places += len(hidden)
        if self.places >= HEAD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Turn what is waiting into option scores."""
        if not self.waiting:
            return
        starts = np.cumsum([0, *(len(hidden) for _, _, hidden, _ in self.waiting)])
        places = [read_at + start for (*_, read_at), start in zip(self.waiting, starts, strict=False)]
        targets = [member.row.targets for member, *_ in self.waiting]
        hidden = torch.cat([hidden for _, _, hidden, _ in self.waiting])
        logprobs, greedy = self.model.log_probabilities(
            hidden,
            torch.from_numpy(np.concatenate(places)).to(hidden.device),
            torch.from_numpy(np.concatenate(targets)).to(hidden.device),
        )
        ends = np.cumsum([len(of_row) for of_row in targets])[:-1]
        of_rows = np.split(logprobs.double().cpu().numpy(), ends)
        greedy_of_rows = np.split(greedy.cpu().numpy(), ends)
        for (member, mask, _, _), values, flags in zip(self.waiting, of_rows, greedy_of_rows, strict=True):
            scores, options = self.results[member.job], member.row.options
            np.add.at(scores.logprobs[mask], options, values)
            np.logical_and.at(scores.greedy[mask], options, flags)
        self.waiting.clear()
        self.places = 0


def keep_tensors(
    masks: Sequence[Mask], layer: int, heads: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Turn masks into what a layer multiplies with: keep_heads [V, H], keep_ffn [V]; None where all is kept."""
    keep_heads = np.ones((len(masks), heads), dtype=np.float32)
    keep_ffn = np.ones(len(masks), dtype=np.float32)
    for variant, mask in enumerate(masks):
        keep_heads[variant, list(mask.heads_in(layer))] = 0
        keep_ffn[variant] = layer not in mask.ffns
    return (
        None if keep_heads.all() else torch.from_numpy(keep_heads).to(device),
        None if keep_ffn.all() else torch.from_numpy(keep_ffn).to(device),
    )


@dataclass(frozen=True, eq=False)
class UnitGradients:
    """First-order effects of every unit on the log-probability of the chosen options, by owner (N owners).

    With g the gradient of an owner's chosen log-probability, summed over its tokens t:
    `head_absolute` [N, L, H] = Σ_t |⟨z_t, g_t⟩| over a head's slice of z; `head_signed` [N, L, H] without the
    absolute value; `ffn_signed` [N, L] with the FFN's output in z's place, `ffn_absolute` [N, L] likewise.
    `logprobs` [O]: the options' log-probabilities on the way forward (0 where an option was not in the rows).
    """

    head_absolute: NDArray[np.float64]
    head_signed: NDArray[np.float64]
    ffn_absolute: NDArray[np.float64]
    ffn_signed: NDArray[np.float64]
    logprobs: NDArray[np.float64]


def unit_gradients(
    model: StreamedModel,
    jobs: Sequence[Sequence[Row]],
    owner_counts: Sequence[int],
    choose: Sequence[Callable[[NDArray[np.float64]], NDArray[np.bool_]]],
    *,
    option_counts: Sequence[int],
    memory: SweepMemory,
    spill_folder: Path | None = None,
    advance: Advance = lambda layer_tokens: None,
) -> list[UnitGradients]:
    """Return the gradients of all jobs from two reads of the weights: forward with a cache, then backward.

    No gradient of a weight is ever made: going back, one layer is run again from its cached input. A row's tokens
    must each belong to one owner. `choose[j]` maps option log-probabilities [O] to which options [O] to
    differentiate; it is called once all rows of a block are scored, so an owner's rows must lie in one block.
    """
    skeleton = model.skeleton
    results = []
    for owners, options in zip(owner_counts, option_counts, strict=True):
        heads, ffns = (owners, skeleton.layers, skeleton.heads), (owners, skeleton.layers)
        results.append(
            UnitGradients(np.zeros(heads), np.zeros(heads), np.zeros(ffns), np.zeros(ffns), np.zeros(options))
        )
    members = [BlockRow(number, row) for number, rows in enumerate(jobs) for row in rows]
    for block in _blocks_of(members, skeleton.width, memory):
        with ResidualCache(memory.cache_bytes, spill_folder) as cache:
            with torch.no_grad():
                residuals = _forward_with_cache(model, block, cache, advance)
                chosen = _score_and_choose(model, block, residuals, results, choose)
            gradients = [
                _answer_gradient(model, member.row, residual[0], chosen[member.job])[None]
                for member, residual in zip(block, residuals, strict=True)
            ]
            del residuals
            for number, layer in model.layers(range(skeleton.layers - 1, -1, -1)):
                for pieces in _one_variant(block):
                    members_here = [block[piece.place] for piece in pieces]
                    entering = [cache.get(piece.place, number, model.device) for piece in pieces]
                    before, *of_units = _one_layer_back(
                        layer,
                        torch.cat(entering),
                        segments(pieces, [member.row for member in block], model.device),
                        gather(gradients, pieces),
                        skeleton.heads,
                    )
                    scatter(before, gradients, pieces)
                    _add_by_owner(results, members_here, number, *of_units)
                    advance(len(before))
    return results


def _one_variant(block: Sequence[BlockRow]) -> Iterator[list[Piece]]:
    return micro_batches([len(member.row) for member in block], [1] * len(block))


def _blocks_of(members: Sequence[BlockRow], width: int, memory: SweepMemory) -> list[list[BlockRow]]:
    packed = PackedRows(tuple(member.row for member in members), 0)
    blocks = row_blocks([Job(packed, ())], width, memory)
    remaining = iter(members)
    return [[next(remaining) for _ in block] for block in blocks]


def _forward_with_cache(
    model: StreamedModel, block: Sequence[BlockRow], cache: ResidualCache, advance: Advance
) -> list[Tensor]:
    """Return the rows' residuals after the last layer, [1, T, D] each, all layer inputs being kept on the way."""
    rows = [member.row for member in block]
    residuals = [
        model.embed(torch.from_numpy(row.tokens), torch.from_numpy(row.positions))[None] for row in rows
    ]
    for number, layer in model.layers(range(model.skeleton.layers)):
        for place, residual in enumerate(residuals):
            cache.keep(place, number, residual[0])
        for pieces in _one_variant(block):
            batch = gather(residuals, pieces)
            scatter(layer.run(batch, segments(pieces, rows, model.device)), residuals, pieces)
            advance(len(batch))
    return residuals


def _score_and_choose(
    model: StreamedModel,
    block: Sequence[BlockRow],
    residuals: Sequence[Tensor],
    results: Sequence[UnitGradients],
    choose: Sequence[Callable[[NDArray[np.float64]], NDArray[np.bool_]]],
) -> dict[int, NDArray[np.bool_]]:
    for member, residual in zip(block, residuals, strict=True):
        row = member.row
        logprobs, _ = model.log_probabilities(
            residual[0],
            torch.from_numpy(row.read_at).to(model.device),
            torch.from_numpy(row.targets).to(model.device),
        )
        np.add.at(results[member.job].logprobs, row.options, logprobs.double().cpu().numpy())
    return {job: choose[job](results[job].logprobs) for job in {member.job for member in block}}


def _answer_gradient(model: StreamedModel, row: Row, residual: Tensor, chosen: NDArray[np.bool_]) -> Tensor:
    """Return the gradient of the row's chosen log-probabilities with respect to its last residual, [T, D]."""
    wanted = chosen[row.options]
    read, read_at = np.unique(row.read_at[wanted], return_inverse=True)
    gradient = torch.zeros_like(residual)
    if len(read):
        places = torch.from_numpy(read).to(model.device)
        gradient[places] = model.answer_gradient(
            residual[places],
            torch.from_numpy(read_at).to(model.device),
            torch.from_numpy(row.targets[wanted]).to(model.device),
        )
    return gradient


def _one_layer_back(
    layer: DecoderLayer, residual: Tensor, of_rows: Sequence[Segment], gradient: Tensor, heads: int
) -> tuple[Tensor, NDArray[np.float64], NDArray[np.float64]]:
    """Run a layer again with its graph; return the gradient at its input [N, D], and of each token ⟨z, g⟩ by head
    [N, H] and ⟨FFN's output, g⟩ [N].
    """
    with torch.enable_grad():
        entering = residual.requires_grad_()
        leaving, captured = layer.run_captured(entering, of_rows)
        before, of_z, of_ffn = torch.autograd.grad(leaving, (entering, captured.z, captured.ffn), gradient)
    with torch.no_grad():
        by_head = (captured.z * of_z).unflatten(-1, (heads, -1)).sum(-1).double().cpu().numpy()
        by_ffn = (captured.ffn * of_ffn).sum(-1).double().cpu().numpy()
    return before, by_head, by_ffn


def _add_by_owner(
    results: Sequence[UnitGradients],
    members: Sequence[BlockRow],
    number: int,
    by_head: NDArray[np.float64],
    by_ffn: NDArray[np.float64],
) -> None:
    """Sum one layer's terms over the tokens of every owner."""
    start = 0
    for member in members:
        result, owners = results[member.job], member.row.owners
        places = slice(start, start + len(owners))
        np.add.at(result.head_signed[:, number], owners, by_head[places])
        np.add.at(result.head_absolute[:, number], owners, np.abs(by_head[places]))
        np.add.at(result.ffn_signed[:, number], owners, by_ffn[places])
        np.add.at(result.ffn_absolute[:, number], owners, np.abs(by_ffn[places]))
        start += len(owners)
