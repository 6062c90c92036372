"""Pruning curves from scores under their masks: what is left and lost at every level, knees, and the random
control.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.experiments.prune.points import CurvePoint, TaskShots
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.session.result import task_fields
from lowmem_icl.statistics.intervals import CHANGE, MEAN, PROPORTION, SHARE, Intervals, Kind, mean_intervals
from lowmem_icl.tables.blocks import Block
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores, unit_accuracy

KNEE_POINTS = 0.01

Values = NDArray[np.float64]
Records = Iterator[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class ScoresUnderMasks:
    """Scores of a task's documents N under M masks, by metric [M, N]; accuracy [M, U] by scored unit, with
    its clusters.
    """

    by_document: dict[str, Values]
    accuracy: Values
    accuracy_clusters: list[str]

    def at(self, masks: Sequence[int]) -> "ScoresUnderMasks":
        """Return the scores under some of the masks, by their indices."""
        indices = np.asarray(masks, dtype=np.int64)
        by_document = {name: values[indices] for name, values in self.by_document.items()}
        return ScoresUnderMasks(by_document, self.accuracy[indices], self.accuracy_clusters)


def scores_under_masks(task: PackedTask, logprobs: Values, greedy: NDArray[np.bool_]) -> ScoresUnderMasks:
    """Return scores under masks from option scores [M, O]."""
    scores = document_scores(task.task, logprobs, greedy)
    accuracy, clusters = unit_accuracy(task.task, scores["acc"])
    return ScoresUnderMasks(scores, accuracy, clusters)


def point_records(
    task: PackedTask,
    points: Sequence[CurvePoint],
    clean: ScoresUnderMasks,
    pruned: ScoresUnderMasks,
) -> Records:
    """Yield the records of a task's curve points: scores, and paired drops from the clean run on the same
    documents.

    `clean` [1, …], `pruned` [P, …] in the order of the points. Intervals are over documents, clustered.
    """
    main = task.task.metric if task.task.metric in ("acc", "em") else "acc"
    values: dict[str, tuple[Values, Sequence[str], Kind]] = {
        main: (pruned.accuracy, pruned.accuracy_clusters, PROPORTION),
        "gold_logprob": (pruned.by_document["gold_logprob"], task.task.clusters, MEAN),
        "gold_prob": (pruned.by_document["gold_prob"], task.task.clusters, SHARE),
    }
    found = {metric: mean_intervals(*of_metric) for metric, of_metric in values.items()}
    own = TaskShots(task.task.task, task.task.shots)
    for metric, intervals in (found | drop_intervals(task, clean, pruned)).items():
        for index, point in enumerate(points):
            interval = {name: float(column[index]) for name, column in intervals._asdict().items()}
            chance = {"chance": task.task.chance if metric == main else None}
            yield task_fields(task.task) | point_fields(own, point) | interval | chance | {"metric": metric}


def drop_intervals(
    task: PackedTask, clean: ScoresUnderMasks, pruned: ScoresUnderMasks
) -> dict[str, Intervals]:
    """Return what is lost under each mask, clean minus pruned on the same documents, by the drop's metric."""
    lost = {"acc_drop": mean_intervals(clean.accuracy - pruned.accuracy, pruned.accuracy_clusters, CHANGE)}
    for metric in ("gold_logprob", "gold_prob"):
        by_document = clean.by_document[metric] - pruned.by_document[metric]
        lost[f"{metric}_drop"] = mean_intervals(by_document, task.task.clusters, MEAN)
    return lost


def point_fields(own: TaskShots, point: CurvePoint) -> dict[str, Any]:
    """Return the columns that tell a curve's point of a task from others."""
    donor = point.donor
    other = None if donor == own else donor
    return {
        "procedure": point.procedure,
        "method": point.method,
        "mask": point.name,
        "mask_task": None if donor is None or point.name == CLEAN else donor.task,
        "mask_shots": None if donor is None or point.name == CLEAN else donor.shots,
        "kind": point.kind,
        "percent": point.percent,
        "heads_removed": len(point.mask.heads),
        "ffns_removed": len(point.mask.ffns),
        "other_task": None if other is None else other.task,
        "other_shots": None if other is None else other.shots,
        "seed": point.seed,
        "exact": True,
    }


