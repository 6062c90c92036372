"""Which variants are alive together: blocks and waves, as data that a pass runs and a plan counts.

A variant is a job's rows under one mask; it starts at the first layer its mask touches. Variants are sorted
by that layer and each wave takes as many as fit, so every wave starts as late as it can: no other choice of
boundaries reads less. The clean run goes with the first wave that needs it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.micro_batches import MICRO_BATCH_TOKENS
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.masks.mask import Mask
from lowmem_icl.rows import PackedRows, Row, with_stems

FLOAT_BYTES = 4
CACHE_SHARE = 0.25

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class SweepLimits:
    """What a sweep may use; its results depend on none of it.

    `alive_bytes`: residuals of variants alive together. `cache_bytes`, `disk_bytes`: clean residuals kept in
    memory and on disk. `micro_batch_tokens`: how many tokens go through a layer together. `wave_tokens`: how
    many layer-tokens a wave should take at most, since a stop loses the wave in work; None for no bound.
    """

    alive_bytes: int
    cache_bytes: int = 0
    disk_bytes: int = 0
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    wave_tokens: int | None = None

    @classmethod
    def of(cls, total_bytes: int, disk_bytes: int = 0) -> "SweepLimits":
        """Split an allowance between living variants and the cache, which can spill to disk."""
        cache = int(total_bytes * CACHE_SHARE)
        return cls(total_bytes - cache, cache, disk_bytes)

    def kept_tokens(self, width: int, longest_row_tokens: int) -> int:
        """Return of how many tokens the cache surely holds residuals, in rows of at most this length."""
        # Where memory ends and the disk begins, almost a row may stay unused.
        unused = longest_row_tokens if self.disk_bytes else 0
        return (self.cache_bytes + self.disk_bytes) // (width * FLOAT_BYTES) - unused


@dataclass(frozen=True, eq=False)
class Job:
    """Rows of one task and the masks they are to be scored under; an empty mask is the clean run."""

    packed: PackedRows
    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class Variant:
    """One mask of a job, by its index in the job's list, and the layer where it leaves the clean run."""

    job: int
    mask: int
    first_layer: int


@dataclass(frozen=True, eq=False)
class BlockRow:
    """A row of a block, or a stem that rows of it grow from, and the index of its job."""

    job: int
    row: Row


Block = tuple[BlockRow, ...]


@dataclass(frozen=True)
class PlannedWave:
    """A wave before it runs: what goes through the layers together, and what is kept of it for later ones.

    `clean_layers`: how many layers the clean run passes whole with this wave, None where it is not in it; in
    the layer after these it goes as far as z, from which variants branch there. `kept_layers`: the layers at
    whose input its residual is kept. `variants`, by first layer, branch from the clean run or from what an
    earlier wave kept of it.
    """

    clean_layers: int | None
    kept_layers: frozenset[int]
    variants: tuple[Variant, ...]

    @property
    def first_layer(self) -> int:
        """The first layer it reads."""
        return self.variants[0].first_layer if self.clean_layers is None else 0


@dataclass(frozen=True, eq=False)
class PlannedBlock:
    """Rows that go through the layers together, and their waves in order."""

    rows: Block
    waves: tuple[PlannedWave, ...]


def _nothing_cached(rows: Sequence[Row], layer: int) -> bool:
    return False


@dataclass(frozen=True)
class EarlierWork:
    """What a sweep finds done, so that it need not be done again.

    `missing` tells for a row of the job at an index under which masks [M] it is still to be scored; None:
    under all. `is_cached` tells whether the clean residuals of rows at the input of a layer are there to
    start from.
    """

    missing: Callable[[int, Row], Flags] | None = None
    is_cached: Callable[[Sequence[Row], int], bool] = _nothing_cached


NOTHING_DONE = EarlierWork()


def schedule(
    jobs: Sequence[Job],
    width: int,
    layers: int,
    limits: SweepLimits,
    earlier: EarlierWork = NOTHING_DONE,
    *,
    keep_clean: bool = False,
) -> Iterator[PlannedBlock]:
    """Yield the blocks of a sweep with their waves, for a model of so many layers of this width.

    What is cached is asked for when a block is asked for, so that a block can rely on what those before it
    left. With `keep_clean` clean residuals are kept at every layer where variants branch, not only for later
    waves. Raises DoesNotFit naming the smallest allowance where a single row does not fit.
    """
    everything = [np.ones(len(job.masks), dtype=np.bool_) for job in jobs]
    missing = {
        BlockRow(index, row): everything[index] if earlier.missing is None else earlier.missing(index, row)
        for index, job in enumerate(jobs)
        for row in job.packed.rows
    }
    # Rows that were stopped on their way go first and by themselves: others would repeat what they have.
    partial = [row for row, flags in missing.items() if flags.any() and not flags.all()]
    untouched = [row for row, flags in missing.items() if flags.any() and flags.all()]
    waves = _Waves(jobs, width, layers, limits, earlier, keep_clean)
    keeps_clean = has_variants(jobs)
    for rows in [
        *row_blocks(partial, width, layers, limits, keeps_clean=keeps_clean),
        *row_blocks(untouched, width, layers, limits, keeps_clean=keeps_clean),
    ]:
        wanted: dict[int, Flags] = {}
        for member in rows:
            if member in missing:
                flags = missing[member]
                wanted[member.job] = flags | wanted[member.job] if member.job in wanted else flags
        yield PlannedBlock(rows, tuple(waves.of_block(rows, wanted)))


