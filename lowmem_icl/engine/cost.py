"""What passes take in tokens, answers and layers read, counted as `schedule` cuts a sweep."""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from lowmem_icl.engine.fills import Fills
from lowmem_icl.engine.schedule import BlockRow, Job, SweepLimits, has_variants, row_blocks
from lowmem_icl.engine.wave_counts import BlockSizes, JobMasks, WaveCounts, block_sizes, count_waves
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
    jobs = [job for job in jobs if job.masks and job.packed.rows]
    if not jobs:
        return SweepCost()
    streamed = np.array([layer not in resident for layer in range(layers)])
    blocks = block_sizes(jobs, width, layers, limits, keeps_clean=has_variants(jobs))
    masks = JobMasks.of(jobs, layers)
    waves = count_waves(blocks, masks, width, limits, streamed, cached=cached)
    return (
        _clean_cost(blocks, masks, waves, layers)
        + _variants_cost(blocks, masks, layers)
        + SweepCost(attention_tokens=waves.branching_tokens, layers_read=waves.layers_read)
        + SweepCost(waves.donor_tokens, waves.donor_tokens, waves.donor_tokens)
    )


def _clean_cost(blocks: BlockSizes, masks: JobMasks, waves: WaveCounts, layers: int) -> SweepCost:
    """Return what the clean run takes in all waves that it goes with."""
    tokens, reads = blocks.tokens.sum(1), blocks.reads.sum(1)
    asked = waves.asked
    whole = int((layers * tokens)[asked].sum())
    finished = int(((layers - 1) * tokens + reads)[asked].sum())
    answers = int((masks.clean[blocks.jobs] * blocks.reads).sum())
    # In all other waves as far as variants branch, and there as far as the attention.
    times = waves.clean - asked
    further = int((times * waves.clean_layers * tokens).sum())
    return SweepCost(
        whole + further + int((times * tokens).sum()),
        finished + further,
        finished + further,
        answers=answers,
    )


def _variants_cost(blocks: BlockSizes, masks: JobMasks, layers: int) -> SweepCost:
    """Return what variants take from the layer where they branch; in it, attention is the clean run's."""
    n_jobs = len(masks.clean)
    tokens, reads = (
        np.bincount(blocks.jobs.ravel(), sizes.ravel(), n_jobs) for sizes in (blocks.tokens, blocks.reads)
    )
    count = masks.branching.sum(1)
    after = masks.branching @ (layers - 1 - np.arange(layers))
    answers = int((count * reads).sum())
    attention = int((after * tokens).sum())
    ffn = int(((after - masks.ffns_before) * tokens + (count - masks.last_ffns) * reads).sum())
    return SweepCost(attention, attention + answers, ffn, answers=answers)


def gradients_cost(
    packed: Sequence[PackedRows],
    fills: Sequence[Fills],
    size: tuple[int, int],
    limits: SweepLimits,
    resident: Collection[int] = (),
) -> SweepCost:
    """Return what the gradients of rows take in a model of (layers, width): forward through all layers, and
    back; donors of values, of whose the `fills` of each task's rows are, go forward in both.
    """
    layers, width = size
    members = [BlockRow(index, row) for index, rows in enumerate(packed) for row in rows.rows]
    blocks = row_blocks(members, width, layers, limits, keeps_clean=True, fills=fills)
    donors = sum(len(member.row) for block in blocks for member in block if member.is_donor)
    tokens = layers * sum(rows.token_count for rows in packed)
    forward = tokens + 2 * layers * donors
    return SweepCost(
        forward,
        forward,
        forward,
        backward_tokens=tokens,
        answers=sum(len(row.reads) for rows in packed for row in rows.rows),
        layers_read=2 * len(blocks) * (layers - len(resident)),
    )
