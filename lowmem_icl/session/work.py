"""What the stages of a run share: the model and its documents, finished parts, the clock, and what is gathered."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost, operations, sweep_cost
from lowmem_icl.engine.passes import PassSetup, sweep
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.experiments.importance.measure import Importance
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.session.parts import Draft, Parts
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.statistics.resampling import DocumentRanking
from lowmem_icl.system.progress import Advance, Progress
from lowmem_icl.tasks.loading import TaskRows

EVALUATE_CHUNK = 128
LARGEST_ABLATE_CHUNK = 16
AGGREGATE = "aggregate"

Row = dict[str, Any]


class OutOfTime(Exception):
    """The hours given to a run are over; what is finished is kept."""


@dataclass(frozen=True)
class MadeMask:
    """A mask that a run made: for which task and shot count, by which method, from how many documents; `note` says more."""

    name: str
    mask: Mask
    method: str
    task: str
    shots: int
    documents: int
    seed: int | None
    scores: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass
class Gathered:
    """What the experiments of a run put together: tables by experiment, masks and warnings.

    `results` are rows of results.parquet, `columns` blocks of columns of it, where there are very many. A stage that has
    more puts its new rows in place of its earlier ones. `document_rankings`: those of `rankings` (heads) whose scores are known
    by document; `record`: what stages add to run.json.
    """

    results: dict[str, list[Row]] = field(default_factory=dict)
    columns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    effects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    masks: list[MadeMask] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    importance: dict[tuple[str, int], Importance] = field(default_factory=dict)
    rankings: dict[RankingKey, NDArray[np.float64]] = field(default_factory=dict)
    ffn_rankings: dict[RankingKey, NDArray[np.float64]] = field(default_factory=dict)
    document_rankings: dict[RankingKey, DocumentRanking] = field(default_factory=dict)


def chunks_of(documents: int, chunk: int) -> list[slice]:
    """Return so many documents in chunks of one size."""
    return [slice(start, start + chunk) for start in range(0, documents, chunk)]


def doubling_chunks(documents: int, largest: int = LARGEST_ABLATE_CHUNK) -> list[slice]:
    """Return documents in chunks of 1, 1, 2, 4, 8, …: so that all units are measured early, and then better."""
    chunks: list[slice] = []
    start, size = 0, 1
    while start < documents:
        chunks.append(slice(start, min(documents, start + size)))
        start, size = start + size, min(largest, max(1, start + size))
    return chunks


def most_documents(tasks: Sequence[TaskRows]) -> int:
    """Return how many documents the largest of some tasks has."""
    return max(len(task.documents) for task in tasks)


def chunk_jobs(
    prepared: Prepared, tasks: Sequence[TaskRows], masks: Sequence[tuple[Mask, ...]], chunk: slice
) -> list[Job]:
    """Return one chunk of documents of all tasks that have any there, packed, under each task's masks."""
    return [
        Job(prepared.pack(task, chunk).packed, of_task)
        for task, of_task in zip(tasks, masks, strict=True)
        if chunk.start < len(task.documents)
    ]


@dataclass(frozen=True)
class Work:
    """What every stage needs: the documents, the model, the memory for residuals, and where finished parts are.

    `stop_at`: the time by `clock` at which each experiment must stop; those that are not named may take as long as it takes.
    `skipped`: experiments that wait for another run of the same command.
    """

    options: RunOptions
    prepared: Prepared
    model: StreamedModel
    limits: SweepLimits
    cache: CleanCache
    parts: Parts
    progress: Progress
    stop_at: dict[str, float] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()
    clock: Callable[[], float] = time.monotonic

    def check_time(self, experiment: str) -> None:
        """Raise OutOfTime where an experiment's time is over."""
        if self.clock() >= self.stop_at.get(experiment, float("inf")):
            raise OutOfTime(experiment)

    def account(self, advance: Advance) -> Callable[[SweepCost], None]:
        """Return a function that tells what was computed as progress, in operations."""
        return lambda cost: advance(operations(cost, self.model.skeleton))

    def sweep(
        self,
        experiment: str,
        name: str,
        label: str,
        jobs: Callable[[], Sequence[Job]],
        *,
        keep_clean: bool = False,
    ) -> list[Scores]:
        """Return the scores of a part's jobs, from its file or by sweeping; raise OutOfTime between two waves."""
        skeleton = self.model.skeleton

        def make(draft: Draft) -> dict[str, NDArray[Any]]:
            self.check_time(experiment)
            wanted = jobs()
            scores = [Scores.empty(len(job.masks), job.packed.option_count) for job in wanted]
            draft.begin(lambda: _arrays(scores))

            def after_wave() -> None:
                draft.now_and_then()
                self.check_time(experiment)

            cost = sweep_cost(wanted, skeleton.width, skeleton.layers, self.limits)
            with self.progress(label, operations(cost, skeleton), "operations") as advance:
                setup = PassSetup(self.model, self.limits, self.cache, self.account(advance), after_wave)
                sweep(setup, wanted, scores, keep_clean=keep_clean)
            return _arrays(scores)

        arrays = self.parts.get_or_make(name, make)
        return [
            Scores(*(arrays[f"{number}.{name}"] for name in ("logprobs", "greedy", "scored")))
            for number in range(len(arrays) // 3)
        ]

    def sweep_chunk(
        self,
        experiment: str,
        name: str,
        label: str,
        tasks: Sequence[TaskRows],
        masks: Sequence[tuple[Mask, ...]],
        chunk: slice,
    ) -> dict[int, Scores]:
        """Sweep one chunk of the documents of all tasks, a part of its own; return scores by the task's place."""
        here = [place for place, task in enumerate(tasks) if chunk.start < len(task.documents)]
        jobs = partial(chunk_jobs, self.prepared, tasks, masks, chunk)
        scores = self.sweep(experiment, f"{name}-{chunk.start:06d}", label, jobs)
        return dict(zip(here, scores, strict=True))

    def sweep_in_chunks(
        self,
        experiment: str,
        name: str,
        label: str,
        tasks: Sequence[TaskRows],
        masks: Sequence[tuple[Mask, ...]],
        chunk: int,
    ) -> list[Scores]:
        """Sweep tasks in chunks of documents, a part each; return the whole scores of every task.

        Packing goes by chunk, whatever the memory, so that a chunk's result is always the same.
        """
        chunks = chunks_of(most_documents(tasks), chunk)
        done = [
            self.sweep_chunk(
                experiment,
                name,
                label if len(chunks) == 1 else f"{label} {number + 1}/{len(chunks)}",
                tasks,
                masks,
                part,
            )
            for number, part in enumerate(chunks)
        ]
        return [
            joined([by_place[place] for by_place in done if place in by_place]) for place in range(len(tasks))
        ]


def joined(chunks: Sequence[Scores]) -> Scores:
    """Return the scores of documents in a row from those of their chunks."""
    return Scores(
        np.concatenate([score.logprobs for score in chunks], axis=1),
        np.concatenate([score.greedy for score in chunks], axis=1),
        np.concatenate([score.scored for score in chunks], axis=1),
    )


def _arrays(scores: Sequence[Scores]) -> dict[str, NDArray[Any]]:
    return {
        f"{number}.{name}": array
        for number, score in enumerate(scores)
        for name, array in score.arrays().items()
    }
