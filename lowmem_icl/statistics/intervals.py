"""Means with standard errors and 95 % intervals, over documents that may agree within clusters.

The one place that computes an interval. Which method holds its rate depends on what the values are, so every
caller says their kind; tests/calibration measures the rates, docs/numbers.md says what each method is.

Axis letters: U units, N documents, G clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from lowmem_icl.statistics.clusters import cluster_numbers, cluster_sums

Values = NDArray[np.float64]

CONFIDENCE = 0.95
TRANSFORMED_CONFIDENCE = 0.97
"""Of Hall's interval, which alone falls short of its rate for skewed values of few documents."""
FEWEST_DIFFERENT = 5
"""Where fewer documents differ from the others, they say nothing of how often such documents are."""
FEW_FAILURES = 3
SMALLEST_SKEWNESS = 1e-6
SMALLEST_DISTANCE = 1e-6
"""Of the largest distance from the median: below it, a difference is one of rounding."""


@dataclass(frozen=True)
class Kind:
    """What values of documents are, and with that which interval holds its rate for their mean.

    `proportion`: each is 0 or 1; `bounded`: none lies outside `lowest` and `highest`; `mean`: any number.
    """

    method: Literal["proportion", "bounded", "mean"]
    lowest: float = -np.inf
    highest: float = np.inf


PROPORTION = Kind("proportion", 0, 1)
SHARE = Kind("bounded", 0, 1)
CHANGE = Kind("bounded", -1, 1)
"""The difference of two proportions of the same documents."""
CHANGE_OF_CHANGES = Kind("bounded", -2, 2)
MEAN = Kind("mean")


class Interval(NamedTuple):
    """A mean with its standard error and the bounds of its 95 % interval; NaN where there is none."""

    value: float
    stderr: float
    low: float
    high: float


class Intervals(NamedTuple):
    """Means [U], their standard errors and the bounds of their 95 % intervals; NaN where there is none."""

    value: Values
    stderr: Values
    low: Values
    high: Values


def mean_intervals(values: Values, clusters: Sequence[str], kind: Kind) -> Intervals:
    """Return the means of values [U, N] over N with 95 % intervals; documents of a cluster count as drawn
    together.

    proportion: Wilson's interval (1927) at the effective number of documents, with Student's quantile, and
    near 0 and 1 with Poisson bounds (Brown, Cai and DasGupta 2001, section 4.1.1). bounded: the interval of
    Bonett and Price (2012), one document added at either bound. mean: the hull of Student's interval and
    Hall's (1992), which allows for skewness; none where fewer than FEWEST_DIFFERENT clusters differ from the
    rest. A single cluster says nothing about others: no interval, and a standard error that is NaN.

    Of G clusters: stderr² = G / (G − 1) · Σ_clusters (Σ_documents value − mean)² / N², with G − 1 degrees of
    freedom where clusters are of one size (Cameron and Miller 2015), else with the effective number of
    clusters in G's place.
    """
    grouped = _Grouped.of(np.asarray(values, dtype=np.float64), clusters)
    if grouped.clusters < 2:
        unknown = np.full(len(grouped.mean), np.nan)
        return Intervals(grouped.mean, unknown, unknown, unknown)
    low, high = _METHODS[kind.method](grouped, kind)
    return Intervals(grouped.mean, grouped.stderr, low, high)


def mean_interval(values: Values, clusters: Sequence[str], kind: Kind) -> Interval:
    """Return the mean of values [N] with its interval, as `mean_intervals` does."""
    return Interval(*(float(column[0]) for column in mean_intervals(values[None], clusters, kind)))


def statistic_interval(value: float, stderr: float, clusters: Sequence[str]) -> Interval:
    """Return the interval of a statistic between 0 and 1 that is no mean (an F1), from its standard error.

    Wilson's, at the number of documents at which a proportion would have this standard error.
    """
    sizes = np.bincount(cluster_numbers(clusters))
    if len(sizes) < 2 or not np.isfinite(stderr) or not 0 <= value <= 1:
        return Interval(value, stderr, np.nan, np.nan)
    most = effective_count(sizes)
    n_effective = min(most, value * (1 - value) / stderr**2 + 1) if stderr > 0 else most
    low, high = wilson_bounds(np.array([value]), np.array([n_effective]), most - 1)
    return Interval(value, stderr, float(low[0]), float(high[0]))


