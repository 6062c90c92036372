"""Certificates: tests that a mean loss is at most a tolerance, valid for any number of documents.

Losses are at most 1, as those of a probability or of an accuracy are; nothing else is assumed but that
clusters of documents are independent of each other and of what chose the masks.

Axis letters: N documents, G clusters.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.statistics.clusters import cluster_numbers, cluster_sums

Values = NDArray[np.float64]
Verdict = Literal["holds", "fails", "cannot tell"]

LEVEL = 0.05
"""How often a certificate may be wrong, over all masks of one path."""
# Most is put on the largest bet, which needs the fewest documents where nothing is lost; the smaller ones
# stand larger losses of single documents.
BETS = np.array([1.0, 0.5, 0.25, 0.125])
"""As shares of the largest bet, 1 / (1 - tolerance), at which a loss of 1 takes all."""
SHARES = np.array([0.85, 0.05, 0.05, 0.05])
"""Of the capital, by bet."""


def p_value_of_loss(losses: Values, tolerance: float) -> Values:
    """Return the p-values of "the mean loss is above the tolerance", [...], from independent losses [..., G],
    at most 1 each.

    A bet against it: with capital Σ share · Π (1 + bet · (tolerance - loss)) over the bets, which under the
    hypothesis is not expected to grow, and so reaches 1 / p with probability p at most (Ville's inequality;
    Waudby-Smith and Ramdas 2023, section 4). The largest capital along the clusters, in their order, counts.
    """
    bets = BETS / (1 - tolerance)
    with np.errstate(divide="ignore"):
        factors = np.log(np.maximum(1 + bets * (tolerance - losses[..., None]), 0))
    capital = np.logaddexp.reduce(np.log(SHARES) + factors.cumsum(-2), axis=-1)
    return np.asarray(np.exp(-np.maximum(capital.max(-1), 0)))


def documents_needed(tolerance: float) -> int:
    """Return with how many documents, losing nothing each, `p_value_of_loss` first is at most LEVEL: about
    3 / tolerance.
    """

    def is_enough(count: int) -> bool:
        grown = np.log(SHARES) + count * np.log1p(BETS * tolerance / (1 - tolerance))
        return bool(np.logaddexp.reduce(grown) >= -math.log(LEVEL))

    too_few, enough = 0, 1
    while not is_enough(enough):
        too_few, enough = enough, 2 * enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if is_enough(middle) else (middle, enough)
    return enough


def passed_in_order(p_values: Sequence[float]) -> int:
    """Return how many tests of a sequence, fixed beforehand, pass before the first that does not.

    All of them hold together with probability 1 - LEVEL (fixed-sequence testing; Angelopoulos et al. 2021,
    Learn then Test, section 4).
    """
    return next((number for number, p in enumerate(p_values) if not p <= LEVEL), len(p_values))


def cluster_means(values: Values, clusters: Sequence[str]) -> Values:
    """Return the means over the documents of every cluster, [..., G] from [..., N], clusters in order of
    appearance.
    """
    return np.asarray(cluster_sums(values, clusters) / np.bincount(cluster_numbers(clusters)))


def verdict(low: float | None, high: float | None, tolerance: float) -> Verdict:
    """Return whether a loss whose interval has these bounds keeps a tolerance; no interval tells nothing."""
    if low is None or high is None:
        return "cannot tell"
    if high <= tolerance:
        return "holds"
    return "fails" if low > tolerance else "cannot tell"
