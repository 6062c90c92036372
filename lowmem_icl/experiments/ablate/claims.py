"""What can be said about single units from their exact drops.

Which units can be claimed to matter among so many, and what the costliest ones cost on documents that did not
pick them.
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
from lowmem_icl.statistics.selection import top_mean
from lowmem_icl.statistics.significance import SignCounts, q_values, sign_counts
from lowmem_icl.tables.blocks import Block, unit_blocks
from lowmem_icl.tasks.loading import TaskRows

TOP_COUNTS = (1, 3, 10)
LISTED_COUNTS = (3, 5)
"""How many units the lists of the costliest have, on the page and in the terminal."""
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
                    | top_mean([drops.gold[rows]], [drops.task.clusters], count)._asdict()
                )


def listed_top_records(units: Sequence[Unit], drops: Sequence[ExactDrops]) -> Iterator[Block]:
    """Yield top_drop of the `count` costliest of all units, heads and FFNs, as lists of the costliest hold
    them: of every task, and of the mean over tasks.

    None where units are screened: what estimates pick is not picked by half of the documents.
    """
    groups: list[tuple[list[ExactDrops], dict[str, Any]]] = [([own], {}) for own in drops]
    groups += [(members, _aggregate_fields(members)) for members in _by_shots(drops)]
    for members, fields in groups:
        if not all(own.has_clusters and len(own.indices) == len(units) for own in members):
            continue
        for count in LISTED_COUNTS:
            if count <= len(units):
                yield (
                    task_fields(members[0].task)
                    | {"procedure": "top", "method": "ablation", "count": count}
                    | {"metric": "top_drop", "exact": True}
                    | fields
                    | top_mean(
                        [own.gold for own in members], [own.task.clusters for own in members], count
                    )._asdict()
                )


def _by_shots(members: Sequence[ExactDrops]) -> list[list[ExactDrops]]:
    """Return, for each shot count that two tasks have, all that count in a mean over tasks."""
    groups: dict[int, list[ExactDrops]] = {}
    for member in members:
        if in_domain(member.task.task):
            groups.setdefault(member.task.shots, []).append(member)
    return [group for group in groups.values() if len(group) > 1]


def _aggregate_fields(members: Sequence[ExactDrops]) -> dict[str, Any]:
    splits = {member.task.split for member in members}
    return {
        "task": AGGREGATE,
        "split": splits.pop() if len(splits) == 1 else None,
        "documents": sum(len(member.task.documents) for member in members),
    }
