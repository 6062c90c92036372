"""Which variants are alive together: blocks and waves, as data that a pass runs and a plan counts.

A variant is a job's rows under one mask; it starts at the first layer its mask touches. Variants are sorted
by that layer and each wave takes as many as fit, so every wave starts as late as it can: no other choice of
boundaries reads less. The clean run goes with the first wave that needs it.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.fills import Fills, donors_of
from lowmem_icl.engine.micro_batches import MICRO_BATCH_TOKENS
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.masks.mask import Mask
from lowmem_icl.rows import Integers, PackedRows, Row, with_stems

FLOAT_BYTES = 4
CACHE_SHARE = 0.25
DONOR_WEIGHT = 3
"""Of a donor there are its residual and, in the layer in work, what its heads and its FFN give."""

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

    def block_tokens(self, width: int, layers: int, longest_kept: int | None) -> int:
        """Return how many tokens a block may have at most, of a model of so many layers of this width.

        longest_kept: the longest row where the clean run is kept, None where it is not.
        """
        most = self.alive_bytes // (2 * width * FLOAT_BYTES)
        if self.wave_tokens is not None:
            most = min(most, self.wave_tokens // layers)
        if longest_kept is not None:
            most = min(most, self.kept_tokens(width, longest_kept) // layers)
        return most


@dataclass(frozen=True, eq=False)
class Job:
    """Rows of one task and the masks they are to be scored under; an empty mask is the clean run.

    `fills`: what the names in masks stand for.
    """

    packed: PackedRows
    masks: tuple[Mask, ...]
    fills: Fills = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One mask of a job, by its index in the job's list, and the layer where it leaves the clean run."""

    job: int
    mask: int
    first_layer: int


@dataclass(frozen=True, eq=False)
class Variants:
    """Variants as columns [V], ordered by first layer; a sweep of a large model has hundreds of thousands."""

    job: Integers
    mask: Integers
    first_layer: Integers

    @classmethod
    def of(cls, variants: Sequence[Variant]) -> "Variants":
        """Return variants as columns."""
        rows = [(variant.job, variant.mask, variant.first_layer) for variant in variants]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)

    def __len__(self) -> int:
        return len(self.job)

    def __iter__(self) -> Iterator[Variant]:
        columns = (self.job.tolist(), self.mask.tolist(), self.first_layer.tolist())
        return (Variant(*values) for values in zip(*columns, strict=True))

    def part(self, start: int, end: int) -> "Variants":
        """Return those from one index up to another."""
        return Variants(self.job[start:end], self.mask[start:end], self.first_layer[start:end])


@dataclass(frozen=True, eq=False)
class BlockRow:
    """A row of a block, a stem that rows of it grow from, or a donor of values to these, and the index of its
    job.
    """

    job: int
    row: Row
    is_donor: bool = False


Block = tuple[BlockRow, ...]


@dataclass(frozen=True)
class PlannedWave:
    """A wave before it runs: what goes through the layers together, and what is kept of it for later ones.

    `clean_layers`: how many layers the clean run passes whole with this wave, None where it is not in it; in
    the layer after these it goes as far as z, from which variants branch there. `kept_layers`: the layers at
    whose input its residual is kept. `variants`, by first layer, branch from the clean run or from what an
    earlier wave kept of it. Donors of values go along with every wave, through all its layers.
    """

    clean_layers: int | None
    kept_layers: frozenset[int]
    variants: Variants

    @property
    def first_layer(self) -> int:
        """The first layer it reads."""
        return int(self.variants.first_layer[0]) if self.clean_layers is None else 0


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
    begun: list[BlockRow] = []
    untouched = list(missing)
    if earlier.missing is not None:
        # Rows that were stopped on their way go first and by themselves: others would repeat what they have.
        begun = [row for row, flags in missing.items() if flags.any() and not flags.all()]
        untouched = [row for row, flags in missing.items() if flags.any() and flags.all()]
    waves = _Waves(jobs, width, layers, limits, earlier, keep_clean)
    cut = partial(row_blocks, keeps_clean=has_variants(jobs), fills=[job.fills for job in jobs])
    for rows in itertools.chain(*(cut(part, width, layers, limits) for part in (begun, untouched))):
        wanted: dict[int, Flags] = {}
        for member in rows:
            if member in missing:
                flags, other = missing[member], wanted.get(member.job)
                wanted[member.job] = flags if other is None or other is flags else flags | other
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

    _first_layers: dict[int, Integers] = field(default_factory=dict, repr=False)

    def of_block(self, block: Block, wanted: Mapping[int, Flags]) -> Iterator[PlannedWave]:
        """Yield a block's waves; `wanted`: by job, which of its masks."""
        rows, tokens = [member.row for member in block], block_tokens(block)
        whole = sum(map(len, rows))
        donors = whole - sum(tokens.values())
        variants, asked = self._variants_of(wanted)
        sizes = _VariantSizes(variants, tokens, self.width, self.layers)
        fitting = self.limits.kept_tokens(self.width, max(map(len, rows)))
        # A row too large for the cache has the clean run in each of its waves.
        keeps = whole * self.layers <= fitting
        branching = frozenset(np.unique(variants.first_layer).tolist())
        cached = {layer for layer in branching if keeps and self.earlier.is_cached(rows, layer)}
        start = 0
        while start < len(variants) or asked:
            needed = _from_layer_of(branching, variants, start)
            clean = asked or not needed <= cached
            others = DONOR_WEIGHT * donors + (whole - donors if clean else 0)
            end = start + self._next_wave(sizes, start, others, clean=clean)
            later = branching if self.keep_clean else _from_layer_of(branching, variants, end)
            kept = frozenset(later if keeps and clean else ())
            until = self.layers if asked else max(needed, default=0)
            yield PlannedWave(until if clean else None, kept, variants.part(start, end))
            cached |= kept
            asked, start = False, end

    def _next_wave(self, sizes: "_VariantSizes", start: int, other_tokens: int, *, clean: bool) -> int:
        """Return how many variants, in order, fit in the next wave: at least one without the clean run.

        other_tokens: what goes along, of the clean run and of donors.
        """
        limits = self.limits
        held, steps = other_tokens * self.width * FLOAT_BYTES, other_tokens * self.layers
        taken = max(_within(sizes.held_bytes, start, limits.alive_bytes - held), 0 if clean else 1)
        if limits.wave_tokens is not None:
            taken = min(taken, max(1, _within(sizes.steps, start, limits.wave_tokens - steps)))
        return min(taken, len(sizes.steps) - 1 - start)

    def _variants_of(self, wanted: Mapping[int, Flags]) -> tuple[Variants, bool]:
        """Return the variants that are wanted, by first layer, job and mask, and whether the clean run is."""
        jobs, masks, firsts = [], [], []
        for job, flags in sorted(wanted.items()):
            indices = np.flatnonzero(flags)
            jobs.append(np.full(len(indices), job))
            masks.append(indices)
            firsts.append(self._firsts(self.jobs[job].masks)[indices])
        columns = [np.concatenate([*column, np.zeros(0, dtype=np.int64)]) for column in (jobs, masks, firsts)]
        removing = np.flatnonzero(columns[2] >= 0)
        order = removing[np.argsort(columns[2][removing], kind="stable")]
        return Variants(*(column[order] for column in columns)), len(order) < len(columns[2])

    def _firsts(self, masks: tuple[Mask, ...]) -> Integers:
        """Return the first layers of a job's masks, -1 for the clean run, [M]."""
        # Many jobs share one tuple of masks, and it lives as long as they do.
        if id(masks) not in self._first_layers:
            firsts = (mask.first_layer for mask in masks)
            self._first_layers[id(masks)] = np.array([-1 if layer is None else layer for layer in firsts])
        return self._first_layers[id(masks)]


