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
from lowmem_icl.statistics.bands import prediction_band
from lowmem_icl.statistics.intervals import CHANGE, MEAN, PROPORTION, SHARE, Intervals, Kind, mean_intervals
from lowmem_icl.tables.blocks import Block
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores, unit_accuracy

KNEE_POINTS = 0.01
RANGES = {"acc": (0, 1), "em": (0, 1), "gold_prob": (0, 1)}
"""Of metrics that have bounds: no band goes beyond."""
CURVE_FIELDS = ("procedure", "task", "shots", "method", "kind", "other_task", "other_shots")
LEVEL_FIELDS = (
    *CURVE_FIELDS, "percent", "split", "documents", "mask", "mask_task", "mask_shots", "heads_removed",
    "ffns_removed",
)  # fmt: skip
CONTROL_FIELDS = (
    "procedure", "task", "shots", "split", "kind", "percent", "metric", "heads_removed", "ffns_removed",
    "documents",
)  # fmt: skip

Values = NDArray[np.float64]
Record = Mapping[str, Any]
Records = Iterator[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class ScoresUnderMasks:
    """Scores of a task's documents N under M masks, by metric [M, N]; accuracy [M, U] by scored unit, with
    its clusters.
    """

    by_document: dict[str, Values]
    accuracy: Values
    accuracy_clusters: list[str]

    def has(self, metric: str) -> bool:
        """Tell whether every document has a metric; with one option there is no gold_prob."""
        return not np.isnan(self.by_document[metric]).any()

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
    }
    if clean.has("gold_prob"):
        values["gold_prob"] = (pruned.by_document["gold_prob"], task.task.clusters, SHARE)
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
        if not clean.has(metric):
            continue
        by_document = clean.by_document[metric] - pruned.by_document[metric]
        lost[f"{metric}_drop"] = mean_intervals(by_document, task.task.clusters, MEAN)
    return lost


def drop_records(
    task: PackedTask, clean: ScoresUnderMasks, pruned: ScoresUnderMasks
) -> list[dict[str, dict[str, Any]]]:
    """Return what a task loses under each mask, paired with the clean run, as records by the drop's
    metric.
    """
    lost, base = drop_intervals(task, clean, pruned), task_fields(task.task) | {"exact": True}
    return [
        {
            metric: base
            | {"metric": metric}
            | {name: float(column[index]) for name, column in intervals._asdict().items()}
            for metric, intervals in lost.items()
        }
        for index in range(len(pruned.accuracy))
    ]


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


def knee(levels: Sequence[int], lows: Values) -> int:
    """Return the last level before the first that credibly loses over KNEE_POINTS; or 0.

    lows: the lower bounds of the losses' 95 % intervals [levels], fractions; an unknown one (NaN) ends it.
    """
    return _last_before(levels, ~(lows <= KNEE_POINTS))


def certain_knee(levels: Sequence[int], highs: Values) -> int:
    """Return the last level before the first that does not credibly keep within it; or 0.

    highs: the upper bounds of the losses' 95 % intervals [levels], fractions; an unknown one shows nothing.
    """
    return _last_before(levels, ~(highs <= KNEE_POINTS))


def _last_before(levels: Sequence[int], ends: NDArray[np.bool_]) -> int:
    first = next((index for index, is_over in enumerate(ends) if is_over), len(levels))
    return levels[first - 1] if first else 0


def knee_records(chosen_on: Sequence[Record], reported: Sequence[Record]) -> Records:
    """Yield the knees of every curve: chosen on training records, reported on evaluation records.

    metric `knee`, `knee_certain`: value the percentage removed; between these two the last level that keeps
    within KNEE_POINTS lies. `knee_acc_drop`: what the first of them costs on the evaluation documents, which
    are the ones that `split` and `documents` of all three tell.
    """
    curves: dict[tuple[Any, ...], list[Record]] = {}
    for record in chosen_on:
        if record["metric"] == "acc_drop":
            curves.setdefault(tuple(record[field] for field in CURVE_FIELDS), []).append(record)
    costs = {
        (*(record[field] for field in CURVE_FIELDS), record["percent"]): record
        for record in reported
        if record["metric"] == "acc_drop"
    }
    for key, members in curves.items():
        levels = [member["percent"] for member in members]
        lows, highs = (
            np.array([member[name] for member in members], dtype=np.float64) for name in ("low", "high")
        )
        for metric, level in (("knee", knee(levels, lows)), ("knee_certain", certain_knee(levels, highs))):
            cost = costs.get((*key, level))
            if cost is None:
                continue
            base = {name: cost[name] for name in LEVEL_FIELDS} | {"exact": True}
            yield base | {"metric": metric, "value": float(level)}
            if metric == "knee":
                lost = {name: cost[name] for name in ("value", "stderr", "low", "high")}
                yield base | {"metric": "knee_acc_drop"} | lost


def control_means(
    task: PackedTask, points: Sequence[CurvePoint], clean: ScoresUnderMasks, pruned: ScoresUnderMasks
) -> Records:
    """Yield the means over random draws at every level, with the error that the choice of documents makes.

    `clean` [1, …], `pruned` [P, …] in the order of the points. All draws are judged on the same documents, so
    the error is that of every document's mean over draws.
    """
    levels: dict[tuple[Any, ...], list[int]] = {}
    for index, point in enumerate(points):
        if point.method == "random":
            levels.setdefault((point.kind, point.percent), []).append(index)
    for indices in levels.values():
        draws = pruned.at(indices)
        by_document = {name: values.mean(0, keepdims=True) for name, values in draws.by_document.items()}
        mean = ScoresUnderMasks(by_document, draws.accuracy.mean(0, keepdims=True), draws.accuracy_clusters)
        for record in point_records(task, [points[indices[0]]], clean, mean):
            yield record | {"mask": None, "seed": None}


def control_records(means: Sequence[Record], records: Sequence[Record]) -> Records:
    """Yield the means of the random control with a band that holds the next random mask in 95 % of cases.

    means: those of `control_means`; records: those of the draws among them. `stderr` is the mean's and counts
    both sources, draws and documents, added as squares, which is rather too much: the draws' spread holds
    some of the documents' as well. `low, high` are the band's, not the mean's; NaN where draws are too few.
    """
    draws: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        if record["method"] == "random":
            draws.setdefault(tuple(record[field] for field in CONTROL_FIELDS), []).append(record["value"])
    for mean in means:
        values = np.array(draws[tuple(mean[field] for field in CONTROL_FIELDS)])
        low, high = prediction_band(values, *RANGES.get(mean["metric"], (-np.inf, np.inf)))
        spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        by_documents = np.nan if mean["stderr"] is None else mean["stderr"]
        yield {name: mean[name] for name in CONTROL_FIELDS} | {
            "method": "random",
            "value": mean["value"],
            "stderr": float(np.hypot(spread, by_documents)),
            "low": low,
            "high": high,
            "chance": mean["chance"],
            "exact": True,
        }
