"""Heads and FFNs removed alone: what each document's score loses, exactly or, where units are screened,
estimated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Unit, all_ffns, all_heads
from lowmem_icl.session.result import task_fields
from lowmem_icl.statistics.agreement import spearman
from lowmem_icl.statistics.intervals import CHANGE, MEAN, mean_intervals
from lowmem_icl.tables.blocks import Block, unit_blocks
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores, unit_accuracy

DROPS = ("gold_logprob", "gold_prob", "margin", "acc")
# What stands for the units that were not removed: of ten exact ones, one is drawn by chance.
DRAWN_SHARE = 10

Values = NDArray[np.float64]
Indices = NDArray[np.int64]


def ablated_units(layers: int, heads: int) -> list[Unit]:
    """Return the units in the order in which they are ablated: all heads, then all FFNs."""
    return [*all_heads(layers, heads), *all_ffns(layers)]


@dataclass(frozen=True, eq=False)
class UnitDrops:
    """Clean minus ablated, by unit U and document N: `by_document[name]` [U, N].

    `accuracy` [U, S] is by scored unit, with the clusters of these: MultiRC's questions count as wholes.
    """

    by_document: dict[str, Values]
    accuracy: Values
    accuracy_clusters: list[str]


def unit_drops(task: PackedTask, logprobs: Values, greedy: NDArray[np.bool_]) -> UnitDrops:
    """Return what is lost under each mask, from scores [M, O] whose first row is the clean run's."""
    scores = document_scores(task.task, logprobs, greedy)
    accuracy, clusters = unit_accuracy(task.task, scores["acc"])
    return UnitDrops(
        {name: scores[name][:1] - scores[name][1:] for name in DROPS},
        accuracy[:1] - accuracy[1:],
        clusters,
    )


def drop_blocks(task: TaskRows, units: Sequence[Unit], drops: UnitDrops) -> list[Block]:
    """Return blocks of results, one record per unit: mean drops over documents with paired, clustered
    intervals.
    """
    found: list[Block] = []
    for name, values in drops.by_document.items():
        if np.isnan(values).any():
            continue
        whole = name == "acc"
        intervals = mean_intervals(
            drops.accuracy if whole else values,
            drops.accuracy_clusters if whole else task.clusters,
            CHANGE if whole else MEAN,
        )
        found += unit_blocks(units, intervals._asdict(), **single_fields(task), metric=f"{name}_drop")
    return found


def single_fields(task: TaskRows) -> dict[str, Any]:
    """Return the columns shared by all exact numbers about units removed alone."""
    return task_fields(task) | {"procedure": "single", "method": "ablation", "exact": True}


def effect_blocks(task: TaskRows, units: Sequence[Unit], drops: UnitDrops) -> list[Block]:
    """Return blocks of effects.parquet, one per metric and kind of unit: a record per unit and document."""
    documents = np.array([document.index for document in task.documents])
    found: list[Block] = []
    for kind in ("head", "ffn"):
        indices = [index for index, unit in enumerate(units) if unit.kind == kind]
        if not indices:
            continue
        base: dict[str, Any] = {
            "experiment": "ablate",
            "task": task.task,
            "shots": task.shots,
            "split": task.split,
            "document": np.tile(documents, len(indices)),
            "kind": kind,
            "layer": np.repeat([units[index].layer for index in indices], len(documents)),
        }
        if kind == "head":
            base["head"] = np.repeat([units[index].head for index in indices], len(documents))
        found += [
            base | {"metric": f"{name}_drop", "value": values[indices].ravel()}
            for name, values in drops.by_document.items()
            if not np.isnan(values).any()
        ]
    return found


@dataclass(frozen=True, eq=False)
class Estimates:
    """First-order estimates [U] of the drop of gold log-probability without each unit, and their errors."""

    value: Values
    stderr: Values

    @classmethod
    def of_documents(cls, by_document: Values, clusters: Sequence[str]) -> "Estimates":
        """Return the means over documents of estimates [N, U] with clustered errors, infinite for a single
        cluster.
        """
        stderr = mean_intervals(by_document.T, clusters, MEAN).stderr
        return cls(by_document.mean(0), np.where(np.isnan(stderr), np.inf, stderr))


def screened(estimates: Estimates, n_exact: int, seed: int) -> tuple[Indices, Indices]:
    """Return the units to be ablated exactly, ascending, and which of them chance picked.

    Nine of ten are those whose effect could be largest: |estimate| + 2 standard errors, or |estimate| alone
    where these are infinite. One of ten is drawn from all others, so that what screening leaves out is
    measured, too. With as many as there are units all are exact.
    """
    units = len(estimates.value)
    if n_exact >= units:
        return np.arange(units), np.arange(0)
    by_chance = n_exact // DRAWN_SHARE
    stderr = np.where(np.isfinite(estimates.stderr), estimates.stderr, 0.0)
    order = np.argsort(-(np.abs(estimates.value) + 2 * stderr), kind="stable")
    largest, rest = order[: n_exact - by_chance], order[n_exact - by_chance :]
    drawn = np.random.default_rng(seed).choice(rest, by_chance, replace=False)
    return np.sort(np.concatenate([largest, drawn])), np.sort(drawn)


def estimate_blocks(
    task: TaskRows, units: Sequence[Unit], indices: Indices, estimates: Estimates
) -> list[Block]:
    """Return blocks of results for the units that are only estimated, marked as not exact.

    They have no interval: their standard error says how much the estimate varies between documents, nothing
    says how far it is from the exact drop.
    """
    value = estimates.value[indices]
    stderr = np.where(np.isfinite(estimates.stderr[indices]), estimates.stderr[indices], np.nan)
    columns = {"value": value, "stderr": stderr}
    same = single_fields(task) | {"method": "attribution", "exact": False}
    return unit_blocks([units[index] for index in indices], columns, **same, metric="gold_logprob_drop")


def agreement_records(
    task: TaskRows, estimates: Values, exact: Values, compared: Mapping[str, Indices]
) -> Iterator[Block]:
    """Yield how far estimates and exact drops [U] agree, over the units compared under each method's name.

    estimate_spearman: their rank correlation; estimate_error: the mean of |estimate − exact| in nats.
    `count`: how many units were compared.
    """
    for method, indices in compared.items():
        base = task_fields(task) | {
            "procedure": "agreement",
            "method": method,
            "other_task": task.task,
            "other_shots": task.shots,
            "other_method": "ablation",
            "count": len(indices),
            "exact": True,
        }
        if len(indices) > 1 and np.isfinite(rank := spearman(estimates[indices], exact[indices])):
            yield base | {"metric": "estimate_spearman", "value": rank, "chance": 0.0}
        if len(indices):
            error = float(np.abs(estimates[indices] - exact[indices]).mean())
            yield base | {"metric": "estimate_error", "value": error}
