"""What can be said about single units from their exact drops, and what demonstrations have to do with it.

Which units can be claimed to matter among so many; what the costliest ones cost on documents that did not choose them; and
how much more a unit matters where there are demonstrations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Unit
from lowmem_icl.statistics.intervals import (
    Estimates,
    Intervals,
    clustered_estimates,
    mean_of_estimates,
    means_with_intervals,
)
from lowmem_icl.statistics.tests import q_values, top_mean
from lowmem_icl.tables.unit_columns import unit_columns
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.sources import in_domain

AGGREGATE = "aggregate"
TOP_COUNTS = (1, 3, 10)

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measured:
    """The exact drops of one task at one shot count: of its scored documents, for units [U] at these places among all.

    gold: of gold log-probability, [U, N]; accuracy: by scored unit, [U, S], with the clusters of these.
    """

    task: TaskRows
    places: NDArray[np.int64]
    gold: Values
    accuracy: Values
    accuracy_clusters: list[str]

    @property
    def estimates(self) -> Estimates:
        """Mean drops of gold log-probability, [U], with clustered standard errors."""
        return clustered_estimates(self.gold, self.task.clusters)


def claim_columns(units: Sequence[Unit], measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return blocks of q_value columns: of every task and shot count, and of the mean over tasks at each shot count.

    A family of claims is all units of a task at a shot count (of the mean: those that every task has): "its drop of gold
    log-probability is not zero", two-sided, so that among the units with q ≤ 0.05 about one of twenty is no finding.
    """
    blocks = []
    for one in measured:
        if len(one.places) and len(set(one.task.clusters)) > 1:
            named = [units[place] for place in one.places]
            blocks += unit_columns(
                one.task,
                named,
                {"value": q_values(one.estimates)},
                method="ablation",
                metric="q_value",
                exact=True,
            )
    for members in _by_shots(measured):
        if all(len(set(member.task.clusters)) > 1 for member in members):
            common, at = _in_all([member.places for member in members])
            estimates = [
                Estimates(*(column[places] for column in member.estimates))
                for member, places in zip(members, at, strict=True)
            ]
            if len(common):
                blocks += unit_columns(
                    members[0].task,
                    [units[place] for place in common],
                    {"value": q_values(mean_of_estimates(estimates))},
                    method="ablation",
                    metric="q_value",
                    exact=True,
                    **_of_all(members),
                )
    return blocks


def top_drop_rows(units: Sequence[Unit], one: Measured, seed: int) -> Iterator[dict[str, Any]]:
    """Yield top_drop: what the `k` costliest heads, and FFNs, cost alone in gold log-probability, mean over these units.

    Half of the documents choose the units, the other half judges them, and the other way round: see `top_mean`.
    """
    if len(set(one.task.clusters)) < 2:
        return
    for kind in ("head", "ffn"):
        rows = np.array([units[place].kind == kind for place in one.places])
        for count in TOP_COUNTS:
            if count <= rows.sum():
                yield {
                    "experiment": "ablate",
                    "task": one.task.task,
                    "shots": one.task.shots,
                    "split": one.task.split,
                    "method": "ablation",
                    "kind": kind,
                    "k": count,
                    "heads_removed": int(kind == "head"),
                    "ffns_removed": int(kind == "ffn"),
                    "metric": "top_drop",
                    "exact": True,
                    "documents": len(one.task.documents),
                } | top_mean(one.gold[rows], one.task.clusters, count, seed=seed)._asdict()


@dataclass(frozen=True, eq=False)
class InContext:
    """How much more units [U] matter with demonstrations than without, on the same documents [N] or scored units [S].

    gold: drops of gold log-probability at some shot count minus those at none, [U, N]; accuracy: likewise, [U, S].
    """

    task: TaskRows
    places: NDArray[np.int64]
    gold: Values
    clusters: list[str]
    accuracy: Values
    accuracy_clusters: list[str]


