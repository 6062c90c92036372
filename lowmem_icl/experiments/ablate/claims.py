"""What can be said about single units from their exact drops, and what demonstrations have to do with it.

Which units can be claimed to matter among so many; what the costliest ones cost on documents that did not
pick them; and how much more a unit matters where there are demonstrations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.experiments.ablate.measure import single_fields
from lowmem_icl.masks.mask import Unit
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.result import task_fields
from lowmem_icl.statistics.intervals import (
    CHANGE_OF_CHANGES,
    MEAN,
    mean_intervals,
)
from lowmem_icl.statistics.selection import top_mean
from lowmem_icl.statistics.significance import SignCounts, q_values, sign_counts
from lowmem_icl.tables.blocks import Block, unit_blocks
from lowmem_icl.tasks.loading import TaskRows

TOP_COUNTS = (1, 3, 10)
LARGEST_ROUNDING = 1e-4
"""Nats by which scores may differ from the reference's: a drop of no more counts as none."""

Values = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ExactDrops:
    """The exact drops of one task at one shot count: of its scored documents, for units [U] at these indices
    of all.

    gold: of gold log-probability, [U, N]; accuracy: by scored unit, [U, S], with the clusters of these.
    """

    task: TaskRows
    indices: Indices
    gold: Values
    accuracy: Values
    accuracy_clusters: list[str]

    @property
    def signs(self) -> SignCounts:
        """How many clusters of documents lose without each unit, [U], and how many gain."""
        differs = np.abs(self.gold) > LARGEST_ROUNDING
        return sign_counts(np.where(differs, self.gold, 0.0), self.task.clusters)

    @property
    def has_clusters(self) -> bool:
        """Whether there are two clusters of documents, without which nothing can be claimed."""
        return len(set(self.task.clusters)) > 1


def claim_blocks(units: Sequence[Unit], drops: Sequence[ExactDrops]) -> list[Block]:
    """Return blocks of documents_hurt, documents_helped and q_value: of every task and shot count, and of all
    tasks together at each shot count.

    The claim is that more documents are hurt than helped without the unit, or the reverse; a family of claims
    is all units of a task at a shot count (of all tasks: those that any task has, its documents added up), so
    that among the units with q ≤ 0.05 about one of twenty is no finding.
    """
    found: list[Block] = []
    for own in drops:
        found += _sign_blocks(units, own.indices, own.signs, single_fields(own.task))
    for members in _by_shots(drops):
        indices = reduce(np.union1d, [member.indices for member in members])
        added = np.zeros((2, len(indices)), dtype=np.int64)
        for member in members:
            added[:, np.searchsorted(indices, member.indices)] += np.array(member.signs)
        fields = single_fields(members[0].task) | _aggregate_fields(members)
        found += _sign_blocks(units, indices, SignCounts(*added), fields)
    return found


def _sign_blocks(
    units: Sequence[Unit], indices: Indices, signs: SignCounts, fields: Mapping[str, Any]
) -> list[Block]:
    """Return blocks of what is counted of the units at some indices, and of what can be claimed from that."""
    if not len(indices):
        return []
    columns: dict[str, NDArray[Any]] = {
        "documents_hurt": signs.hurt,
        "documents_helped": signs.helped,
        "q_value": q_values(signs),
    }
    counted = [units[index] for index in indices]
    return [
        block
        for metric, values in columns.items()
        for block in unit_blocks(counted, {"value": values}, **fields, metric=metric)
    ]


def top_drop_records(units: Sequence[Unit], drops: ExactDrops) -> Iterator[Block]:
    """Yield top_drop: what the `count` costliest heads, and FFNs, cost alone in gold log-probability, mean
    over these units.

    Half of the documents pick the units, the other half judges them, and the other way round: see `top_mean`.
    """
    if not drops.has_clusters:
        return
    for kind in ("head", "ffn"):
        rows = np.array([units[index].kind == kind for index in drops.indices])
        for count in TOP_COUNTS:
            if count <= rows.sum():
                yield (
                    task_fields(drops.task)
                    | {
                        "procedure": "top",
                        "method": "ablation",
                        "kind": kind,
                        "count": count,
                        "heads_removed": int(kind == "head"),
                        "ffns_removed": int(kind == "ffn"),
                        "metric": "top_drop",
                        "exact": True,
                    }
                    | top_mean(drops.gold[rows], drops.task.clusters, count)._asdict()
                )


