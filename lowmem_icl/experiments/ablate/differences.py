"""How much more units matter in one form of the same documents than in another.

With demonstrations than without, and with right labels in these than with shuffled ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from lowmem_icl.experiments.ablate.claims import (
    ExactDrops,
    Indices,
    SignedUnits,
    Values,
    signed_blocks,
)
from lowmem_icl.experiments.ablate.measure import single_fields
from lowmem_icl.masks.mask import Unit
from lowmem_icl.statistics.intervals import CHANGE_OF_CHANGES, MEAN, mean_intervals
from lowmem_icl.statistics.significance import differing_signs
from lowmem_icl.tables.blocks import Block, unit_blocks
from lowmem_icl.tasks.documents import TaskRows


@dataclass(frozen=True, eq=False)
class DropDifferences:
    """How much larger the drops of units [U] are than in another form of the same documents [N] or scored
    units [S].

    gold: of gold log-probability, [U, N]; accuracy: [U, S].
    """

    task: TaskRows
    indices: Indices
    gold: Values
    clusters: list[str]
    accuracy: Values
    accuracy_clusters: list[str]


def drop_differences(own: ExactDrops, other: ExactDrops) -> DropDifferences | None:
    """Return the drops minus those in another form, of the units and documents that both have; None where
    there are none in common.

    A head of the language in general costs as much without demonstrations as with them, and one that cares
    for their format alone as much with wrong labels as with right ones: both come out at 0.
    """
    indices = reduce(np.intersect1d, [own.indices, other.indices])
    ours, theirs = (np.searchsorted(drops.indices, indices) for drops in (own, other))

    def difference(
        values: Values, others: Values, names: Sequence[Any], other_names: Sequence[Any]
    ) -> tuple[Values, Indices]:
        _, here, there = np.intersect1d(np.array(names), np.array(other_names), return_indices=True)
        return values[np.ix_(ours, here)] - others[np.ix_(theirs, there)], here

    documents = [[document.index for document in drops.task.documents] for drops in (own, other)]
    scored_units = [
        list(dict.fromkeys(document.unit for document in drops.task.documents)) for drops in (own, other)
    ]
    gold, common_documents = difference(own.gold, other.gold, *documents)
    accuracy, common_units = difference(own.accuracy, other.accuracy, *scored_units)
    if not gold.size:
        return None
    return DropDifferences(
        own.task,
        indices,
        gold,
        [own.task.clusters[index] for index in common_documents],
        accuracy,
        [own.accuracy_clusters[index] for index in common_units],
    )


def in_context_blocks(units: Sequence[Unit], effects: Sequence[DropDifferences]) -> list[Block]:
    """Return blocks of icl_effect (nats) and icl_effect_acc: drops with demonstrations minus without; with
    their q-values.
    """

    def fields(task: TaskRows) -> dict[str, Any]:
        compared_with = {"other_task": task.task, "other_shots": 0, "other_method": "ablation"}
        return {"procedure": "icl-effect"} | compared_with

    return _blocks(units, effects, "icl_effect", fields)


def label_blocks(units: Sequence[Unit], effects: Sequence[DropDifferences]) -> list[Block]:
    """Return blocks of label_effect (nats) and label_effect_acc: drops with right labels minus those with
    shuffled ones; with their q-values.
    """
    return _blocks(
        units, effects, "label_effect", lambda task: {"procedure": "label-effect", "labels": "shuffled"}
    )


def _blocks(
    units: Sequence[Unit],
    effects: Sequence[DropDifferences],
    metric: str,
    fields: Callable[[TaskRows], Mapping[str, Any]],
) -> list[Block]:
    """Return blocks of a metric in nats and in accuracy, with clustered intervals and q-values."""
    found: list[Block] = []
    in_nats: list[SignedUnits] = []
    in_accuracy: list[SignedUnits] = []
    for effect in effects:
        compared = [units[index] for index in effect.indices]
        same = {**single_fields(effect.task), "documents": effect.gold.shape[1], **fields(effect.task)}
        nats = mean_intervals(effect.gold, effect.clusters, MEAN)
        accuracy = mean_intervals(effect.accuracy, effect.accuracy_clusters, CHANGE_OF_CHANGES)
        found += unit_blocks(compared, nats._asdict(), **same, metric=metric)
        found += unit_blocks(compared, accuracy._asdict(), **same, metric=f"{metric}_acc")
        for signed, values, clusters in (
            (in_nats, effect.gold, effect.clusters),
            (in_accuracy, effect.accuracy, effect.accuracy_clusters),
        ):
            signs = differing_signs(values, clusters)
            signed.append(SignedUnits(effect.task, effect.indices, signs, same))
    return [
        *found,
        *signed_blocks(units, in_nats, metric),
        *signed_blocks(units, in_accuracy, f"{metric}_acc"),
    ]
