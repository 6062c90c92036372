"""Bands of random draws: where the next draw will lie.

Axis letters: K draws.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lowmem_icl.statistics.intervals import CONFIDENCE

Values = NDArray[np.float64]


def prediction_band(draws: Values, lowest: float = -np.inf, highest: float = np.inf) -> tuple[float, float]:
    """Return the bounds of the 95 % prediction interval of one more draw, from draws [K]; NaN for one draw.

    Student's: mean ± t · s · √(1 + 1/K) with K − 1 degrees of freedom, within `lowest` and `highest`, and
    never narrower than the draws themselves. Quantiles of ten draws would hold the next one in four of five
    cases.
    """
    count = len(draws)
    if count < 2:
        return np.nan, np.nan
    reach = stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * draws.std(ddof=1) * np.sqrt(1 + 1 / count)
    low, high = min(draws.mean() - reach, draws.min()), max(draws.mean() + reach, draws.max())
    return float(np.clip(low, lowest, highest)), float(np.clip(high, lowest, highest))
