"""Documents and masks to jobs of the engine: which rows a mask goes over is decided by what stands in its
units' place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.fills import Fills
from lowmem_icl.engine.schedule import Job
from lowmem_icl.masks.mask import Mask, resampling_seed
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.rows import PackedRows
from lowmem_icl.session.donors import ResampledRows, resampled_outlines, resampled_rows
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.tasks.documents import TaskRows

Tables = Mapping[str, UnitMeans]


@dataclass(frozen=True)
class MaskedDocuments:
    """Some documents of a task, and the masks they are scored under; the empty mask is the clean run."""

    task: TaskRows
    documents: slice
    masks: tuple[Mask, ...]


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """A job of the engine, and which of the masks asked for it has, by index [M]."""

    masks: NDArray[np.int64]
    job: Job


def masked_rows(prepared: Prepared, asked: MaskedDocuments, tables: Tables) -> list[MaskedRows]:
    """Return the jobs that score documents under masks: one over rows that documents share, and one over rows
    of their own for every seed by which they get other documents' values; `tables`: what names of means stand
    for.
    """
    jobs = []
    for seed, indices in _by_seed(asked.masks).items():
        masks = _chosen(asked.masks, indices)
        if seed is None:
            packed = prepared.pack(asked.task, asked.documents).packed
            jobs.append(MaskedRows(indices, Job(packed, masks, tables)))
        else:
            rows = resampled_rows(prepared, asked.task, asked.documents, seed)
            jobs.append(MaskedRows(indices, _job(rows, masks)))
    return jobs


def outlined_jobs(prepared: Prepared, asked: Sequence[MaskedDocuments]) -> list[Job]:
    """Return the same jobs of documents in their sizes alone."""
    jobs = []
    for each in asked:
        for seed, indices in _by_seed(each.masks).items():
            masks = _chosen(each.masks, indices)
            if seed is None:
                jobs.append(Job(prepared.outline(each.task, each.documents), masks))
            else:
                jobs.append(_job(resampled_outlines(prepared, each.task, each.documents, seed), masks))
    return jobs


def gathered(parts: Sequence[MaskedRows], scores: Sequence[Scores]) -> Scores:
    """Return the scores under all masks asked for from those of the jobs they were given to."""
    if len(parts) == 1:
        return scores[0]
    every = Scores.empty(sum(len(part.masks) for part in parts), parts[0].job.packed.option_count)
    for part, found in zip(parts, scores, strict=True):
        for name, array in every.arrays().items():
            array[part.masks] = found.arrays()[name]
    return every


def rows_of_gold(prepared: Prepared, task: TaskRows, mask: Mask, tables: Tables) -> tuple[PackedRows, Fills]:
    """Return the rows that gradients of all documents of a task are taken over, and what the mask's name
    stands for.
    """
    seed = resampling_seed(mask.fill)
    if seed is None:
        return prepared.pack(task, gold_only=True).packed, tables
    rows = resampled_rows(prepared, task, slice(None), seed, gold_only=True)
    return rows.packed, {str(mask.fill): rows.values}


def outlined_gold(prepared: Prepared, task: TaskRows, mask: Mask) -> tuple[PackedRows, Fills]:
    """Return the same in its sizes alone."""
    seed = resampling_seed(mask.fill)
    if seed is None:
        return prepared.outline(task, gold_only=True), {}
    rows = resampled_outlines(prepared, task, slice(None), seed, gold_only=True)
    return rows.packed, {str(mask.fill): rows.values}


def _by_seed(masks: Sequence[Mask]) -> dict[int | None, NDArray[np.int64]]:
    """Return the indices of masks by the seed of their units' values, None for those without one."""
    seeds = {fill: resampling_seed(fill) for fill in {mask.fill for mask in masks}}
    if len(distinct := set(seeds.values()) or {None}) == 1:
        return {distinct.pop(): np.arange(len(masks))}
    by_seed: dict[int | None, list[int]] = {}
    for index, mask in enumerate(masks):
        by_seed.setdefault(seeds[mask.fill], []).append(index)
    return {seed: np.array(indices, dtype=np.int64) for seed, indices in by_seed.items()}


def _chosen(masks: tuple[Mask, ...], indices: NDArray[np.int64]) -> tuple[Mask, ...]:
    # Many jobs share one tuple of masks, which is counted once.
    return masks if len(indices) == len(masks) else tuple(masks[index] for index in indices)


def _job(rows: ResampledRows, masks: tuple[Mask, ...]) -> Job:
    fills = {mask.fill: rows.values for mask in masks if mask.fill is not None}
    return Job(rows.packed, masks, fills)
