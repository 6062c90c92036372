"""Every head and every FFN removed alone, exactly: what each document's score loses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks import Mask, Unit, all_ffns, all_heads
from lowmem_icl.statistics import mean_with_interval
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
    clusters = [document.cluster for document in task.task.documents]
    for name, values in lost.by_document.items():
        if np.isnan(values).any():
            continue
        whole = name == "acc"
        for unit, of_unit in zip(units, lost.accuracy if whole else values, strict=True):
            yield {
                "task": task.task.task,
                "shots": task.task.shots,
                "split": task.task.split,
                "method": "ablation",
                "kind": unit.kind,
                "layer": unit.layer,
                "head": unit.head,
                "heads_removed": int(unit.kind == "head"),
                "ffns_removed": int(unit.kind == "ffn"),
                "metric": f"{name}_drop",
                "exact": True,
                "documents": len(task.task.documents),
            } | mean_with_interval(
                of_unit, lost.accuracy_clusters if whole else clusters, seed=seed
            )._asdict()


def effect_columns(task: PackedTask, units: Sequence[Unit], lost: Drops) -> dict[str, Any]:
    """Return the columns of effects.parquet: one entry a unit, document and metric."""
    metrics = [name for name, values in lost.by_document.items() if not np.isnan(values).any()]
    documents = np.array([document.index for document in task.task.documents])
    size = len(units) * len(documents)

    def each_unit(values: Sequence[Any]) -> list[Any]:
        return [value for value in values for _ in documents] * len(metrics)

    return {
        "task": [task.task.task] * (size * len(metrics)),
        "shots": [task.task.shots] * (size * len(metrics)),
        "split": [task.task.split] * (size * len(metrics)),
        "document": np.tile(documents, len(units) * len(metrics)),
        "kind": each_unit([unit.kind for unit in units]),
        "layer": each_unit([unit.layer for unit in units]),
        "head": each_unit([unit.head for unit in units]),
        "metric": [f"{name}_drop" for name in metrics for _ in range(size)],
        "value": np.concatenate([lost.by_document[name].ravel() for name in metrics]),
    }
