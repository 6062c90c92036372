"""How far two scores of the same units agree.

Axis letters: N units.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from lowmem_icl.statistics.intervals import Values


class Overlap(NamedTuple):
    """A shared fraction and what unrelated rankings would share on average."""

    value: float
    chance: float


def spearman(left: Values, right: Values) -> float:
    """Return the rank correlation of two scores [N] of the same units; NaN where one is constant."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(scipy.stats.spearmanr(left, right).statistic)


def kendall(left: Values, right: Values) -> float:
    """Return Kendall's τ-b of two scores [N] of the same units; NaN where one is constant."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(scipy.stats.kendalltau(left, right).statistic)


def correlation_of_orders(left: Values, right: Values) -> float:
    """Return what the paper's code calls the rank correlation of two scores [N] (paper.md §4).

    It correlates the lists of unit indices in ascending order of importance: which unit has a rank, not which
    rank a unit has. Where units are exchangeable it is about 0, however well their orders agree. Its mean
    where equal scores are put in random order: sorted by index, all ties would agree.
    """
    middle = (len(left) - 1) / 2
    orders = [_expected_order(scores) - middle for scores in (left, right)]
    return float(orders[0] @ orders[1] / np.square(np.arange(len(left)) - middle).sum())


def _expected_order(scores: Values) -> Values:
    """Return the mean index of the units [N] that may stand at each place of the ascending order."""
    order = np.argsort(scores, kind="stable")
    ties = np.unique(scores[order], return_inverse=True)[1]
    return np.asarray((np.bincount(ties, weights=order) / np.bincount(ties))[ties])


def top_membership(scores: NDArray[np.floating[Any]], count: int) -> Values:
    """Return the probability of each unit to be among the `count` highest by scores [..., N], where equal
    scores are put in random order.
    """
    lowest = np.partition(scores, -count, axis=-1)[..., -count, None]
    above, tied = scores > lowest, scores == lowest
    places = count - above.sum(-1, keepdims=True)
    return np.asarray(above + tied * (places / tied.sum(-1, keepdims=True)))


def top_overlap(left: Values, right: Values, fraction: float) -> Overlap:
    """Return the share of the top ⌊fraction·N⌋ units by one score [N] that are among the top by the other.

    Where scores tie at the edge of a top, it is the mean over random choices among them, independent for both
    scores, so unrelated scores share ⌊fraction·N⌋ / N whether they tie or not.
    """
    count = int(fraction * len(left))
    if count == 0:
        return Overlap(float("nan"), float("nan"))
    shared = float(top_membership(left, count) @ top_membership(right, count))
    return Overlap(shared / count, count / len(left))
