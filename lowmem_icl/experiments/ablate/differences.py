"""How much more units matter in one form of the same documents than in another.

With demonstrations than without, and with right labels in these than with shuffled ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from lowmem_icl.experiments.ablate.claims import ExactDrops, Indices, Values
from lowmem_icl.experiments.ablate.measure import single_fields
from lowmem_icl.masks.mask import Unit
from lowmem_icl.statistics.intervals import CHANGE_OF_CHANGES, MEAN, mean_intervals
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
    """Return blocks of icl_effect (nats) and icl_effect_acc: drops with demonstrations minus without."""
    found: list[Block] = []
    for effect in effects:
        compared_with = {"other_task": effect.task.task, "other_shots": 0, "other_method": "ablation"}
        found += _blocks(units, effect, "icl_effect", {"procedure": "icl-effect"} | compared_with)
    return found


def label_blocks(units: Sequence[Unit], effects: Sequence[DropDifferences]) -> list[Block]:
    """Return blocks of label_effect (nats) and label_effect_acc: drops with right labels minus those with
    shuffled ones.
    """
    fields = {"procedure": "label-effect", "labels": "shuffled"}
    return [block for effect in effects for block in _blocks(units, effect, "label_effect", fields)]


def _blocks(
    units: Sequence[Unit], effect: DropDifferences, metric: str, fields: Mapping[str, Any]
) -> list[Block]:
    """Return blocks of a metric in nats and in accuracy, with clustered intervals."""
    compared = [units[index] for index in effect.indices]
    same = {**single_fields(effect.task), "documents": effect.gold.shape[1], **fields}
    in_nats = mean_intervals(effect.gold, effect.clusters, MEAN)
    in_accuracy = mean_intervals(effect.accuracy, effect.accuracy_clusters, CHANGE_OF_CHANGES)
    return [
        *unit_blocks(compared, in_nats._asdict(), **same, metric=metric),
        *unit_blocks(compared, in_accuracy._asdict(), **same, metric=f"{metric}_acc"),
    ]
