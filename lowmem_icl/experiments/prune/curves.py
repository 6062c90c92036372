"""Pruning curves: which masks they are made of, and from the scores under these masks to rows, drops and knees.

A curve removes ever more of the least important units, ⌊p·n/100⌋ of n at p per cent, by one ranking of the intact model
(Bansal et al. 2023, section 5); its levels are masks, so all curves of a task are one sweep.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Kind, Mask
from lowmem_icl.masks.naming import mask_name
from lowmem_icl.masks.rankings import RankingKey, lowest_ffns, lowest_heads, random_mask, removed_count
from lowmem_icl.statistics.agreement import spearman
from lowmem_icl.statistics.intervals import means_with_intervals
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores, unit_accuracy

CLEAN = "clean"
LEVELS = tuple(range(0, 100, 10))
TRANSFER_LEVELS = (10, 30, 50, 70, 90)
GRID_HEADS = tuple(range(0, 80, 10))
GRID_FFNS = tuple(range(0, 60, 10))
KNEE_POINTS = 0.01
# Pruned by the ranking of the task that agrees most, or least, with one's own.
TRANSFERS = ("gradient-highest", "gradient-lowest")

Values = NDArray[np.float64]


class TaskShots(NamedTuple):
    """A task at a shot count."""

    task: str
    shots: int


@dataclass(frozen=True)
class CurvePoint:
    """One level of one curve: what is removed, and by whose ranking.

    `kind` is null where heads and FFNs are removed together. `percent`: of the heads, or of the FFNs where only these
    go; `donor`: whose ranking it is, where that is not the task's own; `judged`: whether it also runs on the training
    documents, where knees are chosen.
    """

    name: str
    mask: Mask
    method: str
    kind: Kind | None
    percent: int
    donor: TaskShots | None = None
    seed: int | None = None
    judged: bool = False

    @property
    def curve(self) -> tuple[str, Kind | None, TaskShots | None]:
        """What the points of one curve have in common."""
        return self.method, self.kind, self.donor


@dataclass(frozen=True, eq=False)
class Rankings:
    """Scores by task, shot count and method: of heads [L, H] and of FFNs [L]; higher is more important.

    `aggregate` names the ranking of all tasks; `ffn_method` the method by which FFNs are ranked; `donors` are the tasks
    whose rankings others may be pruned by.
    """

    heads: Mapping[RankingKey, Values]
    ffns: Mapping[RankingKey, Values]
    ffn_method: str
    aggregate: str
    donors: tuple[str, ...]


def curve_points(
    of: TaskShots,
    curves: Sequence[str],
    rankings: Rankings,
    shots: Sequence[int],
    random_draws: int,
    seed: int,
) -> Iterator[CurvePoint]:
    """Yield the points of all curves asked for of one task and shot count.

    `curves`, of: heads, ffns, combined, transfer, cross-shot, random. A curve whose ranking is missing is left out.
    """
    own, shared = TaskShots(of.task, of.shots), TaskShots(rankings.aggregate, of.shots)
    if "heads" in curves:
        yield from _of_heads("gradient", own, own, LEVELS, rankings, judged=True)
        yield from _of_heads("gradient", own, shared, LEVELS, rankings, judged=True)
        yield from _of_heads("icl_effect", own, own, TRANSFER_LEVELS, rankings)
    if "ffns" in curves:
        yield from _of_ffns(own, own, rankings)
        yield from _of_ffns(own, shared, rankings)
    if "combined" in curves:
        yield from _grid(own, shared, rankings)
    if "transfer" in curves:
        for method, task in transfer_donors(of, rankings).items():
            donor = TaskShots(task, of.shots)
            yield from _of_heads("gradient", own, donor, TRANSFER_LEVELS, rankings, called=method)
    if "cross-shot" in curves:
        for count in shots:
            if count != of.shots:
                donor = TaskShots(of.task, count)
                yield from _of_heads("gradient", own, donor, TRANSFER_LEVELS, rankings)
    if "random" in curves:
        yield from _random(rankings, random_draws, seed)


def _of_heads(
    method: str,
    own: TaskShots,
    donor: TaskShots,
    levels: Sequence[int],
    rankings: Rankings,
    *,
    called: str | None = None,
    judged: bool = False,
) -> Iterator[CurvePoint]:
    scores = rankings.heads.get(RankingKey(*donor, method))
    if scores is None:
        return
    for percent in levels:
        yield CurvePoint(
            mask_name(f"{method}-heads-{percent}", *donor) if percent else CLEAN,
            lowest_heads(scores, removed_count(percent, scores.size)),
            called or method,
            "head",
            percent,
            donor=None if donor == own else donor,
            judged=judged,
        )


def _of_ffns(own: TaskShots, donor: TaskShots, rankings: Rankings) -> Iterator[CurvePoint]:
    scores = rankings.ffns.get(RankingKey(*donor, rankings.ffn_method))
    if scores is None:
        return
    for percent in LEVELS:
        yield CurvePoint(
            mask_name(f"{rankings.ffn_method}-ffns-{percent}", *donor) if percent else CLEAN,
            lowest_ffns(scores, removed_count(percent, scores.size)),
            rankings.ffn_method,
            "ffn",
            percent,
            donor=None if donor == own else donor,
            judged=True,
        )


def _grid(own: TaskShots, shared: TaskShots, rankings: Rankings) -> Iterator[CurvePoint]:
    """Yield the grid of heads and FFNs by the rankings of all tasks (the paper's figure 7), or by its own if alone."""
    for donor in (shared, own):
        heads = rankings.heads.get(RankingKey(*donor, "gradient"))
        ffns = rankings.ffns.get(RankingKey(*donor, rankings.ffn_method))
        if heads is None or ffns is None:
            continue
        for percent in GRID_HEADS:
            for of_ffns in GRID_FFNS:
                removed_heads = lowest_heads(heads, removed_count(percent, heads.size))
                removed_ffns = lowest_ffns(ffns, removed_count(of_ffns, ffns.size))
                yield CurvePoint(
                    mask_name(f"combined-heads-{percent}-ffns-{of_ffns}", *donor)
                    if percent or of_ffns
                    else CLEAN,
                    removed_heads | removed_ffns,
                    "combined",
                    None,
                    percent,
                    donor=None if donor == own else donor,
                )
        return


def transfer_donors(of: TaskShots, rankings: Rankings) -> dict[str, str]:
    """Return the tasks whose gradient ranking agrees most and least with a task's own, by the curve's method.

    The paper took them from a list; here rank correlations choose. Empty with fewer than two other tasks.
    """
    own = rankings.heads.get(RankingKey(*of, "gradient"))
    if own is None or of.task not in rankings.donors:
        return {}
    agreement = {
        task: spearman(own.ravel(), other.ravel())
        for task in rankings.donors
        if task != of.task
        and (other := rankings.heads.get(RankingKey(task, of.shots, "gradient"))) is not None
    }
    agreement = {task: value for task, value in agreement.items() if np.isfinite(value)}
    if len(agreement) < 2:
        return {}
    ascending = sorted(agreement, key=lambda task: agreement[task])
    return dict(zip(TRANSFERS, (ascending[-1], ascending[0]), strict=True))


def _random(rankings: Rankings, draws: int, seed: int) -> Iterator[CurvePoint]:
    """Yield the random control: nested draws of heads and of FFNs, the same ones for all tasks and shot counts."""
    layers, heads = next(iter(rankings.heads.values())).shape
    for number in range(draws):
        for kind, count in (("head", layers * heads), ("ffn", layers)):
            for percent in LEVELS:
                removed = removed_count(percent, count)
                of_heads, of_ffns = (removed, 0) if kind == "head" else (0, removed)
                # One permutation a seed: its levels are nested, as those of a ranking are.
                yield CurvePoint(
                    f"random-{kind}s-{percent}-draw{number}" if percent else CLEAN,
                    random_mask(layers, heads, of_heads, of_ffns, seed + number),
                    "random",
                    "head" if kind == "head" else "ffn",
                    percent,
                    seed=seed + number,
                )


@dataclass(frozen=True, eq=False)
class UnderMasks:
    """Scores of a task's documents N under M masks, by metric [M, N]; accuracy [M, U] by scored unit, with its clusters."""

    by_document: dict[str, Values]
    accuracy: Values
    accuracy_clusters: list[str]

    def at(self, masks: NDArray[np.int64]) -> "UnderMasks":
        """Return the scores under some of the masks, by their places."""
        by_document = {name: values[masks] for name, values in self.by_document.items()}
        return UnderMasks(by_document, self.accuracy[masks], self.accuracy_clusters)


def under_masks(task: PackedTask, logprobs: Values, greedy: NDArray[np.bool_]) -> UnderMasks:
    """Return scores under masks from option scores [M, O]."""
    scores = document_scores(task.task, logprobs, greedy)
    accuracy, clusters = unit_accuracy(task.task, scores["acc"])
    return UnderMasks(scores, accuracy, clusters)


def point_rows(
    task: PackedTask, points: Sequence[CurvePoint], clean: UnderMasks, pruned: UnderMasks, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a task's curve points: scores, and paired drops from the clean run on the same documents.

    `clean` [1, …], `pruned` [P, …] in the order of the points. Intervals are bootstrapped over documents, clustered.
    """
    name = task.task.metric if task.task.metric in ("acc", "em") else "acc"
    values: dict[str, tuple[Values, Sequence[str]]] = {
        name: (pruned.accuracy, pruned.accuracy_clusters),
        "acc_drop": (clean.accuracy - pruned.accuracy, pruned.accuracy_clusters),
    }
    for metric in ("gold_logprob", "gold_prob"):
        of_pruned, of_clean = pruned.by_document[metric], clean.by_document[metric]
        values[metric] = (of_pruned, task.task.clusters)
        values[f"{metric}_drop"] = (of_clean - of_pruned, task.task.clusters)
    for metric, (by_document, clusters) in values.items():
        intervals = means_with_intervals(by_document, clusters, seed=seed)
        for number, point in enumerate(points):
            yield {
                **point_fields(point),
                "task": task.task.task,
                "shots": task.task.shots,
                "split": task.task.split,
                "metric": metric,
                "value": float(intervals.value[number]),
                "stderr": float(intervals.stderr[number]),
                "low": float(intervals.low[number]),
                "high": float(intervals.high[number]),
                "chance": task.task.chance if metric == name else None,
                "exact": True,
                "documents": len(task.task.documents),
            }


def effect_columns(
    task: PackedTask, points: Sequence[CurvePoint], clean: UnderMasks, pruned: UnderMasks
) -> Iterator[dict[str, Any]]:
    """Yield blocks of columns of effects.parquet, one a metric: an entry a point that is judged and document."""
    places = [place for place, point in enumerate(points) if point.judged and point.percent]
    indices = np.array([document.index for document in task.task.documents])
    for metric in ("acc", "gold_logprob") if places else ():
        values = clean.by_document[metric] - pruned.by_document[metric][places]
        yield {
            "experiment": "prune",
            "task": task.task.task,
            "shots": task.task.shots,
            "split": task.task.split,
            "document": np.tile(indices, len(places)),
            "mask": np.repeat([points[place].name for place in places], len(indices)),
            "metric": f"{metric}_drop",
            "value": values.ravel(),
        }


def point_fields(point: CurvePoint) -> dict[str, Any]:
    """Return the columns that tell a curve's point from others."""
    return {
        "mask": point.name,
        "method": point.method,
        "kind": point.kind,
        "k": point.percent,
        "heads_removed": len(point.mask.heads),
        "ffns_removed": len(point.mask.ffns),
        "other_task": None if point.donor is None else point.donor.task,
        "other_shots": None if point.donor is None else point.donor.shots,
        "seed": point.seed,
    }


def knee(levels: Sequence[int], drops: Values, errors: Values) -> int:
    """Return the largest level whose drop of accuracy is within one standard error and at most one point; else 0.

    drops, errors: [levels], fractions; an unknown standard error does not excuse a drop.
    """
    within = np.nan_to_num(errors)
    kept = [
        level
        for level, drop, error in zip(levels, drops, within, strict=True)
        if drop <= error and drop <= KNEE_POINTS
    ]
    return max(kept, default=0)


def knees(
    chosen_on: Sequence[Mapping[str, Any]], reported: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the knee of every curve: chosen on training rows, reported on evaluation rows.

    metric `knee`: value the percentage removed; `knee_acc_drop`: what that costs on the evaluation documents, which are
    the ones that `split` and `documents` of both tell.
    """
    fields = ("task", "shots", "method", "kind", "other_task", "other_shots")
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in chosen_on:
        if row["metric"] == "acc_drop":
            grouped.setdefault(tuple(row[field] for field in fields), []).append(row)
    at = {
        (*(row[field] for field in fields), row["k"]): row for row in reported if row["metric"] == "acc_drop"
    }
    for key, members in grouped.items():
        columns = [np.array([member[name] for member in members]) for name in ("value", "stderr")]
        level = knee([member["k"] for member in members], *columns)
        cost = at.get((*key, level))
        if cost is None:
            continue
        same = ("k", "split", "documents", "mask", "heads_removed", "ffns_removed")
        base = dict(zip(fields, key, strict=True)) | {name: cost[name] for name in same} | {"exact": True}
        yield base | {"metric": "knee", "value": float(level)}
        measured = {name: cost[name] for name in ("value", "stderr", "low", "high")}
        yield base | {"metric": "knee_acc_drop"} | measured


def control_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield mean and band of the random control over its draws: `low, high` hold 95 % of the draws, `stderr` is the mean's."""
    fields = ("task", "shots", "split", "kind", "k", "metric", "heads_removed", "ffns_removed", "documents")
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] == "random":
            grouped.setdefault(tuple(row[field] for field in fields), []).append(row)
    for key, members in grouped.items():
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
