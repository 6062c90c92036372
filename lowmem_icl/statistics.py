"""Intervals and agreement measures, computed from plain arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]

RESAMPLES = 1000
ROWS_TOGETHER = 512


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


class Intervals(NamedTuple):
    """Means [U] with their standard errors and the bounds of their 95 % intervals."""

    value: Values
    stderr: Values
    low: Values
    high: Values


def means_with_intervals(values: Values, clusters: Sequence[str], *, seed: int) -> Intervals:
    """Return the means of values [U, N] over N with a percentile bootstrap over clusters, the same draws for all U.

    Documents of one cluster (a passage) are drawn together. Of a single cluster nothing can be said: its standard
    error is NaN and its bounds are the mean.
    """
    mean = values.mean(1)
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return Intervals(mean, np.full(len(mean), np.nan), mean, mean)
    order = np.argsort(member, kind="stable")
    starts = np.flatnonzero(np.diff(member[order], prepend=-1))
    sums = np.add.reduceat(values[:, order], starts, axis=1)
    weights = _resampled_weights(len(names), seed)
    drawn_sizes = weights @ np.bincount(member).astype(np.float64)
    stderr, low, high = np.empty(len(mean)), np.empty(len(mean)), np.empty(len(mean))
    for start in range(0, len(mean), ROWS_TOGETHER):
        part = slice(start, start + ROWS_TOGETHER)
        means = (sums[part] @ weights.T) / drawn_sizes
        stderr[part] = means.std(1, ddof=1)
        low[part], high[part] = np.quantile(means, [0.025, 0.975], axis=1)
    return Intervals(mean, stderr, low, high)


def mean_with_interval(values: Values, clusters: Sequence[str], *, seed: int) -> Interval:
    """Return the mean of values [N] with a percentile bootstrap over clusters, as `means_with_intervals` does."""
    return Interval(*(float(one[0]) for one in means_with_intervals(values[None], clusters, seed=seed)))


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
