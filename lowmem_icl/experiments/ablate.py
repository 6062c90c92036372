"""Heads and FFNs removed alone: what each document's score loses, exactly or, where units are screened, estimated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks import Mask, Unit, all_ffns, all_heads
from lowmem_icl.statistics import mean_with_interval, spearman
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
    each = [
        document_scores(task.task, task.by_document(one), task.by_document(flags))
        for one, flags in zip(logprobs, greedy, strict=True)
    ]
    scores = {name: np.stack([of_mask[name] for of_mask in each]) for name in DROPS}
    accuracy, clusters = unit_accuracy(task.task, scores["acc"])
    return Drops(
        {name: values[:1] - values[1:] for name, values in scores.items()},
        accuracy[:1] - accuracy[1:],
        clusters,
    )


def drop_rows(task: PackedTask, units: Sequence[Unit], lost: Drops, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a result row a unit and metric: the mean drop over documents with its paired, clustered interval."""
    clusters = task.task.clusters
    for name, values in lost.by_document.items():
        if np.isnan(values).any():
            continue
        whole = name == "acc"
        for unit, of_unit in zip(units, lost.accuracy if whole else values, strict=True):
            interval = mean_with_interval(of_unit, lost.accuracy_clusters if whole else clusters, seed=seed)
            yield (
                _unit_fields(task.task, unit)
                | interval._asdict()
                | {
                    "method": "ablation",
                    "metric": f"{name}_drop",
                    "exact": True,
                    "documents": len(task.task.documents),
                }
            )


def effect_columns(task: PackedTask, units: Sequence[Unit], lost: Drops) -> list[dict[str, Any]]:
    """Return blocks of columns of effects.parquet, one a metric and kind of unit: an entry a unit and document."""
    documents = np.array([document.index for document in task.task.documents])
    base = {
        "experiment": "ablate",
        "task": task.task.task,
        "shots": task.task.shots,
        "split": task.task.split,
    }
    blocks: list[dict[str, Any]] = []
    for kind in ("head", "ffn"):
        places = [place for place, unit in enumerate(units) if unit.kind == kind]
        if not places:
            continue
        of_unit = {"layer": np.repeat([units[place].layer for place in places], len(documents))}
        if kind == "head":
            of_unit["head"] = np.repeat([units[place].head for place in places], len(documents))
        for name, values in lost.by_document.items():
            if not np.isnan(values).any():
                blocks.append(
                    base
                    | of_unit
                    | {
                        "document": np.tile(documents, len(places)),
                        "kind": kind,
                        "metric": f"{name}_drop",
                        "value": values[places].ravel(),
                    }
                )
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


def _unit_fields(task: TaskRows, unit: Unit) -> dict[str, Any]:
    return {
        "task": task.task,
        "shots": task.shots,
        "split": task.split,
        "kind": unit.kind,
        "layer": unit.layer,
        "head": unit.head,
        "heads_removed": int(unit.kind == "head"),
        "ffns_removed": int(unit.kind == "ffn"),
    }


def estimate_rows(
    task: TaskRows, units: Sequence[Unit], places: NDArray[np.int64], estimates: Values, errors: Values
) -> Iterator[dict[str, Any]]:
    """Yield a row for every unit that is only estimated, marked as not exact."""
    for place in places:
        error = float(errors[place]) if np.isfinite(errors[place]) else float("nan")
        value = float(estimates[place])
        yield _unit_fields(task, units[place]) | {
            "method": "attribution",
            "metric": "gold_logprob_drop",
            "value": value,
            "stderr": error,
            "low": value - 1.96 * error,
            "high": value + 1.96 * error,
            "exact": False,
            "documents": len(task.documents),
        }


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
