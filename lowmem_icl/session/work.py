"""The work that stages ask for: parts described as data, which the planner counts and a run executes.

A part is one resumable piece of work and its file. These kinds read the weights: sweeps of documents under
masks, the gradients of documents, means of units' outputs, the scores of heads on random sequences, and
patches of prompts. Each says what it is called and what it consists of, once; `cost` counts that, and `Work`
does it.
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost, gradients_cost, operations, sweep_cost
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores, heads_cost
from lowmem_icl.engine.passes import GradientJob, PassSetup, score_heads, sweep, unit_gradients, unit_means
from lowmem_icl.engine.schedule import BlockRow, SweepLimits, head_blocks
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.engine.unit_means import MeanSums
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.session.fills import MeansPart, means_parts, tables_of
from lowmem_icl.session.jobs import (
    MaskedDocuments,
    gathered,
    masked_rows,
    outlined_gold,
    outlined_jobs,
    rows_of_gold,
)
from lowmem_icl.session.parts import Draft, Parts, by_job, of_jobs
from lowmem_icl.session.patch_parts import PatchEstimatesPart, PatchPart, PromptMeansPart
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.rows_on_the_way import RowsOnTheWay
from lowmem_icl.system.progress import Advance, PartProgress
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask

Resident = Collection[int]


class OutOfTime(Exception):
    """The hours given to a run are over; what is finished is kept."""


@dataclass(frozen=True)
class SweepPart:
    """Documents of tasks under masks, in one sweep.

    `keep_clean`: another part will start from the same clean residuals; `cached`: an earlier one left them.
    `documents_before`, `documents`: how many documents per task are done before it and once it is, where
    planned hours are told by that. `times`: how often it is expected, where that depends on what is found.
    """

    name: str
    label: str
    jobs: tuple[MaskedDocuments, ...]
    keep_clean: bool = False
    cached: bool = False
    documents_before: int = 0
    documents: int = 0
    times: float = 1

    @property
    def ablations(self) -> int:
        """How many times a document is scored without a unit or mask."""
        return sum(len(job.task.documents[job.documents]) * sum(map(bool, job.masks)) for job in self.jobs)

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Resident) -> SweepCost:
        """Return what the sweep takes; layers that are `resident` are not read."""
        jobs, skeleton = outlined_jobs(prepared, self.jobs), prepared.skeleton
        once = sweep_cost(jobs, skeleton.width, skeleton.layers, limits, resident, cached=self.cached)
        return once * self.times


@dataclass(frozen=True)
class GradientsPart:
    """The unit gradients of the gold options of all documents of tasks, each task's model without a mask's
    units.

    `times`: how often it is expected, where that depends on what is found.
    """

    name: str
    label: str
    tasks: tuple[TaskRows, ...]
    masks: tuple[Mask, ...]
    times: float = 1

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Resident) -> SweepCost:
        """Return what a pass forward and back over all documents takes."""
        pairs = zip(self.tasks, self.masks, strict=True)
        packed, fills = zip(*(outlined_gold(prepared, *pair) for pair in pairs), strict=True)
        return gradients_cost(packed, fills, prepared.skeleton.size, limits, resident) * self.times


@dataclass(frozen=True, eq=False)
class HeadScoresPart:
    """The scores of all heads on random sequences."""

    name: str
    label: str
    questions: HeadQuestions

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Resident) -> SweepCost:
        """Return what scoring heads takes: a read of the weights per block of rows that fits."""
        skeleton = prepared.skeleton
        rows = [BlockRow(index, row) for index, row in enumerate(self.questions.rows)]
        blocks = head_blocks(rows, skeleton.width, skeleton.layers, limits)
        copied = sum(len(row) for row in self.questions.unrepeated)
        tokens = copied + sum(len(row) for row in self.questions.repeated)
        layers_read = len(blocks) * (skeleton.layers - len(resident))
        form = self.questions.form
        return heads_cost(tokens, copied, skeleton, form, limits.micro_batch_tokens, layers_read)


Part = (
    SweepPart | GradientsPart | HeadScoresPart | MeansPart | PatchPart | PromptMeansPart | PatchEstimatesPart
)


@dataclass(frozen=True)
class Work:
    """What executes the parts of a stage: the model, the memory for residuals, and where finished parts are.

    `deadline`: the time by `clock` at which the stage must stop. `wants_results`: whether anybody would look
    at what there is before a stage is over; it costs seconds to compute. `after_part`: called whenever a part
    is there. `stage`: whose parts these are. `known_tables`: of means, by the names that masks have for them,
    as far as these were asked for.
    """

    prepared: Prepared
    model: StreamedModel
    limits: SweepLimits
    cache: CleanCache
    parts: Parts
    progress: PartProgress
    deadline: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    wants_results: Callable[[], bool] = lambda: True
    after_part: Callable[[], None] = lambda: None
    stage: str = ""
    known_tables: dict[str, UnitMeans] = field(default_factory=dict)

    def check_time(self) -> None:
        """Raise OutOfTime where the stage's time is over."""
        if self.clock() >= self.deadline:
            raise OutOfTime

    def sweep(self, part: SweepPart) -> list[Scores]:
        """Return the scores of a part's jobs, from its file or by sweeping; raise OutOfTime between two
        waves.
        """

        def make(draft: Draft) -> dict[str, NDArray[Any]]:
            self.check_time()
            tables = self._tables(itertools.chain.from_iterable(job.masks for job in part.jobs))
            rows = [masked_rows(self.prepared, job, tables) for job in part.jobs]
            jobs = [each.job for of_job in rows for each in of_job]
            scores = [Scores.empty(len(job.masks), job.packed.option_count) for job in jobs]
            draft.resume(lambda: by_job(scores))
            skeleton = self.prepared.skeleton
            cost = sweep_cost(jobs, skeleton.width, skeleton.layers, self.limits, cached=part.cached)
            with self.counted(part.label, cost, part.ablations) as advance:
                sweep(self.setup(advance, draft), jobs, scores, keep_clean=part.keep_clean)
            made = iter(scores)
            return by_job([gathered(of_job, list(itertools.islice(made, len(of_job)))) for of_job in rows])

        return [Scores(**fields) for fields in of_jobs(self.made(part.name, make))]

    def gradients(self, part: GradientsPart) -> list[UnitGradients]:
        """Return the unit gradients of a part's tasks, from its file or from two reads of the weights per
        block.
        """

        def make(draft: Draft) -> dict[str, NDArray[Any]]:
            self.check_time()
            packed = [self.prepared.pack(task, gold_only=True) for task in part.tasks]
            skeleton = self.prepared.skeleton
            gradients = [
                UnitGradients.empty(
                    len(task.task.documents), len(task.options), skeleton.layers, skeleton.heads
                )
                for task in packed
            ]
            draft.resume(lambda: by_job(gradients))
            tables = self._tables(part.masks)
            jobs = []
            for task, of_task, mask in zip(part.tasks, packed, part.masks, strict=True):
                rows, fills = rows_of_gold(self.prepared, task, mask, tables)
                jobs.append(GradientJob(rows.rows, partial(best_gold, of_task), mask, fills))
            # The vocabulary's share is not reported as progress.
            cost = replace(part.cost(self.prepared, self.limits, ()), answers=0)
            with self.counted(part.label, cost) as advance:
                unit_gradients(self.setup(advance, draft), jobs, gradients)
            return by_job(gradients)

        return [UnitGradients(**fields) for fields in of_jobs(self.made(part.name, make))]

    def head_scores(self, part: HeadScoresPart) -> HeadScores:
        """Return the scores of all heads, from the part's file or from a read of the weights per block of
        rows.
        """
        questions = part.questions

        def make(draft: Draft) -> dict[str, NDArray[Any]]:
            self.check_time()
            skeleton = self.prepared.skeleton
            scores = HeadScores.empty(len(questions.base_tokens), skeleton.layers, skeleton.heads)
            draft.resume(scores.arrays)
            rows = RowsOnTheWay(
                draft,
                self.parts.draft(f"{part.name}-rows"),
                # From another device the rows come back only at the end.
                keeps_rows=self.model.device.type == "cpu",
                check_time=self.check_time,
                clock=self.clock,
            )
            # The vocabulary's share is not reported as progress.
            cost = replace(part.cost(self.prepared, self.limits, ()), answers=0)
            with self.counted(part.label, cost) as advance:
                setup = replace(self.setup(advance, draft), after_step=rows.after_layer)
                score_heads(setup, questions, scores, begin=rows.begin)
            rows.discard()
            return scores.arrays()

        return HeadScores(**self.made(part.name, make))

    def means(self, part: MeansPart | PromptMeansPart) -> list[MeanSums]:
        """Return what units' outputs add up to, of every task or group of a part, from its file or from a
        read of the weights per block of rows.
        """

        def make(draft: Draft) -> dict[str, NDArray[Any]]:
            self.check_time()
            skeleton = self.prepared.skeleton
            packed = part.packed(self.prepared)
            widths = skeleton.attention_width, skeleton.width
            sums = [MeanSums.empty(len(of_task.rows), skeleton.layers, *widths) for of_task in packed]
            draft.resume(lambda: by_job(sums))
            with self.counted(part.label, part.cost(self.prepared, self.limits, ())) as advance:
                unit_means(self.setup(advance, draft), packed, sums, ends_only=part.ends_only)
            return by_job(sums)

        return [MeanSums(**fields) for fields in of_jobs(self.made(part.name, make))]

    def _tables(self, masks: Iterable[Mask]) -> Mapping[str, UnitMeans]:
        """Return the tables that names of means stand for: given with masks, or made by the first part."""
        named = {mask.fill for mask in masks if mask.fill is not None and mask.ablation == "mean"}
        if not named <= self.known_tables.keys():
            self.known_tables.update(self.prepared.given_means)
        if not named <= self.known_tables.keys():
            for part in means_parts(self.prepared):
                self.known_tables.update(tables_of(part.tasks, self.means(part)))
        return self.known_tables

    def made(self, name: str, make: Callable[[Draft], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """Return the arrays of a part, from its file or as they are made."""
        arrays = self.parts.get_or_make(name, make)
        self.after_part()
        return arrays

    def counted(self, label: str, cost: SweepCost, ablations: int = 0) -> Any:
        """Show a part as it goes on; gives what its progress is told to."""
        return self.progress(self.stage, label, operations(cost, self.prepared.skeleton), ablations)

    def setup(self, advance: Advance, draft: Draft) -> PassSetup:
        """Return what a pass works with, whose progress `advance` and whose draft `draft` hear of."""

        def after_step() -> None:
            draft.save_if_due()
            self.check_time()

        skeleton = self.prepared.skeleton
        return PassSetup(
            self.model,
            self.limits,
            self.cache,
            account=lambda cost: advance(operations(cost, skeleton)),
            after_step=after_step,
        )


def best_gold(task: PackedTask, logprobs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which options to differentiate, [O]: of every document the gold one that scores best."""
    selected = np.zeros(len(task.options), dtype=np.bool_)
    for document, first in zip(task.task.documents, task.first_option, strict=True):
        gold = [int(first) + index for index, is_gold in enumerate(document.gold) if is_gold]
        selected[max(gold, key=lambda option: (logprobs[option], -option))] = True
    return selected


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
