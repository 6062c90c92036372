"""Which variants are alive together: waves that fit the memory, and what they read.

A variant is a job's rows under one mask; it starts at the first layer its mask touches. Variants are sorted by
that layer, so every wave after the first starts as late as it can. The clean run goes with the first wave.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lowmem_icl.errors import DoesNotFit
from lowmem_icl.masks import Mask
from lowmem_icl.rows import PackedRows, Row

FLOAT_BYTES = 4
CACHE_SHARE = 0.25


@dataclass(frozen=True)
class SweepMemory:
    """Bytes a sweep may use for residuals: those of variants alive together, and those of the clean cache.

    `block_bytes`: how much one layer's clean residuals of a block of rows may take, None for as much as fits.
    """

    alive_bytes: int
    cache_bytes: int
    block_bytes: int | None = None

    @classmethod
    def of(cls, total_bytes: int) -> "SweepMemory":
        """Split an allowance between living variants and the cache, which can spill to disk."""
        cache = int(total_bytes * CACHE_SHARE)
        return cls(total_bytes - cache, cache)


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


@dataclass(frozen=True)
class BlockRow:
    """A row of a block: the job it belongs to and the row itself."""

    job: int
    row: Row


def row_blocks(jobs: Sequence[Job], width: int, memory: SweepMemory) -> list[list[BlockRow]]:
    """Cut all rows into blocks so that the clean run and one variant of a block fit in memory.

    Blocks are as large as that allows: total reads grow with their number. Raises DoesNotFit naming the smallest
    allowance where a single row does not fit.
    """
    blocks: list[list[BlockRow]] = [[]]
    held = 0
    most = memory.alive_bytes
    if memory.block_bytes is not None:
        # The clean run and one variant: twice what is cached.
        most = min(most, 2 * memory.block_bytes)
    for number, job in enumerate(jobs):
        for row in job.packed.rows:
            size = 2 * len(row) * width * FLOAT_BYTES
            if size > memory.alive_bytes:
                needed = int(size / (1 - CACHE_SHARE)) + 1
                raise DoesNotFit(
                    f"a row of {len(row)} tokens needs {needed} bytes for residuals, {memory.alive_bytes} are left; "
                    "give more --memory"
                )
            if held and held + size > most:
                blocks.append([])
                held = 0
            blocks[-1].append(BlockRow(number, row))
            held += size
    return [block for block in blocks if block]


def waves(
    jobs: Sequence[Job], block: Sequence[BlockRow], width: int, alive_bytes: int
) -> list[list[Variant]]:
    """Deal the variants of a block's jobs over waves; at least one wave, the first leaves room for the clean run."""
    tokens: dict[int, int] = {}
    for member in block:
        tokens[member.job] = tokens.get(member.job, 0) + len(member.row)
    variants = sorted(
        (
            Variant(number, place, mask.first_layer)
            for number in tokens
            for place, mask in enumerate(jobs[number].masks)
            if mask.first_layer is not None
        ),
        key=lambda variant: (variant.first_layer, variant.job, variant.mask),
    )
    result: list[list[Variant]] = [[]]
    held = sum(tokens.values()) * width * FLOAT_BYTES
    for variant in variants:
        size = tokens[variant.job] * width * FLOAT_BYTES
        if held + size > alive_bytes and (result[-1] or len(result) == 1):
            result.append([])
            held = 0
        result[-1].append(variant)
        held += size
    return result


def layer_tokens(jobs: Sequence[Job], layers: int) -> int:
    """Return how many tokens go through how many layers in a sweep: the unit of its progress."""
    total = 0
    for job in jobs:
        passes = layers + sum(layers - mask.first_layer for mask in job.masks if mask.first_layer is not None)
        total += job.packed.token_count * passes
    return total


def layers_read(
    jobs: Sequence[Job], layers: int, width: int, memory: SweepMemory, resident: Collection[int] = ()
) -> int:
    """Return how many layers a sweep reads from the store; `resident` ones are in memory already."""
    streamed = [layer not in resident for layer in range(layers)]
    total = 0
    for block in row_blocks(jobs, width, memory):
        _, *later = waves(jobs, block, width, memory.alive_bytes)
        total += sum(streamed) + sum(sum(streamed[wave[0].first_layer :]) for wave in later)
    return total


def answers_read(jobs: Sequence[Job]) -> int:
    """Return at how many places of rows, under all masks, a sweep asks for log-probabilities."""
    return sum(
        max(1, len(job.masks)) * len(np.unique(row.read_at)) for job in jobs for row in job.packed.rows
    )
