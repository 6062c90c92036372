"""The steps of searches that run side by side, as parts: sweeps of masks, and gradients for estimates."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.importance.stage import scores_of, unit_estimates
from lowmem_icl.experiments.prune import search
from lowmem_icl.experiments.prune.search import Values
from lowmem_icl.experiments.prune.settings import Setting
from lowmem_icl.masks.mask import Mask
from lowmem_icl.session.jobs import MaskedDocuments
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.work import GradientsPart, SweepPart, Work
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.scoring import document_scores

AskedMasks = Mapping[tuple[int, search.Half], tuple[Mask, ...]]


def half_of(task: TaskRows, half: search.Half) -> TaskRows:
    """Return a task with one half of its documents."""
    return replace(task, documents=task.documents[half_slice(len(task.documents), half)])


def half_slice(n_documents: int, half: search.Half) -> slice:
    """Return the documents of a half: they are dealt alternately; a single one is in both."""
    every = 2 if n_documents > 1 else 1
    return slice(0 if half == "choose" else every - 1, None, every)


def sweep_part(prepared: Prepared, name: str, label: str, asked: AskedMasks) -> SweepPart:
    """Return the sweep of what searches ask for: by training task and half of its documents, the masks to be
    scored.
    """
    jobs = tuple(
        MaskedDocuments(prepared.train[index], half_slice(len(prepared.train[index].documents), half), masks)
        for (index, half), masks in asked.items()
    )
    return SweepPart(name, label, jobs, keep_clean=True)


def estimates_part(
    prepared: Prepared, name: str, label: str, asked: Mapping[tuple[int, Mask], object]
) -> GradientsPart:
    """Return the pass that estimates what every unit costs, by training task and the mask of its model."""
    tasks = tuple(half_of(prepared.train[index], "choose") for index, _ in asked)
    return GradientsPart(name, label, tasks, tuple(mask for _, mask in asked))


class StepScorer:
    """Scores what all searches ask for in one sweep; what two searches ask of a task is scored once."""

    def __init__(self, work: Work, settings: Mapping[str, Setting]) -> None:
        self._work, self._settings = work, settings

    def step(self, number: int, requests: Mapping[str, search.Asked]) -> dict[str, search.Answer]:
        """Return the answers to the requests of all searches at a step, which are of one kind."""
        name, label = f"prune-{number:05d}", f"prune, step {number + 1}"
        masks = {of: asked for of, asked in requests.items() if isinstance(asked, search.Request)}
        estimates = {of: asked for of, asked in requests.items() if isinstance(asked, search.EstimateRequest)}
        answers = self._estimates(name, f"{label}, estimates", estimates) if estimates else {}
        return answers | (self._scores(name, label, masks) if masks else {})

    def compare(
        self, requests: Mapping[str, search.Request]
    ) -> dict[str, tuple[search.Answer, search.Answer]]:
        """Return the answers to requests of two masks each, one by one."""
        answers = self._scores("prune-compared", "compare masks", requests) if requests else {}
        return {
            name: (tuple(group[:1] for group in answer), tuple(group[1:] for group in answer))
            for name, answer in answers.items()
        }

    def _scores(
        self, name: str, label: str, requests: Mapping[str, search.Request]
    ) -> dict[str, search.Answer]:
        asked: dict[tuple[int, search.Half], dict[Mask, int]] = {}
        options = self._work.prepared.options
        filled = {
            searcher: self._settings[searcher].filled(options, request.masks)
            for searcher, request in requests.items()
        }
        for searcher, request in requests.items():
            for index in self._settings[searcher].tasks:
                masks = asked.setdefault((index, request.half), {})
                for mask in filled[searcher]:
                    masks.setdefault(mask, len(masks))
        prepared = self._work.prepared
        part = sweep_part(prepared, name, label, {key: tuple(masks) for key, masks in asked.items()})
        objective = {
            key: self._objective(job, score)
            for key, job, score in zip(asked, part.jobs, self._work.sweep(part), strict=True)
        }
        return {
            searcher: tuple(
                objective[index, request.half][
                    [asked[index, request.half][mask] for mask in filled[searcher]]
                ]
                for index in self._settings[searcher].tasks
            )
            for searcher, request in requests.items()
        }

    def _objective(self, job: MaskedDocuments, score: Scores) -> Values:
        """Return the objective of a job's documents under its masks, [M, N]."""
        task = replace(job.task, documents=job.task.documents[job.documents])
        scored = document_scores(task, score.logprobs, score.greedy)
        return scored[self._work.prepared.options.objective]

    def _estimates(
        self, name: str, label: str, requests: Mapping[str, search.EstimateRequest]
    ) -> dict[str, search.Answer]:
        asked: dict[tuple[int, Mask], Values] = {}
        prepared = self._work.prepared
        # What would stand in others' place matters in the whole model, too.
        masks = {
            searcher: request.mask.filled(self._settings[searcher].fill(prepared.options))
            for searcher, request in requests.items()
        }
        for searcher, mask in masks.items():
            for index in self._settings[searcher].tasks:
                asked[index, mask] = np.zeros(0)
        part = estimates_part(prepared, name, label, asked)
        for key, task, gradients in zip(asked, part.tasks, self._work.gradients(part), strict=True):
            packed = prepared.pack(task, gold_only=True)
            asked[key] = unit_estimates(scores_of(prepared, packed, gradients)).T
        return {
            searcher: tuple(asked[index, mask] for index in self._settings[searcher].tasks)
            for searcher, mask in masks.items()
        }
