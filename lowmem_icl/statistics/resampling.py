"""Rankings under other documents: intervals of their correlations, and split-half reliability.

Axis letters: R resamples, N documents, U units.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from lowmem_icl.statistics.agreement import top_membership
from lowmem_icl.statistics.intervals import CONFIDENCE, Interval, wilson_bounds

RESAMPLES = 200
KENDALL_RESAMPLES = 20
SPLITS = 50
UNITS_TOGETHER = 512
# How far weights go from 1 for every document towards the counts of a bootstrap sample.
STEP = 0.5
# Beyond it Fisher's transform would be infinite.
LARGEST_CORRELATION = 1 - 1e-9
SMALLEST_SPREAD = 1e-12
MOST_PER_UNIT = 2

Values = NDArray[np.float64]
Draw = Callable[[int, np.random.Generator], NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """What each document of a task contributes to its units' scores.

    Score u is Σ_n values[n, u] / Σ_n sizes[n]. values: [N, U]; sizes: [N, 1], ones where the score is a mean
    over documents, predicted tokens where it is the gradient score (Bansal et al. 2023, eq. 8), or [N, U]
    where they differ between units. clusters [N]: the passage or set of demonstrations of each document,
    which is drawn as a whole.
    """

    task: str
    values: NDArray[np.floating[Any]]
    sizes: Values
    clusters: tuple[str, ...]

    @classmethod
    def of_mean(
        cls, task: str, values: NDArray[np.floating[Any]], clusters: Sequence[str]
    ) -> "DocumentScores":
        """Return the contributions to scores that are means over documents of values [N, U]."""
        return cls(task, values, np.ones((len(values), 1)), tuple(clusters))

    def weighted(self, weights: Values) -> Values:
        """Return the scores [R, U] in which document n has the weight weights[r, n]."""
        scores = np.empty((len(weights), self.values.shape[1]))
        for start in range(0, scores.shape[1], UNITS_TOGETHER):
            part = slice(start, start + UNITS_TOGETHER)
            scores[:, part] = weights @ self.values[:, part].astype(np.float64)
        return scores / (weights @ self.sizes)

    def bootstrap_counts(self, seed: int) -> Values:
        """Return how often each document is drawn in each of RESAMPLES bootstrap samples, [R, N].

        Documents of a cluster are drawn together. The same task with the same clusters gets the same draws,
        so rankings of the same documents at two shot counts or by two methods are resampled as a pair; all
        others are independent.
        """
        return self._by_cluster(
            "resample",
            seed,
            lambda groups, rng: rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES),
        )

    def first_halves(self, seed: int) -> Values:
        """Return which documents are in the first half, as 1 or 0, in each of SPLITS random splits, [R, N].

        Documents of a cluster are in the same half.
        """
        return self._by_cluster(
            "halve",
            seed,
            lambda groups, rng: rng.permuted(np.tile(np.arange(groups) < groups // 2, (SPLITS, 1)), axis=1),
        )

    def _by_cluster(self, purpose: str, seed: int, draw: Draw) -> Values:
        names, member = np.unique(np.asarray(self.clusters), return_inverse=True)
        digest = hashlib.sha256("\0".join([purpose, self.task, *names.tolist()]).encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
        return draw(len(names), rng)[:, member].astype(np.float64)


@dataclass(frozen=True, eq=False)
class DocumentRanking:
    """A ranking and the documents behind it: of one task, or of several by their ranks or raw scores."""

    members: tuple[DocumentScores, ...]
    combined_by: Literal["ranks", "scores"] = "ranks"

    @property
    def documents(self) -> int:
        """Number of documents of all tasks."""
        return sum(len(member.values) for member in self.members)

    @property
    def can_be_split(self) -> bool:
        """Whether each task has two clusters or more, without which nothing is known of other documents."""
        return all(len(set(member.clusters)) > 1 for member in self.members)

    def ranks(self, weights: Sequence[Values]) -> Values:
        """Return every unit's rank [R, U], from the weights of each member's documents, [R, N] each."""
        scores = [member.weighted(weight) for member, weight in zip(self.members, weights, strict=True)]
        if self.combined_by == "ranks" and len(scores) > 1:
            scores = [scipy.stats.rankdata(score, axis=1) for score in scores]
        return np.asarray(scipy.stats.rankdata(np.mean(scores, axis=0), axis=1))

    def resampled(self, seed: int) -> "ResampledRanking":
        """Return the ranking under documents weighted STEP of the way to bootstrap samples.

        Ranks of a full bootstrap sample contain the documents' noise twice, so they vary too little between
        samples.
        """
        clusters = [len(set(member.clusters)) for member in self.members]
        weights = [
            # A bootstrap of few clusters varies too little: as a variance over G does in place of G - 1.
            1 + STEP * np.sqrt(count / (count - 1)) * (member.bootstrap_counts(seed) - 1)
            for member, count in zip(self.members, clusters, strict=True)
        ]
        return ResampledRanking(standardised(self.ranks(weights)), sum(clusters) - len(clusters))


@dataclass(frozen=True, eq=False)
class ResampledRanking:
    """A ranking under other weights of its documents: standardised ranks [R, U], and degrees of freedom."""

    ranks: NDArray[np.float32]
    freedom: int


def standardised(ranks: Values) -> NDArray[np.float32]:
    """Return ranks [R, U] with mean 0 and length 1, whose products are Spearman's ρ; NaN for constants."""
    centred = ranks - ranks.mean(1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(
        centred, lengths, out=np.full(centred.shape, np.nan), where=lengths > 0
    ).astype(np.float32)  # fmt: skip


def correlation_interval(value: float, left: ResampledRanking, right: ResampledRanking) -> Interval | None:
    """Return the 95 % interval of Spearman's ρ of two rankings.

    On Fisher's scale, atanh, it is the value ± Student's quantile of standard deviations of the resamples
    divided by STEP. The resamples' percentiles would lie too low, since each resample adds noise to both
    rankings. The interval covers the correlation that as many other documents would give. Without the
    rankings' noise that would be higher; the split-half reliability says how much noise there is. None where
    some resample ranks all units the same.
    """
    resampled = _correlations(left, right)
    return _fisher_interval(value, resampled, 1.0, left, right)


def kendall_interval(value: float, left: ResampledRanking, right: ResampledRanking) -> Interval | None:
    """Return the 95 % interval of Kendall's τ of two rankings, as that of ρ.

    Its standard deviation is that of ρ, times the ratio of both in the first KENDALL_RESAMPLES: in resamples
    they go together, and τ takes a hundred times as long.
    """
    resampled = _correlations(left, right)
    if not np.isfinite(resampled).all():
        return None
    some = [
        scipy.stats.kendalltau(one, other, method="asymptotic").statistic
        for one, other in zip(left.ranks[:KENDALL_RESAMPLES], right.ranks[:KENDALL_RESAMPLES], strict=True)
    ]
    ratio = _fisher(some).std(ddof=1) / max(_fisher(resampled[: len(some)]).std(ddof=1), SMALLEST_SPREAD)
    return _fisher_interval(value, resampled, ratio, left, right)


def overlap_interval(
    value: float, count: int, left: ResampledRanking, right: ResampledRanking
) -> Interval | None:
    """Return the 95 % interval of the share of the top `count` units that two rankings have in common.

    Wilson's, with Student's quantile, at the number of units of which a share would have the resamples'
    standard deviation divided by STEP; at most at MOST_PER_UNIT · `count`, since where no resample moves a
    unit over the edge other documents may.
    """
    if not (np.isfinite(left.ranks).all() and np.isfinite(right.ranks).all()):
        return None
    shared = top_membership(left.ranks, count) * top_membership(right.ranks, count)
    shares = shared.sum(1) / count
    stderr = float(shares.std(ddof=1)) / STEP
    most = MOST_PER_UNIT * count
    n_units = min(most, value * (1 - value) / stderr**2) if stderr > 0 and 0 < value < 1 else count
    low, high = wilson_bounds(np.array([value]), np.array([n_units]), min(left.freedom, right.freedom))
    return Interval(value, stderr, float(low[0]), float(high[0]))


def _correlations(left: ResampledRanking, right: ResampledRanking) -> Values:
    return np.asarray(np.einsum("ru,ru->r", left.ranks, right.ranks, dtype=np.float64))


def _fisher(correlations: Values | list[float]) -> Values:
    return np.asarray(np.arctanh(np.clip(correlations, -LARGEST_CORRELATION, LARGEST_CORRELATION)))


def _fisher_interval(
    value: float, resampled: Values, ratio: float, left: ResampledRanking, right: ResampledRanking
) -> Interval | None:
    """Return the interval of a coefficient that varies `ratio` times as much as the resampled ones [R]."""
    if not np.isfinite(resampled).all():
        return None
    spread = ratio * float(_fisher(resampled).std(ddof=1)) / STEP
    reach = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, min(left.freedom, right.freedom)) * spread
    centre = float(_fisher([value])[0])
    low, high = np.tanh(centre + np.array([-reach, reach]))
    return Interval(value, spread * (1 - value**2), float(low), float(high))


def split_half(ranking: DocumentRanking, seed: int) -> float:
    """Return a ranking's split-half reliability: the rank correlation expected with as many other documents.

    r is Spearman's ρ between the rankings of two random halves of the documents (of every task, by cluster),
    averaged over SPLITS splits; 2 r / (1 + |r|) is returned, the Spearman-Brown correction to the full number
    of documents. It limits the correlation of rankings from different documents: with reliabilities a and b
    no more than √(a·b) can be expected, whatever the units do. Rankings of the same documents share their
    noise and may exceed it. NaN where a task has a single cluster or where a half ranks all units the same.
    """
    if not ranking.can_be_split:
        return float("nan")
    first = [member.first_halves(seed) for member in ranking.members]
    second = [1 - weights for weights in first]
    halves = [standardised(ranking.ranks(weights)) for weights in (first, second)]
    r = float(np.einsum("ru,ru->r", *halves, dtype=np.float64).mean())
    return 2 * r / (1 + abs(r))
