"""The jobs that a part consists of: what their results depend on, and whose they are.

A part's file keeps each job by a digest of what it depends on, so that one which fails leaves the others what
they are, and is all that is tried again.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowmem_icl.engine.patch_jobs import Addition, PatchJob, RowTokens
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.session.failures import Setting
from lowmem_icl.session.jobs import MaskedDocuments
from lowmem_icl.tasks.documents import TaskRows


@dataclass(frozen=True)
class Source:
    """Whose a document or prompt is, and what it is called."""

    setting: Setting
    name: str


@dataclass(frozen=True, eq=False)
class PartJob:
    """One job: the name it is kept by, and where its documents are from, by their number."""

    name: str
    source_of: Callable[[int], Source]


def _name(*content: object) -> str:
    summed = hashlib.sha256()
    for each in content:
        summed.update(each if isinstance(each, bytes) else repr(each).encode())
        summed.update(b"\0")
    return summed.hexdigest()[:32]


def _of_documents(task: TaskRows, documents: slice, content: object) -> PartJob:
    indices = [document.index for document in task.documents[documents]]
    setting = Setting.of(task)

    def source_of(number: int) -> Source:
        return Source(setting, f"document {indices[number]}")

    return PartJob(_name(setting, task.split, indices, content), source_of)


def sweep_jobs(jobs: Sequence[MaskedDocuments]) -> list[PartJob]:
    """Return the jobs of a sweep."""
    # Many jobs share one tuple of masks, which may be long.
    masks: dict[int, str] = {}
    for job in jobs:
        if id(job.masks) not in masks:
            masks[id(job.masks)] = _name(*map(_mask, job.masks))
    return [_of_documents(job.task, job.documents, masks[id(job.masks)]) for job in jobs]


def task_jobs(tasks: Sequence[TaskRows], masks: Sequence[Mask] = ()) -> list[PartJob]:
    """Return a job for all documents of every task, under a mask each."""
    names = [_mask(mask) for mask in masks] or [""] * len(tasks)
    return [_of_documents(task, slice(None), name) for task, name in zip(tasks, names, strict=True)]


def _mask(mask: Mask) -> str:
    return f"{sorted(mask.heads)} {sorted(mask.ffns)} {mask.fill}"


def prompts_job(content: object, sources: Sequence[Source]) -> PartJob:
    """Return a job over prompts, by a plain value that tells all that it depends on; where sources are given,
    one for each prompt.
    """

    def source_of(number: int) -> Source:
        return sources[number] if sources else Source(Setting(), f"prompt {number + 1}")

    return PartJob(_name(content), source_of)


def patch_jobs(jobs: Sequence[PatchJob], sources: Sequence[Source]) -> list[PartJob]:
    """Return the jobs of a part that patches."""
    changes: dict[int, str] = {}
    for job in jobs:
        if id(job.changes) not in changes:
            changes[id(job.changes)] = _name(*map(_change, job.changes))
    return [
        prompts_job(
            (
                changes[id(job.changes)],
                _row_tokens(job.into),
                _source(job.source),
                sorted((name, _digest(vector)) for name, vector in job.vectors.items()),
            ),
            sources[number : number + 1],
        )
        for number, job in enumerate(jobs)
    ]


def means_name(means: UnitMeans) -> str:
    """Return a digest of a table of means."""
    return _digest(means.heads) + _digest(means.ffns)


def _change(change: Mask | Addition) -> str:
    return _mask(change) if isinstance(change, Mask) else f"{change.layer} {change.vector}"


def _row_tokens(tokens: RowTokens) -> tuple[str, list[int]]:
    return tokens.row.digest, tokens.tokens.tolist()


def _source(source: RowTokens | UnitMeans | None) -> object:
    if source is None:
        return None
    return means_name(source) if isinstance(source, UnitMeans) else _row_tokens(source)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
