"""What passes take in tokens, answers and layers read, counted from the same schedule that a sweep runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from lowmem_icl.engine.schedule import EarlierWork, Job, PlannedBlock, SweepLimits, Variant, schedule
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.rows import PackedRows


@dataclass(frozen=True)
class SweepCost:
    """What passes take: tokens times layers through each part of a layer, answers, layers read from the
    store.

    `attention_tokens`: through the inputs of the attention and the attention itself; `projection_tokens`:
    through its output projection; `ffn_tokens`: through the FFN; `backward_tokens`: through a layer with its
    graph and back; `answers`: how often the vocabulary is read, once per token that is read and mask.
    """

    attention_tokens: float = 0
    projection_tokens: float = 0
    ffn_tokens: float = 0
    backward_tokens: float = 0
    answers: float = 0
    layers_read: float = 0

    def __add__(self, other: "SweepCost") -> "SweepCost":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return SweepCost(*(left + right for left, right in pairs))

    def __mul__(self, times: float) -> "SweepCost":
        return SweepCost(*(value * times for value in astuple(self)))


def operations(cost: SweepCost, skeleton: Skeleton) -> int:
    """Return the multiplications and additions of a cost's products."""
    attention, projection, ffn = skeleton.weights_by_part
    forward = cost.attention_tokens * attention + cost.projection_tokens * projection + cost.ffn_tokens * ffn
    # On the way back a layer is run again, and its products are done once more, transposed.
    backward = 2 * cost.backward_tokens * (attention + projection + ffn)
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
    """Return what a sweep of everything its jobs ask for takes; `resident` layers are in memory and not read.

    `cached`: whether the clean residuals it starts from are there already, from an earlier sweep.
    """
    streamed = np.array([layer not in resident for layer in range(layers)])
    earlier = EarlierWork(is_cached=lambda rows, layer: cached)
    total = SweepCost()
    for block in schedule(jobs, width, layers, limits, earlier):
        total += _block_cost(jobs, block, layers)
        total += SweepCost(layers_read=sum(int(streamed[wave.first_layer :].sum()) for wave in block.waves))
    return total


def _block_cost(jobs: Sequence[Job], block: PlannedBlock, layers: int) -> SweepCost:
    """Return what the waves of a block compute."""
    total = SweepCost()
    sizes = _tokens_and_reads(block)
    for wave in block.waves:
        for job, (tokens, reads) in sizes.items():
            if wave.clean_layers == layers:
                finished = (layers - 1) * tokens + reads
                clean = sum(mask.first_layer is None for mask in jobs[job].masks)
                total += SweepCost(layers * tokens, finished, finished, answers=clean * reads)
            elif wave.clean_layers is not None:
                finished = wave.clean_layers * tokens
                total += SweepCost(finished + tokens, finished, finished)
            else:
                branching = {variant.first_layer for variant in wave.variants if variant.job == job}
                total += SweepCost(attention_tokens=len(branching) * tokens)
        total += _variants_cost(jobs, wave.variants, sizes, layers)
    return total


def _tokens_and_reads(block: PlannedBlock) -> dict[int, tuple[int, int]]:
    """Return, by job, how many tokens a block's rows have and how many of these are read."""
    sizes: dict[int, tuple[int, int]] = {}
    for member in block.rows:
        tokens, reads = sizes.get(member.job, (0, 0))
        sizes[member.job] = tokens + len(member.row), reads + len(member.row.reads)
    return sizes


def _variants_cost(
    jobs: Sequence[Job], variants: Sequence[Variant], sizes: Mapping[int, tuple[int, int]], layers: int
) -> SweepCost:
    """Return what variants take from the layer where they branch; in it, attention is the clean run's."""
    attention = projection = ffn = answers = 0
    for variant in variants:
        (tokens, reads), first = sizes[variant.job], variant.first_layer
        after = layers - 1 - first
        removed = jobs[variant.job].masks[variant.mask].ffns
        last_removed = layers - 1 in removed
        attention += after * tokens
        projection += after * tokens + reads
        ffn += (after - (len(removed) - last_removed)) * tokens + (0 if last_removed else reads)
        answers += reads
    return SweepCost(attention, projection, ffn, answers=answers)


def gradients_cost(packed: Sequence[PackedRows], layers: int) -> SweepCost:
    """Return what the gradients of rows take: forward through all layers, and back."""
    tokens = layers * sum(rows.token_count for rows in packed)
    answers = sum(len(row.reads) for rows in packed for row in rows.rows)
    return SweepCost(tokens, tokens, tokens, backward_tokens=tokens, answers=answers, layers_read=2 * layers)