def effect_blocks(
    task: PackedTask, points: Sequence[CurvePoint], clean: ScoresUnderMasks, pruned: ScoresUnderMasks
) -> Iterator[Block]:
    """Yield blocks of effects.parquet, one per metric: a record per document and point that is also run on
    training.
    """
    kept = [index for index, point in enumerate(points) if point.on_training and point.percent]
    documents = np.array([document.index for document in task.task.documents])
    for metric in ("acc", "gold_logprob") if kept else ():
        values = clean.by_document[metric] - pruned.by_document[metric][kept]
        yield {
            "experiment": "prune",
            "task": task.task.task,
            "shots": task.task.shots,
            "split": task.task.split,
            "document": np.tile(documents, len(kept)),
            "mask": np.repeat([points[index].name for index in kept], len(documents)),
            "metric": f"{metric}_drop",
            "value": values.ravel(),
        }


def knee(levels: Sequence[int], drops: Values, errors: Values) -> int:
    """Return the largest level whose drop of accuracy is within one standard error and at most one point;
    else 0.

    drops, errors: [levels], fractions; an unknown standard error does not excuse a drop.
    """
    within = np.nan_to_num(errors)
    kept = [
        level
        for level, drop, error in zip(levels, drops, within, strict=True)
        if drop <= error and drop <= KNEE_POINTS
    ]
    return max(kept, default=0)


def knee_records(chosen_on: Sequence[Mapping[str, Any]], reported: Sequence[Mapping[str, Any]]) -> Records:
    """Yield the knee of every curve: chosen on training records, reported on evaluation records.

    metric `knee`: value the percentage removed; `knee_acc_drop`: what that costs on the evaluation documents,
    which are the ones that `split` and `documents` of both tell.
    """
    fields = ("procedure", "task", "shots", "method", "kind", "other_task", "other_shots")
    curves: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in chosen_on:
        if record["metric"] == "acc_drop":
            curves.setdefault(tuple(record[field] for field in fields), []).append(record)
    costs = {
        (*(record[field] for field in fields), record["percent"]): record
        for record in reported
        if record["metric"] == "acc_drop"
    }
    for key, members in curves.items():
        drops, errors = (
            np.array([member[name] for member in members], dtype=np.float64) for name in ("value", "stderr")
        )
        level = knee([member["percent"] for member in members], drops, errors)
        cost = costs.get((*key, level))
        if cost is None:
            continue
        same = (
            "percent",
            "split",
            "documents",
            "mask",
            "mask_task",
            "mask_shots",
            "heads_removed",
            "ffns_removed",
        )
        base = dict(zip(fields, key, strict=True)) | {name: cost[name] for name in same} | {"exact": True}
        yield base | {"metric": "knee", "value": float(level)}
        yield (
            base
            | {"metric": "knee_acc_drop"}
            | {name: cost[name] for name in ("value", "stderr", "low", "high")}
        )


def control_records(records: Sequence[Mapping[str, Any]]) -> Records:
    """Yield mean and band of the random control over its draws: `low, high` hold 95 % of the draws, `stderr`
    is the mean's.
    """
    fields = (
        "procedure", "task", "shots", "split", "kind", "percent", "metric", "heads_removed", "ffns_removed",
        "documents",
    )  # fmt: skip
    draws: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        if record["method"] == "random":
            draws.setdefault(tuple(record[field] for field in fields), []).append(record)
    for key, members in draws.items():
        values = np.array([member["value"] for member in members])
        low, high = np.quantile(values, [0.025, 0.975])
        spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        yield dict(zip(fields, key, strict=True)) | {
            "method": "random",
            "value": float(values.mean()),
            "stderr": float(spread),
            "low": float(low),
            "high": float(high),
            "chance": members[0].get("chance"),
            "exact": True,
        }
