"""Means with standard errors and 95 % intervals, over documents that may agree within clusters.

Axis letters: U units, N documents.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

Number = TypeVar("Number", float, Values)

NORMAL_95 = 1.96
"""Half the width of a normal 95 % interval, in standard errors."""
RESAMPLES = 1000
UNITS_TOGETHER = 512


class Interval(NamedTuple):
    """A mean with its standard error and the bounds of its 95 % interval."""

    value: float
    stderr: float
    low: float
    high: float


class Intervals(NamedTuple):
    """Means [U] with their standard errors and the bounds of their 95 % intervals."""

    value: Values
    stderr: Values
    low: Values
    high: Values


def normal_bounds(value: Number, stderr: Number) -> tuple[Number, Number]:
    """Return the bounds of normal 95 % intervals: value ± 1.96 standard errors."""
    return value - NORMAL_95 * stderr, value + NORMAL_95 * stderr


def means_with_intervals(values: Values, clusters: Sequence[str], *, seed: int) -> Intervals:
    """Return the means of values [U, N] over N with percentile bootstrap intervals over clusters.

    All units share the same draws, and documents of one cluster (a passage, or a set of demonstrations) are
    drawn together. A single cluster says nothing about others: its standard error is NaN and its bounds are
    the mean.
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
    for start in range(0, len(mean), UNITS_TOGETHER):
        part = slice(start, start + UNITS_TOGETHER)
        means = (sums[part] @ weights.T) / drawn_sizes
        stderr[part] = means.std(1, ddof=1)
        low[part], high[part] = np.quantile(means, [0.025, 0.975], axis=1)
    return Intervals(mean, stderr, low, high)


def mean_with_interval(values: Values, clusters: Sequence[str], *, seed: int) -> Interval:
    """Return the mean of values [N] with its interval, as `means_with_intervals` does."""
    return Interval(*(float(column[0]) for column in means_with_intervals(values[None], clusters, seed=seed)))


class Estimates(NamedTuple):
    """Means [U] with their standard errors and the degrees of freedom of these."""

    value: Values
    stderr: Values
    freedom: Values


def clustered_estimates(values: Values, clusters: Sequence[str]) -> Estimates:
    """Return the means of values [U, N] over N with cluster-robust standard errors.

    Of G clusters: stderr² = G / (G − 1) · Σ_clusters (Σ_documents value − mean)² / N², with G − 1 degrees of
    freedom (where each document is a cluster of its own, the usual standard error). NaN for a single cluster.
    """
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    mean, groups = values.mean(1), len(names)
    freedom = np.full(len(mean), groups - 1.0)
    if groups < 2:
        return Estimates(mean, np.full(len(mean), np.nan), freedom)
    order = np.argsort(member, kind="stable")
    starts = np.flatnonzero(np.diff(member[order], prepend=-1))
    sums = np.add.reduceat(values[:, order] - mean[:, None], starts, axis=1)
    stderr = np.sqrt(groups / (groups - 1) * np.square(sums).sum(1)) / values.shape[1]
    return Estimates(mean, stderr, freedom)


def mean_of_estimates(members: Sequence[Estimates]) -> Estimates:
    """Return the mean of independent estimates [U] each, degrees of freedom by Welch and Satterthwaite."""
    variances = np.square([member.stderr for member in members])
    each = np.square(variances) / np.array([member.freedom for member in members])
    total, freedom = variances.sum(0), np.array([member.freedom for member in members]).sum(0)
    np.divide(np.square(total), each.sum(0), out=freedom, where=each.sum(0) > 0)
    value = np.mean([member.value for member in members], axis=0)
    return Estimates(value, np.sqrt(total) / len(members), freedom)


_weights: dict[tuple[int, int], Values] = {}


def _resampled_weights(clusters: int, seed: int) -> Values:
    """Return how often each cluster is drawn in each resample, [RESAMPLES, clusters]; cached."""
    if (clusters, seed) not in _weights:
        _weights.clear()
        rng = np.random.default_rng(seed)
        _weights[clusters, seed] = rng.multinomial(
            clusters, np.full(clusters, 1 / clusters), size=RESAMPLES
        ).astype(np.float64)
    return _weights[clusters, seed]
