"""The curves of the prune stage: all levels of all curves as variants of one sweep, judged on evaluation documents."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.experiments.evaluate import measure as evaluate
from lowmem_icl.experiments.prune import curves
from lowmem_icl.experiments.prune.curves import CurvePoint, Rankings, TaskShots
from lowmem_icl.experiments.prune.rescoring import rescored_points
from lowmem_icl.masks.mask import Mask, all_ffns
from lowmem_icl.masks.rankings import RankingKey, mean_of_ranks
from lowmem_icl.options import RunOptions
from lowmem_icl.session.work import AGGREGATE, EVALUATE_CHUNK, Gathered, MadeMask, Row, Work
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.sources import in_domain

MEAN_FIELDS = (
    "shots", "method", "kind", "k", "heads_removed", "ffns_removed", "other_task", "other_shots", "seed", "split",
)  # fmt: skip


def run_curves(work: Work, gathered: Gathered) -> None:
    """Prune by every ranking asked for, level by level, and find the knees."""
    if not work.options.curves:
        return
    rankings = _rankings(work, gathered)
    if not rankings.heads:
        gathered.warnings.append(
            "prune: curves remove units by their importance; run them with importance among --experiments"
        )
        return
    points = points_of(work.options, work.prepared.curves, rankings)
    if work.options.rescore:
        for of_task, rescored in zip(points, rescored_points(work, rankings), strict=True):
            of_task += rescored
    judged = [[point for point in of_task if point.judged] for of_task in points]
    reported = _with_means(_rows(work, gathered, "curves", work.prepared.curves, points))
    chosen_on = _with_means(_rows(work, gathered, "curves-train", work.prepared.train, judged))
    rows = [*reported, *curves.control_rows(reported), *curves.knees(chosen_on, reported)]
    gathered.results["prune"] += [{"experiment": "prune"} | row for row in rows]
    gathered.masks += _made_masks(work, points, reported)


def points_of(options: RunOptions, tasks: Sequence[TaskRows], rankings: Rankings) -> list[list[CurvePoint]]:
    """Return the curves' points of every task and shot count."""
    return [
        list(
            curves.curve_points(
                TaskShots(task.task, task.shots),
                options.curves,
                rankings,
                options.resolved_shots,
                options.random_draws,
                options.seed,
            )
        )
        for task in tasks
    ]


def _with_means(rows: list[Row]) -> list[Row]:
    """Return rows and their means over the tasks that the paper's aggregate is of."""
    shared: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if not in_domain(row["task"]):
            continue
        if row["method"] in curves.TRANSFERS or row["other_task"] == row["task"]:
            # The donor is another one for every task: their mean is over donors chosen by one rule.
            row = row | {"other_task": None}
        # Where there are few units, neighbouring levels remove the same and count once.
        shared[(row["task"], row["metric"], *(row[field] for field in MEAN_FIELDS))] = row
    means = list(evaluate.mean_over_tasks(list(shared.values()), MEAN_FIELDS))
    named = {
        tuple(row[field] for field in MEAN_FIELDS): row["mask"]
        for row in shared.values()
        if row["other_task"] == AGGREGATE or row["method"] == "random"
    }
    return rows + [row | {"mask": named.get(tuple(row[field] for field in MEAN_FIELDS))} for row in means]


def _rankings(work: Work, gathered: Gathered) -> Rankings:
    """Return what there is to prune by; FFNs by the oracle where each was removed alone, else by their gradients."""
    exact = {key: scores for key, scores in gathered.ffn_rankings.items() if key.method == "ablation"}
    if work.options.protocol_choices.ffns_by_evaluation and exact:
        exact = _ffns_by_evaluation(work)
    ffns = dict(gathered.ffn_rankings) | exact
    method = "ablation" if exact else "gradient"
    for shots in work.options.resolved_shots if exact else ():
        members = [scores for key, scores in exact.items() if key.shots == shots and in_domain(key.task)]
        if len(members) > 1:
            ffns[RankingKey(AGGREGATE, shots, method)] = mean_of_ranks(members)
    donors = tuple(dict.fromkeys(task.task for task in work.prepared.train if in_domain(task.task)))
    return Rankings(gathered.rankings, ffns, method, AGGREGATE, donors)


