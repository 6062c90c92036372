"""How well scores of units detect others: measures with their chance value and 95 % intervals over layers.

Units of a layer are alike, so the intervals are over layers, as if these were drawn: a jackknife that leaves
out one layer after the other. Two scores that go with layers but not with each other agree by more than units
drawn one by one would let them.

Axis letters: L layers, H units of a layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from lowmem_icl.statistics.agreement import spearman, top_membership
from lowmem_icl.statistics.intervals import wilson_bounds

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]

FEWEST_LAYERS = 3
FEWEST_WITH_MEMBERS = 5
"""Where fewer layers have a member, or a non-member, they say nothing of how often others have."""
JACKKNIFE_CONFIDENCE = 0.97
"""Of Student's quantile on Fisher's scale, which falls a little short of 95 % where scores go with layers."""
LARGEST_CORRELATION = 1 - 1e-9
COUNTED_SHARE = 0.8
"""Of the units that the jackknife's standard error is worth, which is a little too small where scores go with
layers."""
MOST_PER_MEMBER = 2
"""Units that a detection rate can be worth: where no left-out layer changes it, other layers still may."""


class Measure(NamedTuple):
    """A value, the bounds of its 95 % interval (NaN where there is none), and its mean by chance."""

    value: float
    low: float
    high: float
    chance: float


def rank_correlation(left: Values, right: Values) -> Measure:
    """Return Spearman's correlation of two scores [L, H]; NaN where one is constant.

    The interval is Student's with L − 1 degrees of freedom on Fisher's scale, from the jackknife over layers.
    """
    value = spearman(left.ravel(), right.ravel())
    if len(left) < FEWEST_LAYERS:
        return Measure(value, np.nan, np.nan, 0.0)
    parts = [spearman(*(np.delete(scores, layer, 0).ravel() for scores in (left, right)))
             for layer in range(len(left))]  # fmt: skip
    centre, *without = np.arctanh(np.clip([value, *parts], -LARGEST_CORRELATION, LARGEST_CORRELATION))
    reach = scipy.stats.t.ppf(0.5 + JACKKNIFE_CONFIDENCE / 2, len(left) - 1) * _jackknife_stderr(
        np.array(without)
    )
    low, high = np.tanh(centre + np.array([-reach, reach]))
    return Measure(value, float(low), float(high), 0.0)


def r_precision(scores: Values, members: Flags) -> Measure:
    """Return the share of members among the highest scores, of which as many are taken as there are members.

    scores, members: [L, H]. Equal scores are put in random order, of which this is the mean. NaN without
    members.
    """

    def precision(some_scores: Values, some_members: Flags) -> float:
        count = int(some_members.sum())
        return float(top_membership(some_scores, count) @ some_members) / count if count else np.nan

    return _with_interval(precision, scores, members, float(members.mean()))


def area_under_curve(scores: Values, members: Flags) -> Measure:
    """Return the area under the ROC curve: how often a member outscores a non-member, ties counting half.

    scores, members: [L, H]. NaN where all units are members, or none.
    """

    def area(some_scores: Values, some_members: Flags) -> float:
        n_members, n_others = int(some_members.sum()), int((~some_members).sum())
        if not n_members or not n_others:
            return np.nan
        ranks = scipy.stats.rankdata(some_scores)[some_members]
        return float((ranks.sum() - n_members * (n_members + 1) / 2) / (n_members * n_others))

    return _with_interval(area, scores, members, 0.5)


def _with_interval(
    rate: Callable[[Values, Flags], float], scores: Values, members: Flags, chance: float
) -> Measure:
    """Return a rate [L, H] with Wilson's interval, at the number of units of which a share would have the
    jackknife's standard error; degrees of freedom are those of layers with a member.
    """
    value = rate(scores.ravel(), members.ravel())
    if min(int(flags.any(1).sum()) for flags in (members, ~members)) < FEWEST_WITH_MEMBERS:
        return Measure(value, np.nan, np.nan, chance)
    without = [rate(np.delete(scores, layer, 0).ravel(), np.delete(members, layer, 0).ravel())
               for layer in range(len(scores))]  # fmt: skip
    stderr = _jackknife_stderr(np.array(without))
    most = float(MOST_PER_MEMBER * members.sum())
    n_units = min(most, value * (1 - value) / stderr**2) if stderr > 0 and 0 < value < 1 else most
    with_member = int(members.any(1).sum())
    low, high = wilson_bounds(np.array([value]), np.array([COUNTED_SHARE * n_units]), with_member - 1)
    return Measure(value, float(low[0]), float(high[0]), chance)


def _jackknife_stderr(without: Values) -> float:
    """Return the standard error of a statistic from its values without each layer, [L]."""
    return float(np.sqrt((len(without) - 1) * without.var()))
