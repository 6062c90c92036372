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


class Estimates(NamedTuple):
    """Means [U] with their standard errors and the degrees of freedom of these."""

    value: Values
    stderr: Values
    freedom: Values


def clustered_estimates(values: Values, clusters: Sequence[str]) -> Estimates:
    """Return the means of values [U, N] over N with standard errors that hold where documents agree within clusters.

    Of G clusters: stderr² = G / (G − 1) · Σ_clusters (Σ_documents value − mean)² / N², with G − 1 degrees of freedom (the
    usual cluster-robust variance of a mean; documents that are all alone give the usual one). NaN for a single cluster.
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


def kendall(one: Values, other: Values) -> float:
    """Return Kendall's τ-b of two scores [N] of the same units; NaN where one is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(stats.kendalltau(one, other).statistic)


def correlation_of_orders(one: Values, other: Values) -> float:
    """Return what the paper's code calls the rank correlation of two scores [N] (paper.md §4).

    It correlates the vectors of unit numbers in ascending order of importance: which unit stands at a place, not which place
    a unit has. Units that could change names without anything else changing give about 0, however well their orders agree.
    """
    return float(stats.spearmanr(np.argsort(one, kind="stable"), np.argsort(other, kind="stable")).statistic)


def top_overlap(one: Values, other: Values, fraction: float) -> Overlap:
    """Return the share of the top ⌊fraction·N⌋ units of one score [N] that are in the other's top."""
    count = int(fraction * len(one))
    if count == 0:
        return Overlap(float("nan"), float("nan"))
    tops = [set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (one, other)]
    return Overlap(len(tops[0] & tops[1]) / count, count / len(one))
