"""How well scores find a set of units: measures with their value under chance and 95 % intervals over units.

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
    """A value, the bounds of its 95 % interval (NaN where there is none), and what unrelated scores give on average."""

    value: float
    low: float
    high: float
    chance: float


def rank_correlation(one: Values, other: Values) -> Measure:
    """Return Spearman's correlation of two scores [U], with Bonett and Wright's (2000) interval; NaN where one is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return Measure(np.nan, np.nan, np.nan, 0.0)
    value = float(stats.spearmanr(one, other).statistic)
    if len(one) <= 3 or abs(value) >= 1:
        return Measure(value, np.nan, np.nan, 0.0)
    reach = Z * np.sqrt((1 + value**2 / 2) / (len(one) - 3))
    low, high = np.tanh(np.arctanh(value) + np.array([-reach, reach]))
    return Measure(value, float(low), float(high), 0.0)


def precision_at(scores: Values, members: Flags, count: int) -> Measure:
    """Return the share of members among the `count` units with the highest scores, with Wilson's interval.

    scores, members: [U]; of equal scores the first units count as higher.
    """
    top = np.argsort(-scores, kind="stable")[:count]
    hits = int(members[top].sum())
    interval = stats.binomtest(hits, count).proportion_ci(method="wilson")
    return Measure(hits / count, float(interval.low), float(interval.high), float(members.mean()))


def area_under_curve(scores: Values, members: Flags) -> Measure:
    """Return how often a member's score lies above another unit's, ties half: the area under the ROC curve.

    scores, members: [U]. The interval is Newcombe's (2006, method 5), which holds for few members and near 0 and 1; NaN
    where all units are members, or none.
    """
    inside, outside = int(members.sum()), int((~members).sum())
    if not inside or not outside:
        return Measure(np.nan, np.nan, np.nan, 0.5)
    ranks = stats.rankdata(scores)
    value = float((ranks[members].sum() - inside * (inside + 1) / 2) / (inside * outside))
    others = (inside + outside) / 2 - 1

    def beyond(true: float) -> float:
        spread = 1 + others * ((1 - true) / (2 - true) + true / (1 + true))
        return (true - value) ** 2 - Z**2 * true * (1 - true) * spread / (inside * outside)

    return Measure(value, _root(beyond, 0.0, value), _root(beyond, 1.0, value), 0.5)


def _root(function: Callable[[float], float], end: float, value: float) -> float:
    """Return where a function that is at most 0 at `value` becomes 0 on the way to `end`."""
    if end == value:
        return end
    # At the very ends the variance is 0, whatever was observed.
    inner = value + 1e-9 * (end - value) if function(value) == 0 else value
    return float(optimize.brentq(function, inner, end)) if function(inner) < 0 else value
