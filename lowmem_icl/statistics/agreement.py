"""Intervals and agreement measures, computed from plain arrays."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from lowmem_icl.statistics.intervals import Values


class Overlap(NamedTuple):
    """A shared fraction and what unrelated rankings would share on average."""

    value: float
    chance: float


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
