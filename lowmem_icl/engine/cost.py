"""Which variants are alive together: blocks of rows, waves that fit the memory, and what all that costs.

A variant is a job's rows under one mask; it starts at the first layer its mask touches. Variants are sorted by
that layer and each wave takes as many as fit, so every wave starts as late as it can: no other choice of boundaries
reads less. The clean run goes with the first wave that needs it.
"""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from lowmem_icl.engine.schedule import BlockRow, Job, SweepLimits, Variant, asks_clean, planned_waves
from lowmem_icl.model.families import Skeleton
from lowmem_icl.rows import PackedRows


@dataclass(frozen=True)
class SweepCost:
    """What sweeps take: tokens times layers through each part of a layer, places read, layers read from the store.

    `attended`: through the inputs of the attention; `projected`: through its output projection; `fed`: through the FFN;
    `backward`: through a layer with its graph and back; `answers`: places at which the vocabulary is read, under all masks.
    """

    attended: float = 0
    projected: float = 0
    fed: float = 0
    backward: float = 0
    answers: float = 0
    layers_read: float = 0

    def __add__(self, other: "SweepCost") -> "SweepCost":
        return SweepCost(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> "SweepCost":
        return SweepCost(*(one * times for one in astuple(self)))


def operations(cost: SweepCost, skeleton: Skeleton) -> int:
    """Return the multiplications and additions of a cost's products."""
    attention, projection, ffn = skeleton.weights_by_part
    forward = cost.attended * attention + cost.projected * projection + cost.fed * ffn
    # On the way back a layer is run again, and its products are done once more, transposed.
    backward = 2 * cost.backward * (attention + projection + ffn)
    return round(2 * (forward + backward + cost.answers * skeleton.vocabulary * skeleton.embedding_width))


def sweep_cost(
    jobs: Sequence[Job],
    width: int,
    layers: int,
    limits: SweepLimits,
    resident: Collection[int] = (),
    *,
    cached: bool = False,
) -> SweepCost:
    """Return what a sweep takes; layers that are `resident` are in memory already and not read.

    `cached` as for `planned_waves`.
    """
    streamed = np.array([layer not in resident for layer in range(layers)])
    blocks, planned = planned_waves(jobs, width, layers, limits, cached=cached)
    total = SweepCost(layers_read=sum(int(streamed[wave.first_layer :].sum()) for wave in planned))
    sizes = [_tokens_and_reads(block) for block in blocks]
    needed = [
        [v.first_layer for w in planned if w.block == place for v in w.variants]
        for place in range(len(blocks))
    ]
    for wave in planned:
        of_job = sizes[wave.block]
        asked = any(asks_clean(jobs[job]) for job in of_job)
        for job, (tokens, reads) in of_job.items():
            if wave.clean and asked:
                finished = (layers - 1) * tokens + reads
                clean = sum(mask.first_layer is None for mask in jobs[job].masks)
                total += SweepCost(layers * tokens, finished, finished, answers=clean * reads)
            elif wave.clean:
                last = max(needed[wave.block], default=0)
                total += SweepCost((last + 1) * tokens, last * tokens, last * tokens)
            else:
                joining = {variant.first_layer for variant in wave.variants if variant.job == job}
                total += SweepCost(attended=len(joining) * tokens)
        total += _variants_cost(jobs, wave.variants, of_job, layers)
    return total


def _tokens_and_reads(block: Sequence[BlockRow]) -> dict[int, tuple[int, int]]:
    sizes: dict[int, tuple[int, int]] = {}
    for member in block:
        tokens, reads = sizes.get(member.job, (0, 0))
        sizes[member.job] = tokens + len(member.row), reads + len(member.row.reads)
    return sizes


def _variants_cost(
    jobs: Sequence[Job], variants: Sequence[Variant], sizes: dict[int, tuple[int, int]], layers: int
) -> SweepCost:
    """Return what variants take from the layer where they branch; in it, attention is the clean run's."""
    attended = projected = fed = answers = 0
    for variant in variants:
        (tokens, reads), first = sizes[variant.job], variant.first_layer
        after = layers - 1 - first
        ffns = jobs[variant.job].masks[variant.mask].ffns
        cut_last = layers - 1 in ffns
        attended += after * tokens
        projected += after * tokens + reads
        fed += (after - (len(ffns) - cut_last)) * tokens + (0 if cut_last else reads)
        answers += reads
    return SweepCost(attended, projected, fed, answers=answers)


def gradients_cost(packed: Sequence[PackedRows], layers: int, blocks: int = 1) -> SweepCost:
    """Return what the gradients of rows take: forward through all layers and back, in so many blocks."""
    tokens = layers * sum(rows.token_count for rows in packed)
    answers = sum(len(row.reads) for rows in packed for row in rows.rows)
    return SweepCost(
        tokens, tokens, tokens, backward=tokens, answers=answers, layers_read=2 * layers * blocks
    )
