"""Heads and FFNs removed alone: what each document's score loses, exactly or, where units are screened, estimated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask, Unit, all_ffns, all_heads
from lowmem_icl.statistics.agreement import spearman
from lowmem_icl.statistics.intervals import means_with_intervals
from lowmem_icl.tables.unit_columns import unit_columns
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores, unit_accuracy

DROPS = ("gold_logprob", "gold_prob", "margin", "acc")

Values = NDArray[np.float64]


def ablated_units(layers: int, heads: int) -> list[Unit]:
    """Return the units in the order in which they are ablated: all heads, then all FFNs."""
    return [*all_heads(layers, heads), *all_ffns(layers)]


def ablation_masks(layers: int, heads: int) -> tuple[Mask, ...]:
    """Return the clean mask followed by one mask a unit."""
    return (Mask(), *(unit.as_mask() for unit in ablated_units(layers, heads)))


@dataclass(frozen=True, eq=False)
class Drops:
    """Clean minus ablated, by unit U and document N: `by_document[name]` [U, N].

    `accuracy` [U, S] is by scored unit, with the clusters of these: MultiRC's questions count as wholes.
    """

    by_document: dict[str, Values]
    accuracy: Values
    accuracy_clusters: list[str]


def drops(task: PackedTask, logprobs: Values, greedy: NDArray[np.bool_]) -> Drops:
    """Return what is lost without each unit, from scores [M, O] whose first row is the clean run's."""
    scores = document_scores(task.task, logprobs, greedy)
    accuracy, clusters = unit_accuracy(task.task, scores["acc"])
    return Drops(
        {name: scores[name][:1] - scores[name][1:] for name in DROPS},
        accuracy[:1] - accuracy[1:],
        clusters,
    )


def drop_columns(task: PackedTask, units: Sequence[Unit], lost: Drops, seed: int) -> list[dict[str, Any]]:
    """Return blocks of result columns, an entry a unit: mean drops over documents with paired, clustered intervals."""
    blocks = []
    for name, values in lost.by_document.items():
        if np.isnan(values).any():
            continue
        whole = name == "acc"
        intervals = means_with_intervals(
            lost.accuracy if whole else values,
            lost.accuracy_clusters if whole else task.task.clusters,
            seed=seed,
        )
        blocks += unit_columns(
            task.task,
            units,
            intervals._asdict(),
            method="ablation",
            metric=f"{name}_drop",
            exact=True,
        )
    return blocks


def effect_columns(task: PackedTask, units: Sequence[Unit], lost: Drops) -> list[dict[str, Any]]:
    """Return blocks of columns of effects.parquet, one a metric and kind of unit: an entry a unit and document."""
    documents = np.array([document.index for document in task.task.documents])
    blocks: list[dict[str, Any]] = []
    for kind in ("head", "ffn"):
        places = [place for place, unit in enumerate(units) if unit.kind == kind]
        if not places:
            continue
        base: dict[str, Any] = {
            "experiment": "ablate",
            "task": task.task.task,
            "shots": task.task.shots,
            "split": task.task.split,
            "document": np.tile(documents, len(places)),
            "kind": kind,
            "layer": np.repeat([units[place].layer for place in places], len(documents)),
        }
        if kind == "head":
            base["head"] = np.repeat([units[place].head for place in places], len(documents))
        blocks += [
            base | {"metric": f"{name}_drop", "value": values[places].ravel()}
            for name, values in lost.by_document.items()
            if not np.isnan(values).any()
        ]
    return blocks


def estimated_drops(by_document: Values) -> tuple[Values, Values]:
    """Return first-order estimates of the drop of gold log-probability and their standard errors, [U], from [N, U]."""
    documents = len(by_document)
    errors = np.full(by_document.shape[1], np.inf)
    if documents > 1:
        errors = by_document.std(0, ddof=1) / np.sqrt(documents)
    return by_document.mean(0), errors


def screened(
    estimates: Values, errors: Values, exact: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of the units to be ablated exactly, ascending, and which of them chance chose.

    Nine of ten are those whose effect could be largest: |estimate| + 2 standard errors. One of ten is drawn from all
    others, so that what screening leaves out is measured, too. With as many as there are units all are exact.
    """
    units = len(estimates)
    if exact >= units:
        return np.arange(units), np.arange(0)
    by_chance = exact // 10
    order = np.argsort(-(np.abs(estimates) + 2 * errors), kind="stable")
    chosen, rest = order[: exact - by_chance], order[exact - by_chance :]
    drawn = np.random.default_rng(seed).choice(rest, by_chance, replace=False)
    return np.sort(np.concatenate([chosen, drawn])), np.sort(drawn)


def estimate_columns(
    task: TaskRows, units: Sequence[Unit], places: NDArray[np.int64], estimates: Values, errors: Values
) -> list[dict[str, Any]]:
    """Return blocks of result columns for the units that are only estimated, marked as not exact."""
    value = estimates[places]
    stderr = np.where(np.isfinite(errors[places]), errors[places], np.nan)
    columns = {
        "value": value, "stderr": stderr, "low": value - 1.96 * stderr, "high": value + 1.96 * stderr
    }  # fmt: skip
    return unit_columns(
        task,
        [units[place] for place in places],
        columns,
        method="attribution",
        metric="gold_logprob_drop",
        exact=False,
    )


def agreement_rows(
    task: PackedTask,
    estimates: Values,
    values: Values,
    exact: NDArray[np.int64],
    drawn: NDArray[np.int64],
) -> Iterator[dict[str, Any]]:
    """Yield how far estimates and exact drops [U] agree, over all exact units and over those that chance chose.

    estimate_spearman: their rank correlation; estimate_error: the mean of |estimate − exact| in nats. `k`: how many
    units were compared; method `attribution` for all, `attribution-drawn` for those that stand for the units left out.
    """
    for method, places in (("attribution", exact), ("attribution-drawn", drawn)):
        base = {
            "experiment": "ablate",
            "task": task.task.task,
            "shots": task.task.shots,
            "split": task.task.split,
            "method": method,
            "other_task": task.task.task,
            "other_shots": task.task.shots,
            "other_method": "ablation",
            "k": len(places),
            "exact": True,
            "documents": len(task.task.documents),
        }
        if len(places) > 1 and np.isfinite(rank := spearman(estimates[places], values[places])):
            yield base | {"metric": "estimate_spearman", "value": rank, "chance": 0.0}
        if len(places):
            error = float(np.abs(estimates[places] - values[places]).mean())
            yield base | {"metric": "estimate_error", "value": error}
