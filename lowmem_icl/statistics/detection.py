"""How well scores detect a set of units: measures with their chance value and 95 % intervals over units.

Axis letters: U units.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]

Z = float(stats.norm.ppf(0.975))


class Measure(NamedTuple):
    """A value, the bounds of its 95 % interval (NaN where there is none), and its mean by chance."""

    value: float
    low: float
    high: float
    chance: float


def rank_correlation(left: Values, right: Values) -> Measure:
    """Return Spearman's correlation of two scores [U]; NaN where one is constant.

    The interval is Bonett and Wright's (2000).
    """
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return Measure(np.nan, np.nan, np.nan, 0.0)
    value = float(stats.spearmanr(left, right).statistic)
    if len(left) <= 3 or abs(value) >= 1:
        return Measure(value, np.nan, np.nan, 0.0)
    reach = Z * np.sqrt((1 + value**2 / 2) / (len(left) - 3))
    low, high = np.tanh(np.arctanh(value) + np.array([-reach, reach]))
    return Measure(value, float(low), float(high), 0.0)


def precision_at(scores: Values, members: Flags, count: int) -> Measure:
    """Return the share of members among the `count` units with the highest scores, with Wilson's interval.

    scores, members: [U]; among equal scores the first unit counts as higher.
    """
    top = np.argsort(-scores, kind="stable")[:count]
    hits = int(members[top].sum())
    interval = stats.binomtest(hits, count).proportion_ci(method="wilson")
    return Measure(hits / count, float(interval.low), float(interval.high), float(members.mean()))


def area_under_curve(scores: Values, members: Flags) -> Measure:
    """Return the area under the ROC curve: how often a member outscores a non-member, ties counting half.

    scores, members: [U]. The interval is Newcombe's (2006, method 5), which holds for few members and near 0
    and 1. NaN where all units are members, or none.
    """
    n_members, n_others = int(members.sum()), int((~members).sum())
    if not n_members or not n_others:
        return Measure(np.nan, np.nan, np.nan, 0.5)
    ranks = stats.rankdata(scores)
    value = float((ranks[members].sum() - n_members * (n_members + 1) / 2) / (n_members * n_others))
    n_star = (n_members + n_others) / 2 - 1

    def excess(true: float) -> float:
        spread = 1 + n_star * ((1 - true) / (2 - true) + true / (1 + true))
        return (true - value) ** 2 - Z**2 * true * (1 - true) * spread / (n_members * n_others)

    return Measure(value, _root(excess, 0.0, value), _root(excess, 1.0, value), 0.5)


def _root(function: Callable[[float], float], end: float, value: float) -> float:
    """Return the root between `value` and `end` of a function that is at most 0 at `value`."""
    if end == value:
        return end
    # At 0 and 1 the variance is 0, whatever was observed.
    inner = value + 1e-9 * (end - value) if function(value) == 0 else value
    return float(optimize.brentq(function, inner, end)) if function(inner) < 0 else value
