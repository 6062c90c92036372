"""Documents in chunks, a part each, and their scores joined again."""

from collections.abc import Sequence

import numpy as np

from lowmem_icl.engine.answers import Scores
from lowmem_icl.masks.mask import Mask
from lowmem_icl.session.jobs import MaskedDocuments
from lowmem_icl.session.work import SweepPart
from lowmem_icl.tasks.loading import TaskRows


def chunks_of(n_documents: int, size: int) -> list[slice]:
    """Return documents in chunks of one size."""
    return [slice(start, start + size) for start in range(0, n_documents, size)]


def most_documents(tasks: Sequence[TaskRows]) -> int:
    """Return how many documents the largest of some tasks has."""
    return max(len(task.documents) for task in tasks)


def masked_chunk(
    tasks: Sequence[TaskRows], masks: Sequence[Sequence[Mask]], chunk: slice
) -> tuple[MaskedDocuments, ...]:
    """Return one chunk of the documents of all tasks that have any there, under each task's masks."""
    return tuple(
        MaskedDocuments(task, chunk, tuple(task_masks))
        for task, task_masks in zip(tasks, masks, strict=True)
        if chunk.start < len(task.documents)
    )


def sweep_in_chunks(
    name: str, label: str, tasks: Sequence[TaskRows], masks: Sequence[Sequence[Mask]], size: int
) -> list[SweepPart]:
    """Return the parts that sweep tasks in chunks of documents; rows are packed by chunk, whatever the
    memory.
    """
    chunks = chunks_of(most_documents(tasks), size)
    return [
        SweepPart(
            f"{name}-{chunk.start:06d}",
            label if len(chunks) == 1 else f"{label} {number}/{len(chunks)}",
            masked_chunk(tasks, masks, chunk),
            documents=chunk.stop,
        )
        for number, chunk in enumerate(chunks, start=1)
    ]


def scores_by_task(
    tasks: Sequence[TaskRows], parts: Sequence[SweepPart], scores: Sequence[Sequence[Scores]]
) -> list[Scores]:
    """Return the scores of every task's documents, joined over the parts that hold some of them."""
    found: list[list[Scores]] = [[] for _ in tasks]
    for part, part_scores in zip(parts, scores, strict=True):
        for job, score in zip(part.jobs, part_scores, strict=True):
            found[_index_of(tasks, job.task)].append(score)
    return [joined(chunks) for chunks in found]


def _index_of(tasks: Sequence[TaskRows], wanted: TaskRows) -> int:
    return next(index for index, task in enumerate(tasks) if task is wanted)


def joined(chunks: Sequence[Scores]) -> Scores:
    """Return the scores of consecutive documents from those of their chunks."""
    return Scores(
        **{
            name: np.concatenate([getattr(score, name) for score in chunks], axis=1)
            for name in ("logprobs", "greedy", "scored")
        }
    )