def mean_of_intervals(members: Intervals) -> Intervals:
    """Return the means over T independent estimates with intervals, each column [U, T].

    Zou and Donner's method (2008) for sums, which needs nothing of the estimates but their bounds: how far a
    mean's bound lies from it is the root of the summed squares of its members' distances, over T. A member
    without a standard error (one cluster) is left out of that, as if its error were the others' average;
    where one has an error but no interval, or none has an error, the mean has no interval.
    """
    n_members = members.value.shape[1]
    has_error = np.isfinite(members.stderr)
    lacks_bounds = (has_error & ~np.isfinite(members.low)).any(1) | ~has_error.any(1)

    def combined(distance: Values) -> Values:
        squares = np.square(np.where(has_error, distance, 0.0)).sum(1)
        return np.asarray(np.sqrt(squares / np.maximum(has_error.sum(1), 1) / n_members))

    # Of infinite ones there is no mean, which NaN says.
    with np.errstate(invalid="ignore", over="ignore"):
        value = members.value.mean(1)
        stderr = np.where(has_error.any(1), combined(members.stderr), np.nan)
        below, above = combined(members.value - members.low), combined(members.high - members.value)
        low, high = value - below, value + above
    return Intervals(value, stderr, np.where(lacks_bounds, np.nan, low), np.where(lacks_bounds, np.nan, high))


def mean_of_estimates(members: Sequence[Interval]) -> Interval:
    """Return the mean of independent estimates with intervals, as `mean_of_intervals` does."""
    columns = (np.array([column], dtype=np.float64) for column in zip(*members, strict=True))
    return Interval(*(float(column[0]) for column in mean_of_intervals(Intervals(*columns))))


def documents_for(stderr: float, count: int, distance: float) -> int:
    """Return how many independent documents a mean needs so that its 95 % interval reaches no farther than
    `distance`, from its standard error over `count` of them: as many as show a mean of that size to differ
    from 0, on average every other time.

    Student's interval: the least n with t · stderr · √(count / n) ≤ distance, t of n − 1 degrees of freedom;
    at least 2.
    """
    spread = stderr * np.sqrt(count)
    few, enough = 1, 2

    def reaches_too_far(documents: int) -> bool:
        quantile = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, documents - 1)
        return bool(quantile * spread / np.sqrt(documents) > distance)

    while reaches_too_far(enough):
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (middle, enough) if reaches_too_far(middle) else (few, middle)
    return enough


def effective_count(sizes: NDArray[np.int64]) -> float:
    """Return how many clusters of one size weigh as much as clusters of these sizes: (Σ size)² / Σ size²."""
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


def wilson_bounds(proportion: Values, count: Values, freedom: float) -> tuple[Values, Values]:
    """Return Wilson's bounds of proportions [U] of `count` documents, Student's quantile in the normal's
    place; both within [0, 1].
    """
    quantile = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)
    centre = proportion + quantile**2 / (2 * count)
    reach = quantile * np.sqrt(proportion * (1 - proportion) / count + np.square(quantile / (2 * count)))
    shrunk = 1 + quantile**2 / count
    # At 0 and 1 they are exactly these; rounding would leave the value outside.
    low = np.where(proportion > 0, (centre - reach) / shrunk, 0)
    high = np.where(proportion < 1, (centre + reach) / shrunk, 1)
    low = np.minimum(low, _poisson_bound(proportion, count))
    high = np.maximum(high, 1 - _poisson_bound(1 - proportion, count))
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


def _poisson_bound(proportion: Values, count: Values) -> Values:
    """Return the lower bound of a proportion of few successes; else 1, which bounds nothing.

    Where one success was seen, Wilson's lower bound excludes rates that show none in one sample of six.
    """
    successes = proportion * count
    is_rare = (successes > 0) & (successes <= FEW_FAILURES)
    bound = scipy.stats.gamma.ppf(1 - CONFIDENCE, np.where(is_rare, successes, 1.0)) / count
    return np.where(is_rare, bound, 1.0)


@dataclass(frozen=True, eq=False)
class _Grouped:
    """Values [U, N] by cluster; `deviations` [U, G]: Σ of value − mean over a cluster's documents."""

    values: Values
    names: Sequence[str]
    mean: Values
    deviations: Values
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, values: Values, names: Sequence[str]) -> "_Grouped":
        mean = values.mean(1)
        deviations = cluster_sums(values - mean[:, None], names)
        return cls(values, names, mean, deviations, np.bincount(cluster_numbers(names)))

    @property
    def clusters(self) -> int:
        return len(self.sizes)

    @property
    def documents(self) -> int:
        return self.values.shape[1]

    @property
    def freedom(self) -> float:
        return effective_count(self.sizes) - 1

    @property
    def stderr(self) -> Values:
        groups = self.clusters
        if groups < 2:
            return np.full(len(self.mean), np.nan)
        squares = np.square(self.deviations).sum(1)
        return np.asarray(np.sqrt(groups / (groups - 1) * squares) / self.documents)

    @property
    def different(self) -> NDArray[np.int64]:
        """How many clusters have a document whose value is not that of the median document, [U]."""
        distance = np.abs(self.values - np.median(self.values, axis=1, keepdims=True))
        differs = distance > SMALLEST_DISTANCE * distance.max(1, keepdims=True)
        return np.asarray((cluster_sums(differs.astype(np.int64), self.names) > 0).sum(1))

    @property
    def effective_documents(self) -> Values:
        """How many independent documents would say as much, [U]: their variance over the clustered one.

        At most as many as there are. Where the documents that differ are of few clusters, nobody knows how
        far those of a cluster agree, and clusters count instead.
        """
        alone = self.values.var(1) / (self.documents - 1)
        clustered = np.square(self.stderr)
        known = (self.different >= FEWEST_DIFFERENT) & (clustered > 0)
        count = np.full(len(self.mean), effective_count(self.sizes))
        np.divide(alone * self.documents, clustered, out=count, where=known)
        return np.minimum(count, self.documents)


