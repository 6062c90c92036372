"""Rankings under other documents: what they could as well have been, and how far one half of them says what the other does.

Axis letters: R resamples, N documents, U units.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from lowmem_icl.statistics.intervals import Interval

RESAMPLES = 200
SPLITS = 50
UNITS_TOGETHER = 512
# How far a resample goes from all documents once to documents as they were drawn.
STEP = 0.5
# Where Fisher's transform would be infinite.
LARGEST_CORRELATION = 1 - 1e-9

Values = NDArray[np.float64]
Draw = Callable[[int, np.random.Generator], NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """What each document of a task adds to the scores of its units: score u is Σ_n values[n, u] / Σ_n sizes[n].

    values: [N, U]; sizes: [N, 1], ones where the score is a mean over documents, predicted tokens where it is the gradient
    score (Bansal et al. 2023, eq. 8), or [N, U] where units differ in them. clusters [N]: the passages or sets of
    demonstrations that documents are drawn by.
    """

    task: str
    values: NDArray[np.floating[Any]]
    sizes: Values
    clusters: tuple[str, ...]

    @classmethod
    def of_mean(
        cls, task: str, values: NDArray[np.floating[Any]], clusters: Sequence[str]
    ) -> "DocumentScores":
        """Return scores that are means over documents of values [N, U]."""
        return cls(task, values, np.ones((len(values), 1)), tuple(clusters))

    def under(self, counts: Values) -> Values:
        """Return the scores [R, U] where document n counts counts[r, n] times, a few units at a time."""
        scores = np.empty((len(counts), self.values.shape[1]))
        for start in range(0, scores.shape[1], UNITS_TOGETHER):
            part = slice(start, start + UNITS_TOGETHER)
            scores[:, part] = counts @ self.values[:, part].astype(np.float64)
        return scores / (counts @ self.sizes)

    def drawn(self, seed: int) -> Values:
        """Return how often each document is drawn in each of RESAMPLES bootstrap samples, [R, N].

        Documents of a cluster are drawn together. The same task with the same clusters gets the same draws, so that
        rankings of the same documents at two shot counts or by two methods are resampled as a pair; others are independent.
        """
        return self._by_cluster(
            "resample",
            seed,
            lambda groups, rng: rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES),
        )

    def halved(self, seed: int) -> Values:
        """Return which documents are in the first half, 1 or 0, in each of SPLITS random halvings by cluster, [R, N]."""
        return self._by_cluster(
            "halve",
            seed,
            lambda groups, rng: rng.permuted(np.tile(np.arange(groups) < groups // 2, (SPLITS, 1)), axis=1),
        )

    def _by_cluster(self, purpose: str, seed: int, draw: Draw) -> Values:
        names, member = np.unique(np.asarray(self.clusters), return_inverse=True)
        named = hashlib.sha256("\0".join([purpose, self.task, *names.tolist()]).encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(named[:8], "little")])
        return draw(len(names), rng)[:, member].astype(np.float64)


@dataclass(frozen=True, eq=False)
class DocumentRanking:
    """A ranking by its documents: of one task, or an aggregate of several, by their ranks or by their raw scores."""

    members: tuple[DocumentScores, ...]
    combined_by: Literal["ranks", "scores"] = "ranks"

    @property
    def documents(self) -> int:
        """Documents of all tasks."""
        return sum(len(member.values) for member in self.members)

    @property
    def can_be_split(self) -> bool:
        """Whether each task has two clusters at least, without which nothing can be said about other documents."""
        return all(len(set(member.clusters)) > 1 for member in self.members)

    def ranks(self, counts: Sequence[Values]) -> Values:
        """Return every unit's rank [R, U], from each member's documents counted so often, [R, N] each."""
        scores = [member.under(count) for member, count in zip(self.members, counts, strict=True)]
        if self.combined_by == "ranks" and len(scores) > 1:
            scores = [rankdata(one, axis=1) for one in scores]
        return np.asarray(rankdata(np.mean(scores, axis=0), axis=1))

    def resampled(self, seed: int) -> NDArray[np.float32]:
        """Return standardised ranks [R, U], the weights of documents being STEP of the way to RESAMPLES bootstrap samples.

        Ranks of a whole bootstrap sample hold the documents' noise twice, and so vary too little between samples.
        """
        return standardised(self.ranks([1 + STEP * (member.drawn(seed) - 1) for member in self.members]))


def standardised(ranks: Values) -> NDArray[np.float32]:
    """Return ranks [R, U] with mean 0 and length 1, so that products are Spearman's; NaN where all are equal."""
    centred = ranks - ranks.mean(1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(
        centred, lengths, out=np.full(centred.shape, np.nan), where=lengths > 0
    ).astype(np.float32)  # fmt: skip


def correlation_interval(
    value: float, one: NDArray[np.float32], other: NDArray[np.float32]
) -> Interval | None:
    """Return a rank correlation's 95 % interval from the standardised ranks [R, U] of both rankings in every resample.

    It is value ± 1.96 standard deviations on Fisher's scale, atanh: those of the resamples, divided by the STEP that these
    go. Not their percentiles: a resample adds noise to both rankings, so that they lie too low. What it covers is the
    correlation that as many other documents would give; without the rankings' noise it would be higher, and how much noise
    there is the split-half reliability tells.
    None where some resample ranks all units the same.
    """
    resampled = np.einsum("ru,ru->r", one, other, dtype=np.float64)
    if not np.isfinite(resampled).all():
        return None
    bounded = np.clip([value, *resampled], -LARGEST_CORRELATION, LARGEST_CORRELATION)
    centre, *spread = np.arctanh(bounded)
    reach = 1.96 * float(np.std(spread, ddof=1)) / STEP
    return Interval(
        value,
        float(resampled.std(ddof=1)) / STEP,
        float(np.tanh(centre - reach)),
        float(np.tanh(centre + reach)),
    )


def split_half(ranking: DocumentRanking, seed: int) -> float:
    """Return a ranking's split-half reliability: how far another set of as many documents would give the same ranking.

    r is Spearman's between the rankings of two random halves of the documents (of every task, by cluster), mean over
    SPLITS halvings; returned is 2 r / (1 + |r|), Spearman and Brown's correction to the whole number of documents. It is
    the ceiling of any rank correlation between rankings of other documents: with reliabilities a and b none above √(a·b) can
    be expected, whatever the units do; rankings of the same documents share their noise and may exceed it. NaN where a task has a single cluster or a half ranks all units the same.
    """
    if not ranking.can_be_split:
        return float("nan")
    first = [member.halved(seed) for member in ranking.members]
    halves = [standardised(ranking.ranks(counts)) for counts in (first, [1 - counts for counts in first])]
    r = float(np.einsum("ru,ru->r", *halves, dtype=np.float64).mean())
    return 2 * r / (1 + abs(r))
