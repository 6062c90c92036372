"""How far two scores of the same units agree.

Axis letters: N units.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from lowmem_icl.statistics.intervals import Values


class Overlap(NamedTuple):
    """A shared fraction and what unrelated rankings would share on average."""

    value: float
    chance: float


def spearman(left: Values, right: Values) -> float:
    """Return the rank correlation of two scores [N] of the same units; NaN where one is constant."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(stats.spearmanr(left, right).statistic)


def kendall(left: Values, right: Values) -> float:
    """Return Kendall's τ-b of two scores [N] of the same units; NaN where one is constant."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(stats.kendalltau(left, right).statistic)


def correlation_of_orders(left: Values, right: Values) -> float:
    """Return what the paper's code calls the rank correlation of two scores [N] (paper.md §4).

    It correlates the lists of unit indices in ascending order of importance: which unit has a rank, not which
    rank a unit has. Where units are exchangeable it is about 0, however well their orders agree.
    """
    return float(stats.spearmanr(np.argsort(left, kind="stable"), np.argsort(right, kind="stable")).statistic)


def top_overlap(left: Values, right: Values, fraction: float) -> Overlap:
    """Return the share of the top ⌊fraction·N⌋ units by one score [N] that are among the top by the other."""
    count = int(fraction * len(left))
    if count == 0:
        return Overlap(float("nan"), float("nan"))
    tops = [set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (left, right)]
    return Overlap(len(tops[0] & tops[1]) / count, count / len(left))
