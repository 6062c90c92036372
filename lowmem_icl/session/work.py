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
from lowmem_icl.engine.setup import Lost
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.engine.unit_means import MeanSums, means_cost
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.session.failures import Failure, Setting, SettingsFailed, reason_of
from lowmem_icl.session.fills import MeansPart, means_parts, tables_of
from lowmem_icl.session.jobs import (
    MaskedDocuments,
    gathered,
    masked_rows,
    outlined_gold,
    outlined_jobs,
    rows_of_gold,
)
from lowmem_icl.session.part_jobs import PartJob, Source, prompts_job, sweep_jobs, task_jobs
from lowmem_icl.session.parts import Draft, HasArrays, Parts, by_job
from lowmem_icl.session.patch_parts import PatchEstimatesPart, PatchPart, PromptMeansPart
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.rows_on_the_way import RowsOnTheWay
from lowmem_icl.session.sealed import Arrays
from lowmem_icl.system.progress import Advance, PartProgress
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask

Resident = Collection[int]
Made = tuple[Sequence[HasArrays], Sequence[Lost]]
"""Results of jobs, in order, and what of them is lost."""


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
    as far as these were asked for. `everything`: the run with the settings that `prepared` is without, None
    where that is all. `failures`: by part and job, those of this session.
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
    everything: Prepared | None = None
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)

    def check_time(self) -> None:
        """Raise OutOfTime where the stage's time is over."""
        if self.clock() >= self.deadline:
            raise OutOfTime

    def sweep(self, part: SweepPart) -> list[Scores]:
        """Return the scores of a part's jobs, from its file or by sweeping; raise OutOfTime between two
        waves, SettingsFailed where some are not finite.
        """

        def make(draft: Draft, wanted: Sequence[int]) -> Made:
            asked = replace(part, jobs=tuple(part.jobs[index] for index in wanted))
            tables = self._tables(itertools.chain.from_iterable(job.masks for job in asked.jobs))
            rows = [masked_rows(self.prepared, job, tables) for job in asked.jobs]
            jobs = [each.job for of_job in rows for each in of_job]
            scores = [Scores.empty(len(job.masks), job.packed.option_count) for job in jobs]
            draft.resume(lambda: by_job(scores))
            skeleton = self.prepared.skeleton
            cost = sweep_cost(jobs, skeleton.width, skeleton.layers, self.limits, cached=part.cached)
            with self.counted(part.label, cost, asked.ablations) as advance:
                setup = self.setup(advance, draft)
                sweep(setup, jobs, scores, keep_clean=part.keep_clean)
            made = iter(scores)
            owners = [index for index, of_job in enumerate(rows) for _ in of_job]
            lost = [replace(each, job=owners[each.job]) for each in setup.lost]
            return [gathered(of_job, list(itertools.islice(made, len(of_job)))) for of_job in rows], lost

        return [Scores(**fields) for fields in self.made(part.name, sweep_jobs(part.jobs), make)]

    def gradients(self, part: GradientsPart) -> list[UnitGradients]:
        """Return the unit gradients of a part's tasks, from its file or from two reads of the weights per
        block; raise SettingsFailed where some are not finite.
        """

        def make(draft: Draft, wanted: Sequence[int]) -> Made:
            pairs = [(part.tasks[index], part.masks[index]) for index in wanted]
            tasks, masks = zip(*pairs, strict=True)
            packed = [self.prepared.pack(task, gold_only=True) for task in tasks]
            size = self.prepared.skeleton.layers, self.prepared.skeleton.heads
            gradients = [
                UnitGradients.empty(len(task.task.documents), len(task.options), *size) for task in packed
            ]
            draft.resume(lambda: by_job(gradients))
            tables = self._tables(masks)
            jobs = []
            for task, of_task, mask in zip(tasks, packed, masks, strict=True):
                rows, fills = rows_of_gold(self.prepared, task, mask, tables)
                jobs.append(GradientJob(rows.rows, partial(best_gold, of_task), mask, fills))
            # The vocabulary's share is not reported as progress.
            asked = replace(part, tasks=tasks, masks=masks)
            cost = replace(asked.cost(self.prepared, self.limits, ()), answers=0)
            with self.counted(part.label, cost) as advance:
                setup = self.setup(advance, draft)
                unit_gradients(setup, jobs, gradients)
            return gradients, setup.lost

        found = self.made(part.name, task_jobs(part.tasks, part.masks), make)
        return [UnitGradients(**fields) for fields in found]

    def head_scores(self, part: HeadScoresPart) -> HeadScores:
        """Return the scores of all heads, from the part's file or from a read of the weights per block of
        rows; raise SettingsFailed where some are not finite.
        """
        questions = part.questions

        def make(draft: Draft, wanted: Sequence[int]) -> Made:
            skeleton = self.prepared.skeleton
            scores = HeadScores.empty(len(questions.base_tokens), skeleton.layers, skeleton.heads)
            draft.resume(lambda: by_job([scores]))
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
            return [scores], setup.lost

        content = [row.digest for row in questions.rows], questions.form, questions.spurious
        sources = [
            Source(Setting(), f"random sequence {number + 1}") for number in range(len(questions.repeated))
        ]
        (found,) = self.made(part.name, [prompts_job(content, sources)], make)
        return HeadScores(**found)

    def means(self, part: MeansPart | PromptMeansPart) -> list[MeanSums]:
        """Return what units' outputs add up to, of every task or group of a part, from its file or from a
        read of the weights per block of rows; raise SettingsFailed where some are not finite.
        """

        def make(draft: Draft, wanted: Sequence[int]) -> Made:
            skeleton = self.prepared.skeleton
            every = part.packed(self.prepared)
            packed = [every[index] for index in wanted]
            widths = skeleton.attention_width, skeleton.width
            sums = [MeanSums.empty(len(of_task.rows), skeleton.layers, *widths) for of_task in packed]
            draft.resume(lambda: by_job(sums))
            with self.counted(part.label, means_cost(packed, skeleton.size, self.limits)) as advance:
                setup = self.setup(advance, draft)
                unit_means(setup, packed, sums, ends_only=part.ends_only)
            return sums, setup.lost

        return [MeanSums(**fields) for fields in self.made(part.name, part.part_jobs, make)]

    def _tables(self, masks: Iterable[Mask]) -> Mapping[str, UnitMeans]:
        """Return the tables that names of means stand for: given with masks, or made by the first part.

        Raises SettingsFailed where tasks have none; together all others count, whatever else failed of them.
        """
        named = {mask.fill for mask in masks if mask.fill is not None and mask.ablation == "mean"}
        if not named <= self.known_tables.keys():
            self.known_tables.update(self.prepared.given_means)
        if not named <= self.known_tables.keys():
            for part in means_parts(self.everything or self.prepared):
                self.known_tables.update(self._tables_of(part))
        return self.known_tables

    def _tables_of(self, part: MeansPart) -> Mapping[str, UnitMeans]:
        try:
            return tables_of(part.tasks, self.means(part))
        except SettingsFailed as error:
            failed = {failure.setting for failure in error.failures}
            if not failed.isdisjoint(map(Setting.of, self.prepared.train)):
                raise
            left = tuple(task for task in part.tasks if Setting.of(task) not in failed)
            return self._tables_of(replace(part, tasks=left))

    def made(
        self, name: str, jobs: Sequence[PartJob], make: Callable[[Draft, Sequence[int]], Made]
    ) -> list[Mapping[str, NDArray[Any]]]:
        """Return the arrays of a part's jobs, from its file or as they are made.

        `make` makes those that are not in the file, by their indices, and says which met what is not finite:
        they are not kept, and SettingsFailed is raised once all others are.
        """
        known = [self.failures[name, job.name] for job in jobs if (name, job.name) in self.failures]
        if known:
            raise SettingsFailed(known)
        kept = self.parts.jobs(name)
        wanted = [index for index, job in enumerate(jobs) if job.name not in kept]
        if wanted:
            missing = [jobs[index] for index in wanted]
            kept = self._completed(name, kept, missing, lambda draft: make(draft, wanted))
        else:
            self.parts.reused += 1
        self.after_part()
        return [kept[job.name] for job in jobs]

    def _completed(
        self,
        name: str,
        kept: Mapping[str, Arrays],
        jobs: Sequence[PartJob],
        make: Callable[[Draft], Made],
    ) -> dict[str, Arrays]:
        failed: dict[str, Failure] = {}

        def whole(draft: Draft) -> dict[str, Arrays]:
            self.check_time()
            draft.is_of([job.name for job in jobs])
            results, every_lost = make(draft)
            for lost in every_lost:
                source = jobs[lost.job].source_of(lost.document)
                failed[jobs[lost.job].name] = Failure(source.setting, reason_of(lost, source.name))
            pairs = zip(jobs, results, strict=True)
            return {job.name: result.arrays() for job, result in pairs if job.name not in failed}

        every = self.parts.complete(name, kept, whole)
        if failed:
            self.failures.update({(name, job): failure for job, failure in failed.items()})
            raise SettingsFailed(failed.values())
        return every

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