def _ffns_by_evaluation(work: Work) -> dict[RankingKey, NDArray[np.float64]]:
    """Return what removing each FFN costs in accuracy on the documents that curves are judged on, by task, [L]."""
    tasks = work.prepared.curves
    masks = (Mask(), *(unit.as_mask() for unit in all_ffns(work.model.skeleton.layers)))
    scores = work.sweep_in_chunks(
        "prune", "curves-ffns", "FFNs removed alone", tasks, [masks] * len(tasks), EVALUATE_CHUNK
    )
    rankings = {}
    for task, score in zip(tasks, scores, strict=True):
        under = curves.under_masks(work.prepared.pack(task), score.logprobs, score.greedy)
        lost = under.accuracy[0].mean() - under.accuracy[1:].mean(1)
        rankings[RankingKey(task.task, task.shots, "ablation")] = lost
    return rankings


def _rows(
    work: Work,
    gathered: Gathered,
    name: str,
    tasks: Sequence[TaskRows],
    points: Sequence[Sequence[CurvePoint]],
) -> list[Row]:
    """Sweep every task under its points' masks, each mask once, and return the points' rows."""
    masks = [tuple(dict.fromkeys([Mask(), *(point.mask for point in of_task)])) for of_task in points]
    scores = work.sweep_in_chunks("prune", name, "pruning curves", tasks, masks, EVALUATE_CHUNK)
    rows: list[Row] = []
    for task, of_task, of_masks, score in zip(tasks, points, masks, scores, strict=True):
        packed = work.prepared.pack(task)
        under = curves.under_masks(packed, score.logprobs, score.greedy)
        place = {mask: number for number, mask in enumerate(of_masks)}
        chosen = np.array([place[point.mask] for point in of_task], dtype=np.int64)
        clean, pruned = under.at(np.zeros(1, dtype=np.int64)), under.at(chosen)
        rows += curves.point_rows(packed, of_task, clean, pruned, work.options.seed)
        gathered.effects.setdefault("prune", [])
        gathered.effects["prune"] += curves.effect_columns(packed, of_task, clean, pruned)
    return rows


def _made_masks(
    work: Work, points: Sequence[Sequence[CurvePoint]], reported: Sequence[Row]
) -> list[MadeMask]:
    """Return the masks of all levels, with what they leave of the task (or of all tasks) that they were made for."""
    scores: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in reported:
        if row["mask"] is not None:
            scores.setdefault((row["task"], row["shots"], row["mask"]), {})[row["metric"]] = row["value"]
    splits = {(row["task"], row["shots"]): row.get("split") for row in reported}
    train = {(task.task, task.shots): len(task.documents) for task in work.prepared.train}
    documents = {
        shots: sum(count for (_, of), count in train.items() if of == shots)
        for shots in work.options.resolved_shots
    }
    made: dict[str, MadeMask] = {}
    for task, of_task in zip(work.prepared.curves, points, strict=True):
        for point in of_task:
            if point.name == curves.CLEAN or point.name in made:
                continue
            # Random draws are the same for all tasks; they say what they leave of the first.
            name, shots = point.donor or TaskShots(task.task, task.shots)
            after = scores.get((name, shots, point.name), {})
            made[point.name] = MadeMask(
                point.name,
                point.mask,
                point.method.partition("-")[0],
                name,
                shots,
                train.get((name, shots), documents[shots]),
                point.seed,
                {
                    "split": splits.get((name, shots)),
                    "before": {
                        metric: after[metric] + after[f"{metric}_drop"]
                        for metric in ("acc", "gold_logprob", "gold_prob")
                        if metric in after
                    },
                    "after": {
                        metric: value for metric, value in after.items() if not metric.endswith("_drop")
                    },
                },
            )
    return list(made.values())
