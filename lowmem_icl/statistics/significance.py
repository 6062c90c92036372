"""Which of many means differ from zero, at a false discovery rate over all of them.

Axis letters: U units.
"""

import numpy as np
from scipy import stats

from lowmem_icl.statistics.intervals import Estimates, Values


def q_values(estimates: Estimates) -> Values:
    """Return Benjamini and Hochberg's adjusted p-values [U] of "the mean is not zero", two-sided.

    The p-values are Student's t of the clustered standard errors, not those of a sign-flip test: among
    thousands of units a claim needs p below 1e-5, which would take a hundred thousand flips of every document
    under every unit.
    """
    distance = np.abs(estimates.value)
    # Where all documents agree exactly, the mean is either 0 and no finding, or certain.
    ratio = np.where(distance > 0, np.inf, 0.0)
    np.divide(distance, estimates.stderr, out=ratio, where=estimates.stderr > 0)
    return np.asarray(stats.false_discovery_control(2 * stats.t.sf(ratio, estimates.freedom)))