@dataclass(frozen=True, eq=False)
class _Waves:
    """Cuts the variants of a block into waves."""

    jobs: Sequence[Job]
    width: int
    layers: int
    limits: SweepLimits
    earlier: EarlierWork
    keep_clean: bool

    def of_block(self, block: Block, wanted: Mapping[int, Flags]) -> Iterator[PlannedWave]:
        """Yield a block's waves; `wanted`: by job, which of its masks."""
        rows, tokens = [member.row for member in block], block_tokens(block)
        left = _variants_of(self.jobs, wanted)
        asked = any(
            self.jobs[job].masks[mask].first_layer is None
            for job, flags in wanted.items()
            for mask in np.flatnonzero(flags)
        )
        fitting = self.limits.kept_tokens(self.width, max(map(len, rows)))
        # A row too large for the cache has the clean run in each of its waves.
        keeps = sum(tokens.values()) * self.layers <= fitting
        branching = {variant.first_layer for variant in left}
        cached = {layer for layer in branching if keeps and self.earlier.is_cached(rows, layer)}
        while left or asked:
            needed = {variant.first_layer for variant in left}
            clean = asked or not needed <= cached
            count = self._next_wave(left, tokens, clean=clean)
            taken, left = left[:count], left[count:]
            later = branching if self.keep_clean else {variant.first_layer for variant in left}
            kept = frozenset(later if keeps and clean else ())
            until = self.layers if asked else max(needed, default=0)
            yield PlannedWave(until if clean else None, kept, tuple(taken))
            cached |= kept
            asked = False

    def _next_wave(self, variants: Sequence[Variant], tokens: Mapping[int, int], *, clean: bool) -> int:
        """Return how many variants, in order, fit in the next wave: at least one without the clean run."""
        limits = self.limits
        bytes_of = {job: count * self.width * FLOAT_BYTES for job, count in tokens.items()}
        held = sum(bytes_of.values()) if clean else 0
        steps = sum(tokens.values()) * self.layers if clean else 0
        taken = 0
        for variant in variants:
            held += bytes_of[variant.job]
            steps += tokens[variant.job] * (self.layers - variant.first_layer)
            too_long = limits.wave_tokens is not None and steps > limits.wave_tokens
            if (held > limits.alive_bytes and (taken or clean)) or (too_long and taken):
                break
            taken += 1
        return taken


def _variants_of(jobs: Sequence[Job], wanted: Mapping[int, Flags]) -> list[Variant]:
    """Return the variants that are wanted, by first layer; `wanted`: by job, which of its masks."""
    return sorted(
        (
            Variant(job, int(mask), layer)
            for job, flags in wanted.items()
            for mask in np.flatnonzero(flags)
            if (layer := jobs[job].masks[mask].first_layer) is not None
        ),
        key=lambda variant: (variant.first_layer, variant.job, variant.mask),
    )


def row_blocks(
    members: Sequence[BlockRow], width: int, layers: int, limits: SweepLimits, *, keeps_clean: bool
) -> list[Block]:
    """Cut rows into blocks so that the clean run and one variant of a block fit in memory.

    Blocks are as large as that and `wave_tokens` allow: total reads grow with their number. Where the clean
    run is kept (`keeps_clean`), all layers of a block must also fit the cache. A stem goes into every block
    that has rows of it. Raises DoesNotFit naming the smallest allowance where a single row does not fit.
    """
    most = limits.alive_bytes // (2 * width * FLOAT_BYTES)
    if limits.wave_tokens is not None:
        most = min(most, limits.wave_tokens // layers)
    if keeps_clean and members:
        longest = max(len(row) for row in with_stems([member.row for member in members]))
        most = min(most, limits.kept_tokens(width, longest) // layers)
    blocks: list[list[BlockRow]] = [[]]
    stems: set[Row] = set()
    held = 0
    for member in members:
        stem = member.row.stem
        alone = len(member.row) + (len(stem) if stem is not None else 0)
        needed_bytes = 2 * alone * width * FLOAT_BYTES
        if needed_bytes > limits.alive_bytes:
            raise DoesNotFit(
                f"a row of {alone} tokens needs {int(needed_bytes / (1 - CACHE_SHARE)) + 1} bytes for "
                f"residuals, {limits.alive_bytes} are left; give more --memory"
            )
        grows = len(member.row) if stem in stems else alone
        if held and held + grows > most:
            blocks.append([])
            stems, held, grows = set(), 0, alone
        if stem is not None and stem not in stems:
            stems.add(stem)
            blocks[-1].append(BlockRow(member.job, stem))
        blocks[-1].append(member)
        held += grows
    return [tuple(block) for block in blocks if block]


def head_blocks(rows: Sequence[BlockRow], width: int, layers: int, limits: SweepLimits) -> list[Block]:
    """Cut the rows that heads are scored on into as few blocks as fit the memory: each is one read of the
    weights.

    What a stop loses is a layer, not a block, so that nothing else bounds them.
    """
    return row_blocks(rows, width, layers, replace(limits, wave_tokens=None), keeps_clean=False)


def has_variants(jobs: Sequence[Job]) -> bool:
    """Tell whether any mask removes anything."""
    return any(mask.first_layer is not None for job in jobs for mask in job.masks)


def block_tokens(block: Sequence[BlockRow]) -> dict[int, int]:
    """Return the tokens of a block's rows by job."""
    tokens: dict[int, int] = {}
    for member in block:
        tokens[member.job] = tokens.get(member.job, 0) + len(member.row)
    return tokens
