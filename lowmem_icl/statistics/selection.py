"""What units selected for their high scores are worth on documents that did not select them.

Axis letters: N documents, U units.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.statistics.clusters import cluster_numbers
from lowmem_icl.statistics.intervals import MEAN, Interval, Values, mean_interval, mean_of_estimates


def alternate_halves(clusters: Sequence[str]) -> NDArray[np.bool_]:
    """Return which documents [N] are in the first half: clusters alternate, in order of appearance."""
    return np.asarray(cluster_numbers(clusters) % 2 == 0)


def top_mean(values: Sequence[Values], clusters: Sequence[Sequence[str]], count: int) -> Interval:
    """Return the mean of the `count` units that are highest in the mean over tasks, free of selection bias.

    values, clusters: of every task, [U, N] and [N]. One half of each task's documents selects the units and
    the other half judges them, then the reverse, so every document counts once, in the mean of units that it
    did not help to select. A mean over the documents that selected the units would profit from their noise
    (the winner's curse). Needs two clusters per task.
    """
    first = [alternate_halves(names) for names in clusters]
    assert all(0 < half.sum() < len(half) for half in first), "one cluster cannot be halved"
    held_out = [np.empty(of_task.shape[1]) for of_task in values]
    for selecting in (first, [~half for half in first]):
        means = [of_task[:, half].mean(1) for of_task, half in zip(values, selecting, strict=True)]
        top = np.argsort(-np.mean(means, axis=0), kind="stable")[:count]
        for judged, of_task, half in zip(held_out, values, selecting, strict=True):
            judged[~half] = of_task[top][:, ~half].mean(0)
    found = [mean_interval(judged, names, MEAN) for judged, names in zip(held_out, clusters, strict=True)]
    return mean_of_estimates(found)
