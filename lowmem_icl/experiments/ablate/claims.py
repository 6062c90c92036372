"""What can be said about single units from their exact drops.

Which units can be claimed to matter among so many, and what the costliest ones cost on documents that did not
pick them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.experiments.ablate.measure import UnitDrops, single_fields
from lowmem_icl.masks.mask import Unit
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.result import task_fields
from lowmem_icl.statistics.selection import top_mean
from lowmem_icl.statistics.significance import SignCounts, differing_signs, q_values
from lowmem_icl.tables.blocks import Block, unit_blocks
from lowmem_icl.tables.unit_table import q_metric
from lowmem_icl.tasks.loading import TaskRows

TOP_COUNTS = (1, 3, 10)
LISTED_COUNTS = (3, 5)
"""How many units the lists of the costliest have, on the page and in the terminal."""
COUNTED = "gold_logprob_drop"
"""The metric whose documents that lose and gain are reported as numbers."""

Values = NDArray[np.float64]
Indices = NDArray[np.int64]


class HasTask(Protocol):
    """Something about one task at one shot count."""

    @property
    def task(self) -> TaskRows:
        """The task's documents."""


OfTask = TypeVar("OfTask", bound=HasTask)


@dataclass(frozen=True, eq=False)
class ExactDrops:
    """The exact drops of one task at one shot count: of its scored documents, for units [U] at these indices
    of all.

    gold: of gold log-probability, [U, N]; accuracy: by scored unit, [U, S], with the clusters of these;
    others: of more scores of documents, [U, N], by their names.
    """

    task: TaskRows
    indices: Indices
    gold: Values
    accuracy: Values
    accuracy_clusters: list[str]
    others: Mapping[str, Values] = field(default_factory=dict)

    @classmethod
    def of_units(cls, task: TaskRows, indices: Indices, drops: UnitDrops) -> "ExactDrops":
        """Return what is lost without the units at these indices, one after the other."""
        scores = drops.by_document
        others = {name: scores[name] for name in ("gold_prob", "margin") if not np.isnan(scores[name]).any()}
        gold = scores["gold_logprob"]
        return cls(task, indices, gold, drops.accuracy, drops.accuracy_clusters, others)

    @property
    def has_clusters(self) -> bool:
        """Whether there are two clusters of documents, without which nothing can be claimed."""
        return len(set(self.task.clusters)) > 1

    def signed(self) -> dict[str, "SignedUnits"]:
        """Return how many clusters of documents lose and gain without each unit, by the drop's metric."""
        lost = {"gold_logprob": self.gold, **self.others}
        found = {name: differing_signs(values, self.task.clusters) for name, values in lost.items()}
        found["acc"] = differing_signs(self.accuracy, self.accuracy_clusters)
        fields = single_fields(self.task)
        return {
            f"{name}_drop": SignedUnits(self.task, self.indices, signs, fields)
            for name, signs in found.items()
        }


@dataclass(frozen=True, eq=False)
class SignedUnits:
    """How many clusters lose and gain without the units [U] at these indices of all, with the columns of
    their records.
    """

    task: TaskRows
    indices: Indices
    signs: SignCounts
    fields: Mapping[str, Any]


def claim_blocks(units: Sequence[Unit], drops: Sequence[ExactDrops]) -> list[Block]:
    """Return blocks of documents_hurt, documents_helped and q-values: of every task and shot count, and of
    all tasks together at each shot count.

    The claim is that more documents are hurt than helped without the unit, or the reverse; a family of claims
    is all units of a task at a shot count (of all tasks: those that any task has, its documents added up), so
    that among the units with q ≤ 0.05 about one of twenty is no finding.
    """
    signed = [own.signed() for own in drops]
    metrics = list(dict.fromkeys(metric for of_task in signed for metric in of_task))
    return [
        block
        for metric in metrics
        for block in signed_blocks(units, [of_task.get(metric) for of_task in signed], metric)
    ]


def signed_blocks(units: Sequence[Unit], signed: Sequence[SignedUnits | None], metric: str) -> list[Block]:
    """Return blocks of a metric's q-values, and of gold log-probability the counts, of every task that has it
    and of all tasks together where each has.
    """
    found: list[Block] = []
    for own in signed:
        if own is not None:
            found += _sign_blocks(units, own, metric)
    of_all = [own for own in signed if own is not None]
    if len(of_all) < len(signed):
        return found
    for members in _by_shots(of_all):
        indices = reduce(np.union1d, [member.indices for member in members])
        added = np.zeros((2, len(indices)), dtype=np.int64)
        for member in members:
            added[:, np.searchsorted(indices, member.indices)] += np.array(member.signs)
        fields = dict(members[0].fields) | _aggregate_fields(members)
        fields["documents"] = sum(member.fields["documents"] for member in members)
        if "other_task" in fields:
            fields["other_task"] = None
        found += _sign_blocks(
            units, SignedUnits(members[0].task, indices, SignCounts(*added), fields), metric
        )
    return found


def _sign_blocks(units: Sequence[Unit], own: SignedUnits, metric: str) -> list[Block]:
    """Return blocks of what is counted of some units, and of what can be claimed from that."""
    if not len(own.indices):
        return []
    columns: dict[str, NDArray[Any]] = {q_metric(metric): q_values(own.signs)}
    if metric == COUNTED:
        columns |= {"documents_hurt": own.signs.hurt, "documents_helped": own.signs.helped}
    counted = [units[index] for index in own.indices]
    return [
        block
        for name, values in columns.items()
        for block in unit_blocks(counted, {"value": values}, **own.fields, metric=name)
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


def _by_shots(members: Sequence[OfTask]) -> list[list[OfTask]]:
    """Return, for each shot count that two tasks have, all that count in a mean over tasks."""
    groups: dict[int, list[OfTask]] = {}
    for member in members:
        if in_domain(member.task.task):
            groups.setdefault(member.task.shots, []).append(member)
    return [group for group in groups.values() if len(group) > 1]


def _aggregate_fields(members: Sequence[HasTask]) -> dict[str, Any]:
    splits = {member.task.split for member in members}
    return {
        "task": AGGREGATE,
        "split": splits.pop() if len(splits) == 1 else None,
        "documents": sum(len(member.task.documents) for member in members),
    }
