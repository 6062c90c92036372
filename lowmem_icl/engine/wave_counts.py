"""How many waves the blocks of a sweep take and what these read: counted for all blocks at once.

`schedule` cuts variants one wave after the other, as they run. A plan of a large model has a million waves;
but variants of one job that branch in one layer are all alike, so here each such group is cut by division,
and all blocks are cut side by side.

Axis letters: B blocks, J jobs of a block, L layers, N jobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.fills import RowValues
from lowmem_icl.engine.schedule import (
    DONOR_WEIGHT,
    FLOAT_BYTES,
    Block,
    BlockRow,
    Job,
    SweepLimits,
    row_blocks,
)
from lowmem_icl.rows import Integers, PackedRows

Flags = NDArray[np.bool_]
NO_BOUND = 1 << 62


@dataclass(frozen=True, eq=False)
class BlockSizes:
    """The blocks of a sweep: tokens and reads of each of its jobs, [B, J], 0 where it has fewer; the jobs'
    indices, [B, J], ascending; the tokens of its longest row, [B]; those of its donors, [B].
    """

    tokens: Integers
    reads: Integers
    jobs: Integers
    longest: Integers
    donors: Integers


def block_sizes(
    jobs: Sequence[Job], width: int, layers: int, limits: SweepLimits, *, keeps_clean: bool
) -> BlockSizes:
    """Return the blocks that rows of jobs are cut into; raises DoesNotFit where a single row does not fit."""
    fills = [job.fills for job in jobs]
    if any(isinstance(fill, RowValues) for of_job in fills for fill in of_job.values()):
        members = [BlockRow(index, row) for index, job in enumerate(jobs) for row in job.packed.rows]
        blocks = row_blocks(members, width, layers, limits, keeps_clean=keeps_clean, fills=fills)
        return _of_blocks(blocks)
    packed = tuple(job.packed for job in jobs)
    return _sizes_without_donors(packed, width, layers, limits, keeps_clean=keeps_clean)


@lru_cache(maxsize=8)
def _sizes_without_donors(
    packed: tuple[PackedRows, ...], width: int, layers: int, limits: SweepLimits, *, keeps_clean: bool
) -> BlockSizes:
    n_rows = np.array([len(of_job.rows) for of_job in packed])
    tokens, reads = np.concatenate([of_job.sizes for of_job in packed]).T
    jobs = np.repeat(np.arange(len(packed)), n_rows)
    longest = int(tokens.max(initial=0))
    has_stems = any(of_job.has_stems for of_job in packed)
    if len(tokens) and not has_stems and 2 * longest * width * FLOAT_BYTES <= limits.alive_bytes:
        most = limits.block_tokens(width, layers, longest if keeps_clean else None)
        return _summed_up(_plain_starts(tokens, most), jobs, tokens, reads)
    members = [BlockRow(index, row) for index, of_job in enumerate(packed) for row in of_job.rows]
    return _of_blocks(row_blocks(members, width, layers, limits, keeps_clean=keeps_clean))


def _of_blocks(blocks: Sequence[Block]) -> BlockSizes:
    """Return the sizes of blocks that are cut."""
    own = [[member for member in block if not member.is_donor] for block in blocks]
    sizes = [(member.job, len(member.row), len(member.row.reads)) for block in own for member in block]
    jobs, tokens, reads = np.array(sizes, dtype=np.int64).reshape(-1, 3).T
    starts = np.cumsum([0, *map(len, own)])[:-1]
    donors = [[len(member.row) for member in block if member.is_donor] for block in blocks]
    summed = _summed_up(starts, jobs, tokens, reads)
    if not any(donors):
        return summed
    longest = np.maximum(summed.longest, [max(of_block, default=0) for of_block in donors])
    return replace(summed, longest=longest, donors=np.array([sum(of_block) for of_block in donors]))


def _plain_starts(tokens: Integers, most: int) -> Integers:
    """Return where blocks of rows without stems begin, cut by their sums as `row_blocks` cuts them one by
    one.
    """
    summed = np.cumsum(tokens)
    starts, end = [0], 0
    while True:
        before = int(summed[end - 1]) if end else 0
        end = max(end + 1, int(np.searchsorted(summed, before + most, side="right")))
        if end >= len(tokens):
            return np.array(starts)
        starts.append(end)


def _summed_up(starts: Integers, jobs: Integers, tokens: Integers, reads: Integers) -> BlockSizes:
    """Return the sizes of blocks that begin at these rows, of rows in order."""
    if not len(tokens):
        nothing = np.zeros((0, 0), dtype=np.int64)
        return BlockSizes(nothing, nothing, nothing, nothing.ravel(), nothing.ravel())
    n_jobs = int(jobs.max()) + 1
    block = np.repeat(np.arange(len(starts)), np.diff([*starts, len(tokens)]))
    pairs, of_row = np.unique(block * n_jobs + jobs, return_inverse=True)
    of_pair, job = np.divmod(pairs, n_jobs)
    slots = np.arange(len(pairs)) - np.searchsorted(of_pair, of_pair)
    columns = np.zeros((3, len(starts), int(slots.max()) + 1), dtype=np.int64)
    columns[0, of_pair, slots] = np.bincount(of_row, tokens).astype(np.int64)
    columns[1, of_pair, slots] = np.bincount(of_row, reads).astype(np.int64)
    columns[2, of_pair, slots] = job
    longest = np.maximum.reduceat(tokens, starts)
    return BlockSizes(columns[0], columns[1], columns[2], longest, np.zeros_like(longest))


@dataclass(frozen=True, eq=False)
class JobMasks:
    """What counts of jobs' masks, [N] or [N, L] by first layer: how many are clean; how many branch in each
    layer; how many FFNs before the last layer they remove; how many of them remove the last.
    """

    clean: Integers
    branching: Integers
    ffns_before: Integers
    last_ffns: Integers

    @classmethod
    def of(cls, jobs: Sequence[Job], layers: int) -> "JobMasks":
        """Count the masks of jobs; many share one tuple of them."""
        counted: dict[int, tuple[int, Integers, int, int]] = {}
        for job in jobs:
            if id(job.masks) in counted:
                continue
            branching = [first for mask in job.masks if (first := mask.first_layer) is not None]
            ffns = [mask.ffns for mask in job.masks if mask.ffns]
            last = sum(layers - 1 in of_mask for of_mask in ffns)
            counted[id(job.masks)] = (
                len(job.masks) - len(branching),
                np.bincount(np.array(branching, dtype=np.int64), minlength=layers),
                sum(map(len, ffns)) - last,
                last,
            )
        clean, branches, ffn_counts, last_counts = zip(*(counted[id(job.masks)] for job in jobs), strict=True)
        return cls(np.array(clean), np.array(branches), np.array(ffn_counts), np.array(last_counts))


@dataclass(frozen=True, eq=False)
class WaveCounts:
    """What the waves of blocks come to besides their variants.

    asked, clean: by block, whether the clean run is wanted, [B], and in how many waves it is, [B];
    clean_layers: how far it goes where it is not wanted, [B]. branching_tokens: through the attention that
    variants branch from where no clean run passes; donor_tokens: of donors, through layers; layers_read.
    """

    asked: Flags
    clean: Integers
    clean_layers: Integers
    branching_tokens: int
    donor_tokens: int
    layers_read: int


class _OpenWaves:
    """The last wave of every block, while variants are put into it, group by group."""

    def __init__(
        self, blocks: BlockSizes, width: int, layers: int, limits: SweepLimits, later_clean: Flags
    ) -> None:
        tokens, donors = blocks.tokens.sum(1), DONOR_WEIGHT * blocks.donors
        wave_tokens = NO_BOUND if limits.wave_tokens is None else limits.wave_tokens
        self._bounds = np.array([limits.alive_bytes, wave_tokens])
        # Residual bytes and layer-tokens of a clean run and of donors, [B, 2].
        of_token = np.array([width * FLOAT_BYTES, layers])
        self._clean = (tokens + donors)[:, None] * of_token
        self._later = (tokens * later_clean + donors)[:, None] * of_token
        self._used = np.zeros_like(self._clean)
        self._taken = np.zeros_like(tokens)
        self._is_open = np.zeros(len(tokens), dtype=np.bool_)

    def open_clean(self, which: Flags) -> None:
        """Begin with waves that the clean run goes with."""
        self._used[which] = self._clean[which]
        self._is_open |= which

    def put(self, count: Integers, size: Integers) -> tuple[Integers, Integers]:
        """Put so many variants, [B], of this size each, [B, 2], into waves; return how many went into the
        open ones, and how many new waves the others took.
        """
        size = np.maximum(1, size)
        room = ((self._bounds - self._used) // size).min(1)
        # A wave takes one at least.
        room = np.where(self._is_open, np.maximum(room, self._taken == 0), 0)
        first = np.minimum(count, np.maximum(room, 0))
        rest = count - first
        together = np.maximum(1, ((self._bounds - self._later) // size).min(1))
        waves = -(-rest // together)
        last = rest - (waves - 1) * together
        is_new = waves > 0
        self._used = np.where(
            is_new[:, None], self._later + last[:, None] * size, self._used + first[:, None] * size
        )
        self._taken = np.where(is_new, last, self._taken + first)
        self._is_open |= is_new
        return first, waves


def count_waves(
    blocks: BlockSizes, masks: JobMasks, width: int, limits: SweepLimits, streamed: Flags, *, cached: bool
) -> WaveCounts:
    """Cut the variants of blocks into waves as `schedule` does; `streamed`: which layers are read, [L];
    `cached`: whether clean residuals that a sweep starts from are there.
    """
    layers, tokens = len(streamed), blocks.tokens.sum(1)
    present = blocks.tokens > 0
    read_from = np.append(np.cumsum(streamed[::-1])[::-1], 0)
    # [B, J, L]: how many variants of each job branch where.
    branching = masks.branching[blocks.jobs] * present[:, :, None]
    asked = (masks.clean[blocks.jobs] * present).sum(1) > 0
    by_layer = branching.sum(1) > 0
    has_variants = by_layer.any(1)
    last = np.where(has_variants, layers - 1 - by_layer[:, ::-1].argmax(1), 0)
    lengths, of_block = np.unique(blocks.longest, return_inverse=True)
    fitting = np.array([limits.kept_tokens(width, longest) for longest in lengths.tolist()])[of_block]
    keeps = (tokens + blocks.donors) * layers <= fitting
    first_clean = asked | (has_variants & ~(keeps & cached))
    clean = first_clean.astype(np.int64)
    waves = _OpenWaves(blocks, width, layers, limits, ~keeps)
    waves.open_clean(first_clean)
    open_is_clean = first_clean.copy()
    read, branching_tokens = int(clean.sum()) * int(read_from[0]), 0
    donor_tokens = layers * int((clean * blocks.donors).sum())
    for layer in np.flatnonzero(by_layer.any(0)).tolist():
        for slot in range(blocks.tokens.shape[1]):
            count, own = branching[:, slot, layer], blocks.tokens[:, slot]
            size = own[:, None] * np.array([width * FLOAT_BYTES, layers - layer])
            joined, new = waves.put(count, size)
            touched = np.where(keeps, new, 0) + ((joined > 0) & ~open_is_clean)
            branching_tokens += int((touched * own).sum())
            read += int((new * np.where(keeps, read_from[layer], read_from[0])).sum())
            passed = np.where(keeps, layers - layer, layers)
            donor_tokens += int((new * passed * blocks.donors).sum())
            clean += np.where(keeps, 0, new)
            open_is_clean = np.where(new > 0, ~keeps, open_is_clean)
    return WaveCounts(asked, clean, last, branching_tokens, donor_tokens, read)
