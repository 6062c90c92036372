"""Masks of searches on the evaluation split: what they leave, what they lose there, and whether that keeps
the tolerance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.evaluate import measure as evaluation
from lowmem_icl.experiments.evaluate import stage as evaluate
from lowmem_icl.experiments.prune import measure
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.session.chunks import scores_by_task, sweep_in_chunks
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import MaskResult, stamp
from lowmem_icl.session.work import SweepPart, Work
from lowmem_icl.statistics.certificate import verdict
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.guessing import settings_at_chance

Record = Mapping[str, Any]


def judging_parts(prepared: Prepared, made: Sequence[MaskResult]) -> list[SweepPart]:
    """Return the sweeps of the evaluation documents under the masks made for their task, or for all, at their
    shot count.
    """
    tasks = prepared.evaluate
    masks = [[judged.mask for judged in _masks_for(made, task.task, task.shots)] for task in tasks]
    return sweep_in_chunks("prune-evaluate", "evaluate masks", tasks, masks, evaluate.CHUNK)


def _masks_for(made: Sequence[MaskResult], task: str, shots: int) -> list[MaskResult]:
    return [mask for mask in made if mask.shots == shots and mask.task in (task, AGGREGATE)]


@dataclass(frozen=True, eq=False)
class CleanEvaluation:
    """The scores of every task's evaluation documents under the clean model, and its evaluation with means
    over tasks.
    """

    scores: Sequence[Scores]
    results: pl.DataFrame


def clean_evaluation(work: Work) -> CleanEvaluation:
    """Evaluate the clean model; the evaluate stage mostly did."""
    prepared = work.prepared
    scores = _scores(work, evaluate.clean_parts(prepared, {}))
    found: list[blocks.Block] = []
    for task, score in zip(prepared.evaluate, scores, strict=True):
        under = evaluation.MaskScores(CLEAN, Mask(), score.logprobs[0], score.greedy[0])
        found += evaluation.evaluation_records(prepared.pack(task), under)
    clean = blocks.frame("results", found, stamp(prepared, "prune"))
    return CleanEvaluation(scores, pl.concat([clean, over_tasks(clean)]))


def judged(
    work: Work, made: Sequence[MaskResult], clean: CleanEvaluation
) -> tuple[pl.DataFrame, tuple[MaskResult, ...]]:
    """Return the evaluation of all masks, of those made for all tasks with means over tasks, and the masks
    with what they score.
    """
    prepared = work.prepared
    at_chance = settings_at_chance(clean.results)
    results = _mask_records(work, made, clean.scores)
    before, after = _by_setting(clean.results), _by_setting(results)
    per_task = (
        results.filter(pl.col("task") != AGGREGATE).group_by("mask").agg(pl.col("split").unique().sort())
    )
    splits = dict(per_task.select("mask", pl.col("split").list.join("/")).iter_rows())
    scored = []
    for mask in made:
        key = (mask.task, mask.shots)
        whole, left = before.get((*key, CLEAN), {}), after.get((*key, mask.name), {})
        scores = {
            "split": splits[mask.name],
            "before": {metric: record["value"] for metric, record in whole.items()},
            "after": {
                metric: record["value"] for metric, record in left.items() if not metric.endswith("_drop")
            },
            **loss_scores(prepared.options, left.get(f"{prepared.options.objective}_drop")),
            **({"at_chance": True} if key in at_chance else {}),
        }
        scored.append(replace(mask, scores=scores))
    return results, tuple(scored)


def loss_scores(options: RunOptions, lost: Record | None) -> dict[str, Any]:
    """Return what a mask file says of the objective lost, from its record: the loss paired with the clean
    run, the bounds of its interval, and whether these keep the tolerance.
    """
    low, high = (None, None) if lost is None else (lost["low"], lost["high"])
    return {
        "objective": options.objective,
        "tolerance": options.tolerance,
        "loss": None if lost is None else lost["value"],
        "interval": None if low is None or high is None else [low, high],
        "documents": None if lost is None else lost["documents"],
        "verdict": verdict(low, high, options.tolerance),
    }


def _scores(work: Work, sweeps: Sequence[SweepPart]) -> list[Scores]:
    return scores_by_task(work.prepared.evaluate, sweeps, [work.sweep(part) for part in sweeps])


def _by_setting(results: pl.DataFrame) -> dict[tuple[str, int, str], dict[str, Record]]:
    """Return records by metric, for every task, shot count and mask."""
    found: dict[tuple[str, int, str], dict[str, Record]] = {}
    for record in results.iter_rows(named=True):
        found.setdefault((record["task"], record["shots"], record["mask"]), {})[record["metric"]] = record
    return found


def _mask_records(work: Work, made: Sequence[MaskResult], clean: Sequence[Scores]) -> pl.DataFrame:
    """Return the evaluation of all masks, and of those made for all tasks the means over tasks."""
    prepared = work.prepared
    found: list[blocks.Block] = []
    scores = _scores(work, judging_parts(prepared, made))
    for task, whole, score in zip(prepared.evaluate, clean, scores, strict=True):
        packed, masks = prepared.pack(task), _masks_for(made, task.task, task.shots)
        unpruned = measure.scores_under_masks(packed, whole.logprobs[:1], whole.greedy[:1])
        pruned = measure.scores_under_masks(packed, score.logprobs, score.greedy)
        lost = measure.drop_records(packed, unpruned, pruned)
        for index, mask in enumerate(masks):
            under = evaluation.MaskScores(mask.name, mask.mask, score.logprobs[index], score.greedy[index])
            of_objective = lost[index][f"{prepared.options.objective}_drop"]
            records = [*evaluation.evaluation_records(packed, under), of_objective]
            found += [{**record, **mask_fields(mask)} for record in records]
    results = blocks.frame("results", found, stamp(prepared, "prune") | {"procedure": "greedy"})
    shared = results.filter(pl.col("mask").is_in([mask.name for mask in made if mask.task == AGGREGATE]))
    return pl.concat([results, over_tasks(shared)])


def mask_fields(mask: MaskResult) -> dict[str, Any]:
    """Return the columns that tell a search's mask from others."""
    return {
        "mask": mask.name,
        "method": mask.method,
        "mask_task": mask.task,
        "mask_shots": mask.shots,
        "heads_removed": len(mask.mask.heads),
        "ffns_removed": len(mask.mask.ffns),
        "seed": mask.seed,
    }
