"""What units selected for their high scores are worth on documents that did not select them.

Axis letters: N documents, U units.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.statistics.intervals import MEAN, Interval, Values, mean_interval


def alternate_halves(clusters: Sequence[str]) -> NDArray[np.bool_]:
    """Return which documents [N] are in the first half: clusters alternate, in order of appearance."""
    index = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    return np.array([index[name] % 2 == 0 for name in clusters])


def top_mean(values: Values, clusters: Sequence[str], count: int) -> Interval:
    """Return the mean of the `count` units whose values [U, N] are highest, free of selection bias.

    One half of the documents selects the units and the other half judges them, then the reverse, so every
    document counts once, in the mean of units that it did not help to select. A mean over the documents that
    selected the units would profit from their noise (the winner's curse). Needs two clusters.
    """
    first = alternate_halves(clusters)
    assert 0 < first.sum() < len(first), "one cluster cannot be halved"
    held_out = np.empty(values.shape[1])
    for selecting in (first, ~first):
        order = np.argsort(-values[:, selecting].mean(1), kind="stable")
        held_out[~selecting] = values[order[:count]][:, ~selecting].mean(0)
    return mean_interval(held_out, clusters, MEAN)