def in_context(shown: Measured, alone: Measured) -> InContext | None:
    """Return the in-context effects of the units and documents that both have; None where there are none in common.

    A head of the language in general costs as much without demonstrations as with them, and comes out at 0.
    """
    places, (ours, theirs) = _in_all([shown.places, alone.places])

    def difference(
        values: Values, other: Values, names: Sequence[Any], others: Sequence[Any]
    ) -> tuple[Values, NDArray[np.int64]]:
        _, here, there = np.intersect1d(np.array(names), np.array(others), return_indices=True)
        return values[np.ix_(ours, here)] - other[np.ix_(theirs, there)], here

    documents, of_units = (
        [[document.index for document in task.documents] for task in (shown.task, alone.task)],
        [
            list(dict.fromkeys(document.unit for document in task.documents))
            for task in (shown.task, alone.task)
        ],
    )
    gold, here = difference(shown.gold, alone.gold, *documents)
    accuracy, whole = difference(shown.accuracy, alone.accuracy, *of_units)
    if not gold.size:
        return None
    return InContext(
        shown.task,
        places,
        gold,
        [shown.task.clusters[place] for place in here],
        accuracy,
        [shown.accuracy_clusters[place] for place in whole],
    )


def in_context_columns(
    units: Sequence[Unit], effects: Sequence[InContext], seed: int
) -> list[dict[str, Any]]:
    """Return blocks of icl_effect (nats) and icl_effect_acc columns with clustered intervals, and of their mean over tasks."""
    blocks: list[dict[str, Any]] = []
    found: dict[str, list[Intervals]] = {"icl_effect": [], "icl_effect_acc": []}
    for one in effects:
        found["icl_effect"].append(means_with_intervals(one.gold, one.clusters, seed=seed))
        found["icl_effect_acc"].append(means_with_intervals(one.accuracy, one.accuracy_clusters, seed=seed))
    same = {"method": "ablation", "other_shots": 0, "other_method": "ablation", "exact": True}
    for metric, intervals in found.items():
        for one, interval in zip(effects, intervals, strict=True):
            named = [units[place] for place in one.places]
            blocks += unit_columns(
                one.task,
                named,
                interval._asdict(),
                metric=metric,
                other_task=one.task.task,
                documents=one.gold.shape[1],
                **same,
            )
        for members in _by_shots(effects):
            common, at = _in_all([member.places for member in members])
            chosen = [intervals[effects.index(member)] for member in members]
            value = np.mean([one.value[place] for one, place in zip(chosen, at, strict=True)], axis=0)
            errors = np.array([one.stderr[place] for one, place in zip(chosen, at, strict=True)])
            stderr = np.sqrt(np.square(errors).sum(0)) / len(members)
            columns = {
                "value": value, "stderr": stderr, "low": value - 1.96 * stderr, "high": value + 1.96 * stderr
            }  # fmt: skip
            of_all = _of_all(members) | {"documents": sum(member.gold.shape[1] for member in members)}
            blocks += unit_columns(
                members[0].task,
                [units[place] for place in common],
                columns,
                metric=metric,
                other_task=AGGREGATE,
                **same,
                **of_all,
            )
    return blocks


OfTask = TypeVar("OfTask", Measured, InContext)


def _by_shots(members: Sequence[OfTask]) -> list[list[OfTask]]:
    """Return, for each shot count that two tasks have, all that count in a mean over tasks."""
    groups: dict[int, list[OfTask]] = {}
    for member in members:
        if in_domain(member.task.task):
            groups.setdefault(member.task.shots, []).append(member)
    return [group for group in groups.values() if len(group) > 1]


def _in_all(places: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Return the values that all of some ascending arrays have, and where each has them."""
    common = reduce(np.intersect1d, places)
    return common, [np.searchsorted(one, common) for one in places]


def _of_all(members: Sequence[Measured] | Sequence[InContext]) -> dict[str, Any]:
    splits = {member.task.split for member in members}
    return {
        "task": AGGREGATE,
        "split": splits.pop() if len(splits) == 1 else None,
        "documents": sum(len(member.task.documents) for member in members),
    }
