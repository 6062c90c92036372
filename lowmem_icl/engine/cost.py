"""What passes take in tokens, answers and layers read, counted from the same schedule that a sweep runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.schedule import EarlierWork, Job, PlannedBlock, SweepLimits, Variants, schedule
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.rows import Integers, PackedRows


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
    sizes = _MaskSizes(jobs, layers)
    total = SweepCost()
    for block in schedule(jobs, width, layers, limits, earlier):
        total += _block_cost(block, sizes)
        total += SweepCost(layers_read=sum(int(streamed[wave.first_layer :].sum()) for wave in block.waves))
    return total


@dataclass(frozen=True, eq=False)
class _MaskSizes:
    """What counts of jobs' masks: how many are clean, and the FFNs that each removes."""

    jobs: Sequence[Job]
    layers: int
    _of_masks: dict[int, tuple[int, Integers, NDArray[np.bool_]]] = field(default_factory=dict, repr=False)

    def of_job(self, job: int) -> tuple[int, Integers, NDArray[np.bool_]]:
        """Return how many of a job's masks are clean; how many FFNs before the last layer each removes, [M],
        and whether the last one, [M].
        """
        # Many jobs share one tuple of masks.
        masks, last = self.jobs[job].masks, self.layers - 1
        if id(masks) not in self._of_masks:
            self._of_masks[id(masks)] = (
                sum(mask.first_layer is None for mask in masks),
                np.array([len(mask.ffns) - (last in mask.ffns) for mask in masks], dtype=np.int64),
                np.array([last in mask.ffns for mask in masks], dtype=np.bool_),
            )
        return self._of_masks[id(masks)]


def _block_cost(block: PlannedBlock, sizes: _MaskSizes) -> SweepCost:
    """Return what the waves of a block compute."""
    total, layers = SweepCost(), sizes.layers
    of_job = _tokens_and_reads(block)
    for wave in block.waves:
        if wave.clean_layers is None:
            # One attention per job and layer where any of its variants branch.
            branching = np.unique(wave.variants.first_layer * (max(of_job) + 1) + wave.variants.job)
            tokens = sum(of_job[job][0] for job in (branching % (max(of_job) + 1)).tolist())
            total += SweepCost(attention_tokens=tokens)
        else:
            tokens, reads = (sum(column) for column in zip(*of_job.values(), strict=True))
            finished = wave.clean_layers * tokens
            if wave.clean_layers == layers:
                answers = sum(sizes.of_job(job)[0] * of_job[job][1] for job in of_job)
                finished -= tokens - reads
                total += SweepCost(layers * tokens, finished, finished, answers=answers)
            else:
                total += SweepCost(finished + tokens, finished, finished)
        total += _variants_cost(wave.variants, of_job, sizes)
    return total


def _tokens_and_reads(block: PlannedBlock) -> dict[int, tuple[int, int]]:
    """Return, by job, how many tokens a block's rows have and how many of these are read."""
    sizes: dict[int, tuple[int, int]] = {}
    for member in block.rows:
        tokens, reads = sizes.get(member.job, (0, 0))
        sizes[member.job] = tokens + len(member.row), reads + len(member.row.reads)
    return sizes


def _variants_cost(variants: Variants, of_job: Mapping[int, tuple[int, int]], sizes: _MaskSizes) -> SweepCost:
    """Return what variants take from the layer where they branch; in it, attention is the clean run's.

    of_job: tokens and reads of a block's rows by job.
    """
    attention = projection = ffn = answers = 0
    if not len(variants):
        return SweepCost()
    order = np.argsort(variants.job, kind="stable")
    jobs, starts = np.unique(variants.job[order], return_index=True)
    for job, indices in zip(jobs.tolist(), np.split(order, starts[1:]), strict=True):
        tokens, reads = of_job[job]
        _, ffns_before, last = sizes.of_job(job)
        masks, count = variants.mask[indices], len(indices)
        after = int((sizes.layers - 1 - variants.first_layer[indices]).sum())
        attention += after * tokens
        projection += after * tokens + count * reads
        ffn += (after - int(ffns_before[masks].sum())) * tokens + (count - int(last[masks].sum())) * reads
        answers += count * reads
    return SweepCost(attention, projection, ffn, answers=answers)


def gradients_cost(packed: Sequence[PackedRows], layers: int) -> SweepCost:
    """Return what the gradients of rows take: forward through all layers, and back."""
    tokens = layers * sum(rows.token_count for rows in packed)
    answers = sum(len(row.reads) for rows in packed for row in rows.rows)
    return SweepCost(tokens, tokens, tokens, backward_tokens=tokens, answers=answers, layers_read=2 * layers)
