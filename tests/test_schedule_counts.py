"""Waves and their costs are counted by columns; here once more variant by variant, as the passes run them."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from lowmem_icl.engine.cost import SweepCost, sweep_cost
from lowmem_icl.engine.schedule import (
    EarlierWork,
    Job,
    PlannedBlock,
    PlannedWave,
    SweepLimits,
    Variant,
    block_tokens,
    schedule,
)
from lowmem_icl.masks.mask import Mask
from lowmem_icl.rows import PackedRows, Row, outline, stem_of

WIDTH = 8


def some_rows(rng: random.Random, stem: Row | None) -> Iterator[Row]:
    for _ in range(rng.randint(stem is None, 5)):
        read = np.arange(rng.randint(1, 3))
        plain = stem_of([0] * rng.randint(3, 20))
        row = Row(plain.tokens, plain.positions, plain.ends, plain.owners, read, read, read, stem)
        yield outline(row, {})


def some_masks(rng: random.Random, layers: int) -> tuple[Mask, ...]:
    return tuple(
        Mask(
            frozenset((rng.randrange(layers), rng.randrange(3)) for _ in range(rng.randint(0, 2))),
            frozenset(rng.randrange(layers) for _ in range(rng.randint(0, 2))),
        )
        for _ in range(rng.randint(1, 30))
    )


def some_jobs(rng: random.Random, layers: int) -> list[Job]:
    shared = some_masks(rng, layers)
    jobs = []
    for _ in range(rng.randint(1, 4)):
        stems = [None, stem_of([0] * rng.randint(3, 9)), stem_of([0] * rng.randint(3, 9))]
        rows = tuple(row for stem in stems for row in some_rows(rng, stem))
        jobs.append(Job(PackedRows(rows, 9), shared if rng.random() < 0.5 else some_masks(rng, layers)))
    return jobs


def variants_one_by_one(jobs: Sequence[Job], block: PlannedBlock) -> list[Variant]:
    found = [
        Variant(job, mask, first)
        for job in sorted({member.job for member in block.rows})
        for mask, removed in enumerate(jobs[job].masks)
        if (first := removed.first_layer) is not None
    ]
    return sorted(found, key=lambda variant: (variant.first_layer, variant.job, variant.mask))


def taken_one_by_one(
    wave: PlannedWave, left: Sequence[Variant], tokens: dict[int, int], limits: SweepLimits, layers: int
) -> int:
    """Put variants into a wave until one more would be too many."""
    clean = wave.clean_layers is not None
    held = sum(tokens.values()) * WIDTH * 4 * clean
    steps = sum(tokens.values()) * layers * clean
    for taken, variant in enumerate(left):
        held += tokens[variant.job] * WIDTH * 4
        steps += tokens[variant.job] * (layers - variant.first_layer)
        too_long = limits.wave_tokens is not None and steps > limits.wave_tokens
        if (held > limits.alive_bytes and (taken or clean)) or (too_long and taken):
            return taken
    return len(left)


def cost_one_by_one(jobs: Sequence[Job], blocks: Sequence[PlannedBlock], layers: int) -> SweepCost:
    """Walk through every wave: rows, variants, layers, as `Wave` does."""
    attention = projection = ffn = answers = read = 0
    for block in blocks:
        for wave in block.waves:
            read += layers - wave.first_layer
            for member in block.rows:
                tokens, reads = len(member.row), len(member.row.reads)
                own = [variant for variant in wave.variants if variant.job == member.job]
                clean = -1 if wave.clean_layers is None else wave.clean_layers
                for layer in range(layers):
                    kept = tokens if layer < layers - 1 else reads
                    branching = [variant for variant in own if variant.first_layer == layer]
                    attention += tokens * (layer <= clean or bool(branching))
                    attention += tokens * sum(variant.first_layer < layer for variant in own)
                    here = [variant for variant in own if variant.first_layer <= layer]
                    without = [v for v in here if layer in jobs[v.job].masks[v.mask].ffns]
                    projection += kept * (len(here) + (layer < clean))
                    ffn += kept * (len(here) - len(without) + (layer < clean))
                whole = clean == layers
                answers += reads * (len(own) + whole * jobs[member.job].masks.count(Mask()))
    return SweepCost(attention, projection, ffn, answers=answers, layers_read=read)


@pytest.mark.parametrize("seed", range(40))
def test_waves_and_costs_are_those_counted_variant_by_variant(seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randint(1, 5)
    jobs = some_jobs(rng, layers)
    limits = SweepLimits(
        rng.choice([5_000, 20_000, 200_000]), rng.choice([20_000, 10**6]), 50_000,
        wave_tokens=rng.choice([None, 300, 3_000]),
    )  # fmt: skip
    cached = rng.random() < 0.5
    blocks = list(schedule(jobs, WIDTH, layers, limits, EarlierWork(is_cached=lambda rows, layer: cached)))
    for block in blocks:
        left = variants_one_by_one(jobs, block)
        for wave in block.waves:
            count = taken_one_by_one(wave, left, block_tokens(block.rows), limits, layers)
            assert list(wave.variants) == left[:count]
            left = left[count:]
        assert not left
    assert sweep_cost(jobs, WIDTH, layers, limits, cached=cached) == cost_one_by_one(jobs, blocks, layers)
