"""The curves of the prune stage: all levels of all curves as variants of one sweep, judged on evaluation
documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.evaluate.stage import CHUNK
from lowmem_icl.experiments.prune import measure, rescoring
from lowmem_icl.experiments.prune.judging import (
    CleanEvaluation,
    Record,
    loss_scores,
)
from lowmem_icl.experiments.prune.points import (
    LEVELS_BY_NAME,
    CurveOptions,
    CurvePoint,
    CurveRankings,
    TaskShots,
    curve_points,
)
from lowmem_icl.masks.mask import Mask, all_ffns
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.masks.rankings import RankingKey, mean_of_ranks
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.chunks import scores_by_task, sweep_in_chunks
from lowmem_icl.session.fills import fill_for, filled
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import MaskResult, Rankings, StageResult, Values, stamp
from lowmem_icl.session.work import Part, SweepPart, Work
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.guessing import settings_at_chance
from lowmem_icl.tasks.loading import TaskRows

NO_RANKINGS = "prune: curves remove units by their importance; run them with importance among --experiments"

PART = "curves"

Points = list[list[CurvePoint]]

# By a task's metric, what it lost; a task's own metric counts as its accuracy.
DROPS = {
    "acc": "acc_drop",
    "em": "acc_drop",
    "gold_logprob": "gold_logprob_drop",
    "gold_prob": "gold_prob_drop",
}


def parts(prepared: Prepared, rankings: Rankings) -> list[Part]:
    """Return the work of all curves asked for by these rankings."""
    if not prepared.options.curves or not rankings.heads:
        return []
    ffn_sweeps = _ffn_parts(prepared) if _ranks_ffns_by_evaluation(prepared, rankings) else []
    own = curve_rankings(prepared, rankings, {})
    points = _points(prepared, own)
    levels: list[Part] = []
    if prepared.options.rescore:
        nothing_known = [Mask()] * len(prepared.importance)
        levels += [
            rescoring.level_part(prepared, level, nothing_known) for level in rescoring.RESCORED_LEVELS
        ]
        for task_points, rescored in zip(points, rescoring.expected_points(prepared, own), strict=True):
            task_points += rescored
    sweeps = [*_sweeps(prepared, points), *_training_sweeps(prepared, points)]
    return [*ffn_sweeps, *levels, *sweeps]


def run(work: Work, rankings: Rankings, clean: CleanEvaluation) -> StageResult:
    """Prune by every ranking asked for, level by level, and find the knees."""
    prepared = work.prepared
    if not prepared.options.curves:
        return StageResult()
    if not rankings.heads:
        return StageResult(warnings=(NO_RANKINGS,))
    by_evaluation = _ffns_by_evaluation(work) if _ranks_ffns_by_evaluation(prepared, rankings) else {}
    own = curve_rankings(prepared, rankings, by_evaluation)
    points = _points(prepared, own)
    if prepared.options.rescore:
        for task_points, rescored in zip(points, rescoring.rescored_points(work, own), strict=True):
            task_points += rescored
    reported = _curve_records(work, prepared.curves, points, _sweeps(prepared, points))
    training = _on_training(points)
    chosen_on = _curve_records(work, prepared.train, training, _training_sweeps(prepared, points))
    found = [
        *measure.control_records(reported.control.to_dicts(), reported.records),
        *measure.knee_records(chosen_on.records, reported.records),
    ]
    results = pl.concat([reported.results, blocks.frame("results", found, stamp(prepared, "prune"))])
    return StageResult(
        results=results,
        effects=pl.concat([reported.effects, chosen_on.effects]),
        masks=tuple(_mask_results(prepared, points, reported.records, clean.results)),
    )


def curve_rankings(
    prepared: Prepared, rankings: Rankings, by_evaluation: Mapping[RankingKey, Values]
) -> CurveRankings:
    """Return what there is to prune by; FFNs by the oracle where each was removed alone, else by their
    gradients.
    """
    exact = {key: scores for key, scores in rankings.ffns.items() if key.method == "ablation"}
    exact = dict(by_evaluation) or exact
    ffns = {**rankings.ffns, **exact}
    method = "ablation" if exact else "gradient"
    for shots in prepared.options.resolved_shots if exact else ():
        members = [scores for key, scores in exact.items() if key.shots == shots and in_domain(key.task)]
        if len(members) > 1:
            ffns[RankingKey(AGGREGATE, shots, method)] = mean_of_ranks(members)
    donors = tuple(dict.fromkeys(task.task for task in prepared.train if in_domain(task.task)))
    return CurveRankings(rankings.heads, ffns, method, donors)


def _points(prepared: Prepared, rankings: CurveRankings) -> Points:
    """Return the curves' points of every task and shot count."""
    options = prepared.options
    levels = LEVELS_BY_NAME[options.curve_levels]
    curves = CurveOptions(options.curves, options.resolved_shots, options.random_draws, options.seed, levels)
    return [
        [_filled(options, own, point) for point in curve_points(own, curves, rankings)]
        for own in (TaskShots(task.task, task.shots) for task in prepared.curves)
    ]


def _filled(options: RunOptions, own: TaskShots, point: CurvePoint) -> CurvePoint:
    """Return a point with what stands in its units' place: that of the task whose ranking it is, or, of a
    random draw, of the task itself.
    """
    fill = fill_for(options, *(point.donor or own))
    return replace(point, mask=point.mask.filled(fill)) if point.mask and fill else point


def _on_training(points: Points) -> Points:
    """Return the points that knees are chosen from."""
    return [[point for point in task_points if point.on_training] for task_points in points]


