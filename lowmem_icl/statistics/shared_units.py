"""How many units two sets share, beside what sets drawn at random would: of all units, or within layers.

Axis letters: L layers, H units of a layer.
"""

from functools import reduce
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

Flags = NDArray[np.bool_]


class Chance(NamedTuple):
    """How many units sets drawn at random share on average, and how probable it is that they share at least
    as many as these do.
    """

    expected: float
    p_value: float


def chance_of_sharing(left: Flags, right: Flags) -> Chance:
    """Return the chance of two sets, [L, H] each, of as many units drawn from all: hypergeometric."""
    sizes = np.array([[left.sum(), right.sum()]])
    return _chance(int((left & right).sum()), sizes, left.size)


def chance_within_layers(left: Flags, right: Flags) -> Chance:
    """Return the chance of sets that have as many units of every layer as these, drawn layer by layer: what
    two sets share because they lie equally deep is not counted as agreement.
    """
    sizes = np.stack([left.sum(1), right.sum(1)], 1)
    return _chance(int((left & right).sum()), sizes, left.shape[1])


def _chance(shared: int, sizes: NDArray[np.int64], units: int) -> Chance:
    """Return the chance of sets drawn group by group, `sizes` [groups, 2], each from so many units."""
    expected = float((sizes[:, 0] * sizes[:, 1]).sum() / units)
    groups = [
        scipy.stats.hypergeom.pmf(np.arange(min(pair) + 1), units, *pair)
        for pair in sizes.tolist()
        if all(pair)
    ]
    total = reduce(np.convolve, groups, np.ones(1))
    return Chance(expected, float(min(1.0, total[shared:].sum())))