@dataclass(frozen=True, eq=False)
class _VariantSizes:
    """What the variants of a block take, summed up from the first one on, [V + 1]."""

    variants: Variants
    tokens: Mapping[int, int]
    width: int
    layers: int

    @cached_property
    def _tokens(self) -> Integers:
        of_job = np.zeros(max(self.tokens, default=-1) + 1, dtype=np.int64)
        of_job[list(self.tokens)] = list(self.tokens.values())
        return of_job[self.variants.job]

    @cached_property
    def held_bytes(self) -> Integers:
        """Bytes of their residuals."""
        return _summed(self._tokens * (self.width * FLOAT_BYTES))

    @cached_property
    def steps(self) -> Integers:
        """Their tokens times the layers they go through."""
        return _summed(self._tokens * (self.layers - self.variants.first_layer))


def _summed(values: Integers) -> Integers:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])


def _within(summed: Integers, start: int, most: int) -> int:
    """Return how many values from an index on add up to at most so much."""
    return max(0, int(np.searchsorted(summed, summed[start] + most, side="right")) - 1 - start)


def _from_layer_of(branching: frozenset[int], variants: Variants, index: int) -> frozenset[int]:
    """Return the layers where the variants from an index on branch; none where there is no such variant."""
    if index >= len(variants):
        return frozenset()
    first = int(variants.first_layer[index])
    return frozenset(layer for layer in branching if layer >= first)


def row_blocks(
    members: Sequence[BlockRow],
    width: int,
    layers: int,
    limits: SweepLimits,
    *,
    keeps_clean: bool,
    fills: Sequence[Fills] = (),
) -> list[Block]:
    """Cut rows into blocks so that the clean run and one variant of a block fit in memory.

    Blocks are as large as that and `wave_tokens` allow: total reads grow with their number. Where the clean
    run is kept (`keeps_clean`), all layers of a block must also fit the cache. A stem goes into every block
    that has rows of it, and so do the donors that rows have by their jobs' `fills`. Raises DoesNotFit naming
    the smallest allowance where a single row does not fit.
    """
    given = {member: donors_of(fills[member.job], member.row) if fills else () for member in members}
    rows = [*with_stems([member.row for member in members]), *itertools.chain(*given.values())]
    most = limits.block_tokens(width, layers, max(map(len, rows), default=None) if keeps_clean else None)
    blocks: list[list[BlockRow]] = [[]]
    there: set[Row] = set()
    held = 0
    for member in members:
        stem, donors = member.row.stem, given[member]
        shared = {donor: DONOR_WEIGHT * len(donor) for donor in donors}
        shared |= {} if stem is None else {stem: len(stem)}
        alone = len(member.row) + sum(shared.values())
        needed_bytes = 2 * alone * width * FLOAT_BYTES
        if needed_bytes > limits.alive_bytes:
            raise DoesNotFit(
                f"a row of {alone} tokens needs {int(needed_bytes / (1 - CACHE_SHARE)) + 1} bytes for "
                f"residuals, {limits.alive_bytes} are left; give more --memory"
            )
        grows = len(member.row) + sum(size for row, size in shared.items() if row not in there)
        if held and held + grows > most:
            blocks.append([])
            there, held, grows = set(), 0, alone
        blocks[-1] += [BlockRow(member.job, row, row is not stem) for row in shared if row not in there]
        there.update(shared)
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
    """Return the tokens of a block's rows by job, donors left aside."""
    tokens: dict[int, int] = {}
    for member in block:
        if member.is_donor:
            continue
        tokens[member.job] = tokens.get(member.job, 0) + len(member.row)
    return tokens