def _wilson_of(grouped: _Grouped, kind: Kind) -> tuple[Values, Values]:
    bounds = wilson_bounds(grouped.mean, grouped.effective_documents, grouped.freedom)
    return _at_least_skewed(grouped, kind, *bounds)


def _bounded_of(grouped: _Grouped, kind: Kind) -> tuple[Values, Values]:
    """Return Bonett and Price's bounds, of values that all lie within the kind's."""
    count = grouped.effective_documents
    added = np.array([kind.lowest, kind.highest])
    mean = (count * grouped.mean + added.sum()) / (count + 2)
    square = (count * np.square(grouped.values).mean(1) + np.square(added).sum()) / (count + 2)
    stderr = np.sqrt(np.maximum(square - np.square(mean), 0) / (count + 2))
    reach = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, grouped.freedom) * stderr
    return _at_least_skewed(grouped, kind, mean - reach, mean + reach)


def _at_least_skewed(grouped: _Grouped, kind: Kind, low: Values, high: Values) -> tuple[Values, Values]:
    """Return bounds within the kind's that also hold where a few clusters are unlike the others."""
    if grouped.clusters < grouped.documents:
        skewed_low, skewed_high = _hull(grouped)
        low, high = np.minimum(low, skewed_low), np.maximum(high, skewed_high)
    return np.clip(low, kind.lowest, kind.highest), np.clip(high, kind.lowest, kind.highest)


def _skewed_of(grouped: _Grouped, kind: Kind) -> tuple[Values, Values]:
    """Return the hull of Student's and Hall's bounds; NaN where too few clusters differ from the others."""
    low, high = _hull(grouped)
    too_few = grouped.different < min(FEWEST_DIFFERENT, grouped.clusters - 1)
    return np.where(too_few, np.nan, low), np.where(too_few, np.nan, high)


def _hull(grouped: _Grouped) -> tuple[Values, Values]:
    reach = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, grouped.freedom) * grouped.stderr
    low, high = grouped.mean - reach, grouped.mean + reach
    if grouped.clusters > 2:
        hall_low, hall_high = _hall_bounds(grouped)
        low, high = np.minimum(low, hall_low), np.maximum(high, hall_high)
    return low, high


def _hall_bounds(grouped: _Grouped) -> tuple[Values, Values]:
    """Return the bounds from a cubic transformation that removes the statistic's skewness (Hall 1992).

    With T = (mean − true mean) / stderr, g(T) = T + γT²/(3√G) + γ²T³/(27G) + γ/(6√G) is nearly symmetric;
    Student's quantiles go back through its inverse. γ: the skewness, without its bias in small samples.
    """
    groups = grouped.clusters
    second = np.square(grouped.deviations).mean(1)
    third = (grouped.deviations**3).mean(1)
    skewness = np.zeros(len(second))
    np.divide(third, second**1.5, out=skewness, where=second > 0)
    skewness *= np.sqrt(groups * (groups - 1)) / (groups - 2)
    skewness = np.where(np.abs(skewness) < SMALLEST_SKEWNESS, SMALLEST_SKEWNESS, skewness)
    quantile = scipy.stats.t.ppf(0.5 + TRANSFORMED_CONFIDENCE / 2, grouped.freedom) / np.sqrt(groups)

    def inverse(transformed: float) -> Values:
        shifted = transformed - skewness / (6 * groups)
        return np.asarray(3 / skewness * (np.cbrt(1 + skewness * shifted) - 1))

    spread = grouped.stderr * np.sqrt(groups)
    return grouped.mean - spread * inverse(quantile), grouped.mean - spread * inverse(-quantile)


_METHODS = {"proportion": _wilson_of, "bounded": _bounded_of, "mean": _skewed_of}
