"""The greedy searches of the prune stage: in lockstep, compared with masks of equal size, all judged on other
documents.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.evaluate import measure as evaluation
from lowmem_icl.experiments.evaluate import stage as evaluate
from lowmem_icl.experiments.prune import search
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN, mask_name
from lowmem_icl.masks.rankings import RankingKey, lowest_ffns, lowest_heads, random_mask
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import MaskResult, Rankings, StageResult, stamp
from lowmem_icl.session.work import (
    MaskedDocuments,
    Part,
    SweepPart,
    Work,
    scores_by_task,
    sweep_in_chunks,
)
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tasks.scoring import document_scores

INSTEAD = "the gradient ranking's mask of equal size, which lost less on the checking half"
METHODS = ("greedy", "gradient", "random")

Values = NDArray[np.float64]
Asked = Mapping[tuple[int, search.Half], tuple[Mask, ...]]


@dataclass(frozen=True)
class Setting:
    """What one search is for: a task, or all of them, at a shot count; `tasks` are the indices of the
    training tasks.
    """

    task: str
    shots: int
    tasks: tuple[int, ...]

    def mask_name(self, method: str) -> str:
        """Return the name of its mask by a method."""
        return mask_name(method, self.task, self.shots)


def settings_of(prepared: Prepared) -> list[Setting]:
    """Return every task at every shot count, and all tasks together where there are two."""
    tasks = prepared.train
    settings = [Setting(task.task, task.shots, (index,)) for index, task in enumerate(tasks)]
    for shots in prepared.options.resolved_shots:
        members = [index for index, task in enumerate(tasks) if task.shots == shots and in_domain(task.task)]
        if len(members) > 1:
            settings.append(Setting(AGGREGATE, shots, tuple(members)))
    return settings


def step_part(prepared: Prepared, name: str, label: str, asked: Asked) -> SweepPart:
    """Return the sweep of what searches ask for: by task and half of its training documents, the masks to be
    scored.
    """
    jobs = tuple(
        MaskedDocuments(prepared.train[index], _half(len(prepared.train[index].documents), half), masks)
        for (index, half), masks in asked.items()
    )
    return SweepPart(name, label, jobs, keep_clean=True)


def _half(n_documents: int, half: search.Half) -> slice:
    """Return the documents of a half: they are dealt alternately; a single one is in both."""
    every = 2 if n_documents > 1 else 1
    return slice(0 if half == "choose" else every - 1, None, every)


def parts(prepared: Prepared) -> Iterator[Part]:
    """Yield the work that searches are expected to ask for, and the judging of their masks.

    Which units go is not known before: in every layer each half's documents are swept under all heads, then
    under one fewer, and so on. The first sweep of a layer also runs the clean model up to it; the others find
    that in the cache.
    """
    skeleton, n_heads = prepared.skeleton, prepared.skeleton.heads
    n_searches = 2 if any(setting.task == AGGREGATE for setting in settings_of(prepared)) else 1
    for layer in range(skeleton.layers):
        # From the first layer up, masks hold units of the layers below.
        below = frozenset([(0, 0)] if prepared.options.direction == "up" else [])
        heads = tuple(Mask(heads=below | {(layer, head)}) for head in range(n_heads))
        ffn = (Mask(ffns=frozenset([layer])),)
        sweeps: list[tuple[search.Half, tuple[Mask, ...], float, bool]] = [
            ("choose", heads, 1.0, False),
            ("check", heads[:1], 1.0, False),
            ("choose", heads, (n_heads - 1) / 2, True),
            ("check", heads[:1], n_heads - 1, True),
            ("check", ffn, 1.0, True),
        ]
        for half, masks, times, cached in sweeps:
            asked: Asked = {(index, half): masks for index in range(len(prepared.train))}
            part = step_part(prepared, "", "prune", asked)
            yield replace(part, cached=cached, times=times * n_searches)
    yield from evaluate.clean_parts(prepared, {})
    stand_in = Mask(ffns=frozenset([0]))
    yield from judging_parts(
        prepared,
        [
            MaskResult(setting.mask_name(method), stand_in, method, setting.task, setting.shots, 0)
            for setting in settings_of(prepared)
            for method in METHODS
        ],
    )


def judging_parts(prepared: Prepared, made: Sequence[MaskResult]) -> list[SweepPart]:
    """Return the sweeps of the evaluation documents under the masks made for their task, or for all, at their
    shot count.
    """
    tasks = prepared.evaluate
    masks = [[judged.mask for judged in _masks_for(made, task.task, task.shots)] for task in tasks]
    return sweep_in_chunks("prune-evaluate", "evaluate masks", tasks, masks, evaluate.CHUNK)


def _masks_for(made: Sequence[MaskResult], task: str, shots: int) -> list[MaskResult]:
    return [mask for mask in made if mask.shots == shots and mask.task in (task, AGGREGATE)]


def run(work: Work, rankings: Rankings) -> StageResult:
    """Search greedy masks on the training documents; report them with others of equal size on the
    evaluation split.
    """
    prepared = work.prepared
    found = search_masks(work, rankings)
    clean_records, _ = evaluate.evaluated(work, evaluate.clean_parts(prepared, {}), {})
    clean = blocks.frame("results", clean_records, stamp(prepared, "prune"))
    results = _judged(work, found.masks)
    before, after = (_by_setting(frame) for frame in (pl.concat([clean, over_tasks(clean)]), results))
    per_task = (
        results.filter(pl.col("task") != AGGREGATE).group_by("mask").agg(pl.col("split").unique().sort())
    )
    splits = dict(per_task.select("mask", pl.col("split").list.join("/")).iter_rows())
    masks = tuple(
        replace(
            made,
            scores={
                "split": splits[made.name],
                "before": before.get((made.task, made.shots, CLEAN), {}),
                "after": after.get((made.task, made.shots, made.name), {}),
            },
        )
        for made in found.masks
    )
    return StageResult(
        results=results, masks=masks, warnings=found.warnings, record={"greedy": found.checked}
    )


def _by_setting(results: pl.DataFrame) -> dict[tuple[str, int, str], dict[str, float]]:
    """Return metrics by task, shot count and mask."""
    scores: dict[tuple[str, int, str], dict[str, float]] = {}
    for record in results.iter_rows(named=True):
        key = (record["task"], record["shots"], record["mask"])
        scores.setdefault(key, {})[record["metric"]] = record["value"]
    return scores


def _judged(work: Work, made: Sequence[MaskResult]) -> pl.DataFrame:
    """Return the evaluation of all masks, and of those made for all tasks the means over tasks."""
    prepared, tasks = work.prepared, work.prepared.evaluate
    sweeps = judging_parts(prepared, made)
    scores = scores_by_task(tasks, sweeps, [work.sweep(part) for part in sweeps])
    found: list[blocks.Block] = []
    for task, score in zip(tasks, scores, strict=True):
        packed = prepared.pack(task)
        for index, judged in enumerate(_masks_for(made, task.task, task.shots)):
            under = evaluation.MaskScores(
                judged.name, judged.mask, score.logprobs[index], score.greedy[index]
            )
            fields = {
                "procedure": "greedy",
                "method": judged.method,
                "mask_task": judged.task,
                "mask_shots": judged.shots,
                "seed": judged.seed,
            }
            records = evaluation.evaluation_records(packed, under)
            found += [{**record, **fields} for record in records]
    results = blocks.frame("results", found, stamp(prepared, "prune"))
    shared = results.filter(pl.col("mask").is_in([mask.name for mask in made if mask.task == AGGREGATE]))
    return pl.concat([results, over_tasks(shared)])


@dataclass(frozen=True)
class FoundMasks:
    """What searches end with: masks and others of equal size, what they lose on the checking half, and
    warnings.
    """

    masks: tuple[MaskResult, ...]
    checked: list[dict[str, Any]]
    warnings: tuple[str, ...]


def search_masks(work: Work, rankings: Rankings) -> FoundMasks:
    """Run the greedy searches of every task and shot count, and of all tasks together, in lockstep.

    Each mask is compared with one by the gradient ranking and one drawn at random of equal size. `checked`:
    for run.json, what they lose on the checking half (`check_loss`, in the objective's unit).
    """
    prepared, options = work.prepared, work.prepared.options
    settings = {setting.mask_name("greedy"): setting for setting in settings_of(prepared)}
    scorer = _StepScorer(work, settings)
    plan = _search_plan(prepared)
    searches = {name: search.greedy_search(plan, options.tolerance) for name in settings}
    found = search.in_lockstep(searches, scorer.step)
    by_gradient = _gradient_masks(settings, found, rankings)
    compared = scorer.compare(
        {name: search.Request("check", (Mask(), mask)) for name, mask in by_gradient.items()}
    )
    made: list[MaskResult] = []
    checked: list[dict[str, Any]] = []
    for name, setting in settings.items():
        result = found[name]
        documents = sum(len(prepared.train[index].documents) for index in setting.tasks)
        blank = MaskResult("", Mask(), "", setting.task, setting.shots, documents)
        checked.append(_checked(setting, "greedy", result.lost, result.lost_stderr))
        returned, note = result.mask, ""
        if name in compared:
            lost, stderr = search.loss_with_stderr(*compared[name])
            checked.append(_checked(setting, "gradient", lost, stderr))
            gradient = setting.mask_name("gradient")
            made.append(replace(blank, name=gradient, mask=by_gradient[name], method="gradient"))
            if lost < result.lost:
                returned, note = by_gradient[name], INSTEAD
        made.append(replace(blank, name=name, mask=returned, method="greedy", note=note))
        skeleton, mask = prepared.skeleton, result.mask
        drawn = random_mask(skeleton.layers, skeleton.heads, len(mask.heads), len(mask.ffns), options.seed)
        name = setting.mask_name("random")
        made.append(replace(blank, name=name, mask=drawn, method="random", seed=options.seed))
    return FoundMasks(tuple(made), checked, tuple(_unsettled(found, options.tolerance)))


def _search_plan(prepared: Prepared) -> search.SearchPlan:
    skeleton, options = prepared.skeleton, prepared.options
    attention, projection, ffn = skeleton.weights_by_part
    return search.SearchPlan(
        skeleton.layers,
        skeleton.heads,
        options.direction,
        options.order,
        head_parameters=(attention + projection) // skeleton.heads,
        ffn_parameters=ffn,
    )


def _gradient_masks(
    settings: Mapping[str, Setting], found: Mapping[str, search.Pruned], rankings: Rankings
) -> dict[str, Mask]:
    """Return, for every search that has a gradient ranking, that ranking's mask of equal size."""
    masks = {}
    for name, setting in settings.items():
        key, mask = RankingKey(setting.task, setting.shots, "gradient"), found[name].mask
        if key in rankings.heads:
            heads = lowest_heads(rankings.heads[key], len(mask.heads))
            masks[name] = heads | lowest_ffns(rankings.ffns[key], len(mask.ffns))
    return masks


def _checked(setting: Setting, method: str, lost: float, stderr: float) -> dict[str, Any]:
    return {
        "task": setting.task,
        "shots": setting.shots,
        "method": method,
        "mask": setting.mask_name(method),
        "check_loss": lost,
        "stderr": stderr,
    }


def _unsettled(found: Mapping[str, search.Pruned], tolerance: float) -> list[str]:
    """Return a warning where the tolerance is finer than the documents can tell."""
    errors = {
        name: 2 * result.lost_stderr for name, result in found.items() if tolerance < 2 * result.lost_stderr
    }
    if not errors:
        return []
    worst = max(errors, key=lambda name: errors[name])
    return [
        f"prune: the tolerance {tolerance:g} is below two standard errors of the loss it is compared with "
        f"for {len(errors)} of {len(found)} masks (at most {errors[worst]:.2g}, {worst}); "
        "a larger --train-limit settles it"
    ]


class _StepScorer:
    """Scores what all searches ask for in one sweep; what two searches ask of a task is scored once."""

    def __init__(self, work: Work, settings: Mapping[str, Setting]) -> None:
        self._work, self._settings = work, settings

    def step(self, number: int, requests: Mapping[str, search.Request]) -> dict[str, search.Answer]:
        """Return the answers to the requests of all searches at a step."""
        return self._answers(f"prune-{number:05d}", f"prune, step {number + 1}", requests)

    def compare(
        self, requests: Mapping[str, search.Request]
    ) -> dict[str, tuple[search.Answer, search.Answer]]:
        """Return the answers to requests of two masks each, one by one."""
        answers = self._answers("prune-compared", "compare masks", requests) if requests else {}
        return {
            name: (tuple(group[:1] for group in answer), tuple(group[1:] for group in answer))
            for name, answer in answers.items()
        }

    def _answers(
        self, name: str, label: str, requests: Mapping[str, search.Request]
    ) -> dict[str, search.Answer]:
        asked: dict[tuple[int, search.Half], dict[Mask, int]] = {}
        for searcher, request in requests.items():
            for index in self._settings[searcher].tasks:
                masks = asked.setdefault((index, request.half), {})
                for mask in request.masks:
                    masks.setdefault(mask, len(masks))
        prepared = self._work.prepared
        part = step_part(prepared, name, label, {key: tuple(masks) for key, masks in asked.items()})
        objective = {
            key: self._objective(job, score)
            for key, job, score in zip(asked, part.jobs, self._work.sweep(part), strict=True)
        }
        return {
            searcher: tuple(
                objective[index, request.half][[asked[index, request.half][mask] for mask in request.masks]]
                for index in self._settings[searcher].tasks
            )
            for searcher, request in requests.items()
        }

    def _objective(self, job: MaskedDocuments, score: Scores) -> Values:
        """Return the objective of a job's documents under its masks, [M, N]."""
        task = replace(job.task, documents=job.task.documents[job.documents])
        scored = document_scores(task, score.logprobs, score.greedy)
        return scored[self._work.prepared.options.objective]
