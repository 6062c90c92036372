"""Which variants are alive together: blocks of rows, waves that fit the memory, and what all that costs.

A variant is a job's rows under one mask; it starts at the first layer its mask touches. Variants are sorted by
that layer and each wave takes as many as fit, so every wave starts as late as it can: no other choice of boundaries
reads less. The clean run goes with the first wave that needs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.micro_batches import MICRO_BATCH_TOKENS
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.masks.mask import Mask
from lowmem_icl.rows import PackedRows, Row

FLOAT_BYTES = 4
CACHE_SHARE = 0.25


@dataclass(frozen=True)
class SweepLimits:
    """What a sweep may use; its results depend on none of it.

    `alive_bytes`: residuals of variants alive together. `cache_bytes`, `disk_bytes`: clean residuals kept in memory
    and on disk. `micro_batch_tokens`: how many tokens go through a layer together. `wave_tokens`: how many
    layer-tokens a wave should take at most, since a stop loses the wave in work; None for no bound.
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


@dataclass(frozen=True, eq=False)
class Job:
    """Rows of one task and the masks they are to be scored under; an empty mask is the clean run."""

    packed: PackedRows
    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class Variant:
    """One mask of a job: its place in the job's list and the first layer where it differs from the clean run."""

    job: int
    mask: int
    first_layer: int


@dataclass(frozen=True, eq=False)
class BlockRow:
    """A row of a block, or a stem that rows of it grow from, and the job it belongs to."""

    job: int
    row: Row


Block = list[BlockRow]


def row_blocks(
    members: Sequence[BlockRow], width: int, layers: int, limits: SweepLimits, *, keeps_clean: bool
) -> list[Block]:
    """Cut rows into blocks so that the clean run and one variant of a block fit in memory.

    Blocks are as large as that and `wave_tokens` allow: total reads grow with their number. Where the clean run is kept
    (`keeps_clean`), all layers of a block must also fit the cache. A stem goes into every block that has rows of it.
    Raises DoesNotFit naming the smallest allowance where a single row does not fit.
    """
    most = limits.alive_bytes // (2 * width * FLOAT_BYTES)
    if limits.wave_tokens is not None:
        most = min(most, limits.wave_tokens // layers)
    if keeps_clean and members:
        # Between memory and disk as much as a row may stay unused.
        unused = max(len(member.row) for member in members) if limits.disk_bytes else 0
        kept = (limits.cache_bytes + limits.disk_bytes) // (width * FLOAT_BYTES) - unused
        most = min(most, kept // layers)
    blocks: list[Block] = [[]]
    stems: set[Row] = set()
    held = 0
    for member in members:
        stem = member.row.stem
        alone = len(member.row) + (len(stem) if stem is not None else 0)
        needed_bytes = 2 * alone * width * FLOAT_BYTES
        if needed_bytes > limits.alive_bytes:
            raise DoesNotFit(
                f"a row of {alone} tokens needs {int(needed_bytes / (1 - CACHE_SHARE)) + 1} bytes for residuals, "
                f"{limits.alive_bytes} are left; give more --memory"
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
    return [block for block in blocks if block]


def head_blocks(rows: Sequence[BlockRow], width: int, layers: int, limits: SweepLimits) -> list[Block]:
    """Cut the rows that heads are scored on into as few blocks as fit the memory: each is one read of the weights.

    What a stop loses is a layer, not a block, so that nothing else bounds them.
    """
    return row_blocks(rows, width, layers, replace(limits, wave_tokens=None), keeps_clean=False)


def has_variants(jobs: Sequence[Job]) -> bool:
    """Tell whether any mask removes anything."""
    return any(mask.first_layer is not None for job in jobs for mask in job.masks)


def asks_clean(job: Job) -> bool:
    """Tell whether a job wants the clean run's scores."""
    return any(mask.first_layer is None for mask in job.masks)


def variants_of(jobs: Sequence[Job], wanted: dict[int, NDArray[np.bool_]]) -> list[Variant]:
    """Return the variants that are wanted, by first layer; `wanted`: by job, which of its masks."""
    return sorted(
        (
            Variant(number, int(place), layer)
            for number, flags in wanted.items()
            for place in np.flatnonzero(flags)
            if (layer := jobs[number].masks[place].first_layer) is not None
        ),
        key=lambda variant: (variant.first_layer, variant.job, variant.mask),
    )


def block_tokens(block: Sequence[BlockRow]) -> dict[int, int]:
    """Return the tokens of a block's rows by job."""
    tokens: dict[int, int] = {}
    for member in block:
        tokens[member.job] = tokens.get(member.job, 0) + len(member.row)
    return tokens


def next_wave(
    variants: Sequence[Variant],
    tokens: dict[int, int],
    width: int,
    layers: int,
    limits: SweepLimits,
    *,
    clean: bool,
) -> int:
    """Return how many of the variants, in their order, fit in the next wave: at least one."""
    bytes_of = {job: count * width * FLOAT_BYTES for job, count in tokens.items()}
    held = sum(bytes_of.values()) if clean else 0
    steps = sum(tokens.values()) * layers if clean else 0
    taken = 0
    for variant in variants:
        held += bytes_of[variant.job]
        steps += tokens[variant.job] * (layers - variant.first_layer)
        too_long = limits.wave_tokens is not None and steps > limits.wave_tokens
        if (held > limits.alive_bytes and (taken or clean)) or (too_long and taken):
            break
        taken += 1
    return taken


@dataclass(frozen=True)
class PlannedWave:
    """A wave of a block before it runs: whether the clean run is in it, its variants, and where it starts."""

    block: int
    clean: bool
    variants: tuple[Variant, ...]

    @property
    def first_layer(self) -> int:
        """The first layer it reads."""
        return 0 if self.clean else self.variants[0].first_layer


def planned_waves(
    jobs: Sequence[Job], width: int, layers: int, limits: SweepLimits, *, cached: bool = False
) -> tuple[list[Block], list[PlannedWave]]:
    """Return the blocks and waves of a sweep of everything its jobs ask for.

    `cached`: whether the clean residuals it starts from are there already, from an earlier sweep.
    """
    members = [BlockRow(number, row) for number, job in enumerate(jobs) for row in job.packed.rows]
    blocks = row_blocks(members, width, layers, limits, keeps_clean=has_variants(jobs))
    planned: list[PlannedWave] = []
    for place, block in enumerate(blocks):
        tokens = block_tokens(block)
        left = variants_of(jobs, {job: np.ones(len(jobs[job].masks), dtype=np.bool_) for job in tokens})
        clean = not cached or any(asks_clean(jobs[job]) for job in tokens)
        while left or clean:
            count = next_wave(left, tokens, width, layers, limits, clean=clean)
            planned.append(PlannedWave(place, clean, tuple(left[:count])))
            left, clean = left[count:], False
    return blocks, planned
