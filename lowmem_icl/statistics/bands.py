"""Bands of random draws: where the next draw will lie.

Axis letters: K draws.
"""

import numpy as np
import scipy
from numpy.typing import NDArray

from lowmem_icl.statistics.intervals import CONFIDENCE

Values = NDArray[np.float64]


LEAST_DRAWS = 5
"""With fewer, a band can miss the next draw in one of five cases, where draws are of few kinds or near 1."""


def prediction_band(draws: Values, lowest: float = -np.inf, highest: float = np.inf) -> tuple[float, float]:
    """Return the bounds of the 95 % prediction interval of one more draw, from draws [K]; NaN for fewer than
    LEAST_DRAWS.

    Student's: mean ± t · s · √(1 + 1/K) with K − 1 degrees of freedom, within `lowest` and `highest`, and
    never narrower than the draws themselves. On the side where draws lie farther from their mean, s is of
    that side: s² = 2 Σ distance² / (K − 1). Quantiles of ten draws would hold four of five.
    """
    count = len(draws)
    if count < LEAST_DRAWS:
        return np.nan, np.nan
    mean, square = draws.mean(), draws.var(ddof=1)
    quantile = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * np.sqrt(1 + 1 / count)
    below, above = (np.square(np.maximum(sign * (draws - mean), 0)).sum() / (count - 1) for sign in (-1, 1))
    low = min(mean - quantile * np.sqrt(max(square, 2 * below)), draws.min())
    high = max(mean + quantile * np.sqrt(max(square, 2 * above)), draws.max())
    return float(np.clip(low, lowest, highest)), float(np.clip(high, lowest, highest))