def _masks(points: Points) -> list[tuple[Mask, ...]]:
    """Return the masks of every task's points, the clean run first, each once."""
    return [tuple(dict.fromkeys([Mask(), *(point.mask for point in task_points)])) for task_points in points]


def _sweeps(prepared: Prepared, points: Points) -> list[SweepPart]:
    return sweep_in_chunks(PART, "pruning curves", prepared.curves, _masks(points), CHUNK)


def _training_sweeps(prepared: Prepared, points: Points) -> list[SweepPart]:
    masks = _masks(_on_training(points))
    return sweep_in_chunks(f"{PART}-train", "knees of pruning curves", prepared.train, masks, CHUNK)


def _ranks_ffns_by_evaluation(prepared: Prepared, rankings: Rankings) -> bool:
    """Tell whether the protocol ranks FFNs on the documents that curves are judged on, instead of where each
    was removed.
    """
    asked = prepared.options.protocol_flags.ffns_by_evaluation
    return asked and any(key.method == "ablation" for key in rankings.ffns)


def _ffn_parts(prepared: Prepared) -> list[SweepPart]:
    alone = [unit.as_mask() for unit in all_ffns(prepared.skeleton.layers)]
    tasks = prepared.curves
    masks = [(Mask(), *(filled(prepared.options, task, mask) for mask in alone)) for task in tasks]
    return sweep_in_chunks(f"{PART}-ffns", "FFNs removed alone", tasks, masks, CHUNK)


def _ffns_by_evaluation(work: Work) -> dict[RankingKey, Values]:
    """Return what removing each FFN costs in accuracy on the documents that curves are judged on, by task,
    [L].
    """
    tasks = work.prepared.curves
    rankings = {}
    for task, score in zip(tasks, _scores(work, tasks, _ffn_parts(work.prepared)), strict=True):
        under = measure.scores_under_masks(work.prepared.pack(task), score.logprobs, score.greedy)
        lost = under.accuracy[0].mean() - under.accuracy[1:].mean(1)
        rankings[RankingKey(task.task, task.shots, "ablation")] = lost
    return rankings


def _scores(work: Work, tasks: Sequence[TaskRows], sweeps: Sequence[SweepPart]) -> list[Scores]:
    return scores_by_task(tasks, sweeps, [work.sweep(part) for part in sweeps])


@dataclass(frozen=True)
class _CurveRecords:
    """The records of curves on some documents, with their means over tasks, what each document lost, and the
    means over random draws.
    """

    results: pl.DataFrame
    effects: pl.DataFrame
    control: pl.DataFrame

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.results.to_dicts()


def _curve_records(
    work: Work, tasks: Sequence[TaskRows], points: Points, sweeps: Sequence[SweepPart]
) -> _CurveRecords:
    """Sweep every task under its points' masks, each mask once, and return the points' records."""
    prepared = work.prepared
    found: list[blocks.Block] = []
    effects: list[blocks.Block] = []
    control: list[blocks.Block] = []
    scores = _scores(work, tasks, sweeps)
    for task, task_points, masks, score in zip(tasks, points, _masks(points), scores, strict=True):
        packed = prepared.pack(task)
        under = measure.scores_under_masks(packed, score.logprobs, score.greedy)
        index = {mask: number for number, mask in enumerate(masks)}
        clean, pruned = under.at([0]), under.at([index[point.mask] for point in task_points])
        found += measure.point_records(packed, task_points, clean, pruned)
        effects += measure.effect_blocks(packed, task_points, clean, pruned)
        control += measure.control_means(packed, task_points, clean, pruned)
    results, means = (blocks.frame("results", of, stamp(prepared, "prune")) for of in (found, control))
    return _CurveRecords(
        pl.concat([results, over_tasks(results)]),
        blocks.frame("effects", effects),
        pl.concat([means, over_tasks(means)]),
    )


def _mask_results(
    prepared: Prepared, points: Points, reported: Sequence[Record], clean: pl.DataFrame
) -> list[MaskResult]:
    """Return the masks of all levels, with what they leave of the task (or of all tasks) that they were made
    for; clean: the clean model's evaluation.
    """
    scores: dict[tuple[str, int, str], dict[str, Record]] = {}
    for record in reported:
        if record["mask"] is not None:
            scores.setdefault((record["task"], record["shots"], record["mask"]), {})[record["metric"]] = (
                record
            )
    at_chance = settings_at_chance(clean)
    splits = {(record["task"], record["shots"]): record["split"] for record in reported}
    train = {(task.task, task.shots): len(task.documents) for task in prepared.train}
    made: dict[str, MaskResult] = {}
    for task, task_points in zip(prepared.curves, points, strict=True):
        for point in task_points:
            if point.name == CLEAN or point.name in made:
                continue
            # Random draws are the same for all tasks; they say what they leave of the first.
            name, shots = point.donor or TaskShots(task.task, task.shots)
            every = sum(
                count
                for (task_name, task_shots), count in train.items()
                if task_shots == shots and in_domain(task_name)
            )
            records = scores.get((name, shots, point.name), {})
            after = {metric: record["value"] for metric, record in records.items()}
            judged = {
                "split": splits.get((name, shots)),
                "before": {
                    metric: after[metric] + after[DROPS[metric]] for metric in DROPS if metric in after
                },
                "after": {metric: value for metric, value in after.items() if not metric.endswith("_drop")},
                **loss_scores(prepared.options, records.get(f"{prepared.options.objective}_drop")),
                **({"at_chance": True} if (name, shots) in at_chance else {}),
            }
            made[point.name] = MaskResult(
                point.name,
                point.mask,
                point.ranking,
                name,
                shots,
                train.get((name, shots), every),
                point.seed,
                judged,
            )
    return list(made.values())
