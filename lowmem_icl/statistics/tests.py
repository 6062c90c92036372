"""Intervals and agreement measures, computed from plain arrays."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lowmem_icl.statistics.intervals import Estimates, Interval, Values, mean_with_interval


def q_values(estimates: Estimates) -> Values:
    """Return Benjamini and Hochberg's adjusted p-values [U] of "the mean is not zero", two-sided.

    p-values are Student's t of the clustered standard errors. Not of flipped signs: among thousands of units a claim needs
    p below 1e-5, and so a hundred thousand flips of every document under every unit.
    """
    different = np.abs(estimates.value)
    # Where all documents say the same, there is either nothing to doubt or nothing to claim.
    ratio = np.where(different > 0, np.inf, 0.0)
    np.divide(different, estimates.stderr, out=ratio, where=estimates.stderr > 0)
    return np.asarray(stats.false_discovery_control(2 * stats.t.sf(ratio, estimates.freedom)))


def alternate_halves(clusters: Sequence[str]) -> NDArray[np.bool_]:
    """Return which documents [N] are in the first half: clusters are dealt alternately, in the order they appear in."""
    place = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    return np.array([place[name] % 2 == 0 for name in clusters])


def top_mean(values: Values, clusters: Sequence[str], count: int, *, seed: int) -> Interval:
    """Return the mean of the `count` units whose values [U, N] are highest, without the gain of having picked them.

    Half of the documents choose the units, the other half is what they are judged by, and the other way round: so every
    document counts once, in the mean of units that it had no part in choosing. A mean over the same documents that chose
    profits from their noise (the winner's curse). Needs two clusters.
    """
    first = alternate_halves(clusters)
    assert 0 < first.sum() < len(first), "one cluster cannot be halved"
    held_out = np.empty(values.shape[1])
    for chooses in (first, ~first):
        order = np.argsort(-values[:, chooses].mean(1), kind="stable")
        held_out[~chooses] = values[order[:count]][:, ~chooses].mean(0)
    return mean_with_interval(held_out, clusters, seed=seed)