@dataclass(frozen=True, eq=False)
class InContextEffects:
    """How much more units [U] matter with demonstrations than without, on the same documents [N] or scored
    units [S].

    gold: drops of gold log-probability at some shot count minus those at none, [U, N]; accuracy: likewise,
    [U, S].
    """

    task: TaskRows
    indices: Indices
    gold: Values
    clusters: list[str]
    accuracy: Values
    accuracy_clusters: list[str]


def in_context(shown: ExactDrops, alone: ExactDrops) -> InContextEffects | None:
    """Return the in-context effects of the units and documents that both have; None where there are none in
    common.

    A head of the language in general costs as much without demonstrations as with them, and comes out at 0.
    """
    indices, (ours, theirs) = _in_all([shown.indices, alone.indices])

    def difference(
        values: Values, other: Values, names: Sequence[Any], others: Sequence[Any]
    ) -> tuple[Values, Indices]:
        _, here, there = np.intersect1d(np.array(names), np.array(others), return_indices=True)
        return values[np.ix_(ours, here)] - other[np.ix_(theirs, there)], here

    documents = [[document.index for document in drops.task.documents] for drops in (shown, alone)]
    scored_units = [
        list(dict.fromkeys(document.unit for document in drops.task.documents)) for drops in (shown, alone)
    ]
    gold, common_documents = difference(shown.gold, alone.gold, *documents)
    accuracy, common_units = difference(shown.accuracy, alone.accuracy, *scored_units)
    if not gold.size:
        return None
    return InContextEffects(
        shown.task,
        indices,
        gold,
        [shown.task.clusters[index] for index in common_documents],
        accuracy,
        [shown.accuracy_clusters[index] for index in common_units],
    )


def in_context_blocks(units: Sequence[Unit], effects: Sequence[InContextEffects]) -> list[Block]:
    """Return blocks of icl_effect (nats) and icl_effect_acc with clustered intervals."""
    found: list[Block] = []
    for effect in effects:
        for metric, values, clusters, kind in (
            ("icl_effect", effect.gold, effect.clusters, MEAN),
            ("icl_effect_acc", effect.accuracy, effect.accuracy_clusters, CHANGE_OF_CHANGES),
        ):
            intervals = mean_intervals(values, clusters, kind)
            fields = single_fields(effect.task) | {
                "procedure": "icl-effect",
                "metric": metric,
                "other_task": effect.task.task,
                "other_shots": 0,
                "other_method": "ablation",
                "documents": effect.gold.shape[1],
            }
            found += unit_blocks([units[index] for index in effect.indices], intervals._asdict(), **fields)
    return found


def _by_shots(members: Sequence[ExactDrops]) -> list[list[ExactDrops]]:
    """Return, for each shot count that two tasks have, all that count in a mean over tasks."""
    groups: dict[int, list[ExactDrops]] = {}
    for member in members:
        if in_domain(member.task.task):
            groups.setdefault(member.task.shots, []).append(member)
    return [group for group in groups.values() if len(group) > 1]


def _in_all(indices: Sequence[Indices]) -> tuple[Indices, list[Indices]]:
    """Return the values that all of some ascending arrays have, and where each has them."""
    common = reduce(np.intersect1d, indices)
    return common, [np.searchsorted(array, common) for array in indices]


def _aggregate_fields(members: Sequence[ExactDrops]) -> dict[str, Any]:
    splits = {member.task.split for member in members}
    return {
        "task": AGGREGATE,
        "split": splits.pop() if len(splits) == 1 else None,
        "documents": sum(len(member.task.documents) for member in members),
    }
