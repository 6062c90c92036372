"""Intervals and agreement measures, computed from plain arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]

RESAMPLES = 1000


class Interval(NamedTuple):
    """A mean with its standard error and the bounds of its 95 % interval."""

    value: float
    stderr: float
    low: float
    high: float


class Overlap(NamedTuple):
    """A shared fraction and what unrelated rankings would share on average."""

    value: float
    chance: float


def mean_with_interval(values: Values, clusters: Sequence[str], *, seed: int) -> Interval:
    """Return the mean of values [N] with a percentile bootstrap over clusters, not documents.

    Documents of one cluster (a passage) are drawn together. Of a single cluster nothing can be said: its standard
    error is NaN and its bounds are the mean.
    """
    mean = float(np.mean(values))
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return Interval(mean, float("nan"), mean, mean)
    sums = np.bincount(member, weights=values)
    sizes = np.bincount(member).astype(np.float64)
    weights = _resampled_weights(len(names), seed)
    means = (weights @ sums) / (weights @ sizes)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean, float(means.std(ddof=1)), float(low), float(high))


_weights: dict[tuple[int, int], Values] = {}


def _resampled_weights(clusters: int, seed: int) -> Values:
    """Return how often each cluster is drawn in each resample, [RESAMPLES, clusters]; the last draw is kept."""
    if (clusters, seed) not in _weights:
        _weights.clear()
        rng = np.random.default_rng(seed)
        _weights[clusters, seed] = rng.multinomial(
            clusters, np.full(clusters, 1 / clusters), size=RESAMPLES
        ).astype(np.float64)
    return _weights[clusters, seed]


def spearman(one: Values, other: Values) -> float:
    """Return the rank correlation of two scores [N] of the same units; NaN where one is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(stats.spearmanr(one, other).statistic)


def top_overlap(one: Values, other: Values, fraction: float) -> Overlap:
    """Return the share of the top ⌊fraction·N⌋ units of one score [N] that are in the other's top."""
    count = int(fraction * len(one))
    if count == 0:
        return Overlap(float("nan"), float("nan"))
    tops = [set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (one, other)]
    return Overlap(len(tops[0] & tops[1]) / count, count / len(one))
