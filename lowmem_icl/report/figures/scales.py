"""The symmetric-log scale of drops and scores: linear near 0, logarithmic beyond, the same on both sides."""

from dataclasses import dataclass
from math import ceil, log10

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

Values = NDArray[np.float64]
DECADES = 3
"""Powers of ten below the largest value that are told apart; smaller values lie close to 0."""
LINEAR_SHARE = 0.4
"""Length of the linear part on either side of 0, in decades."""
X_DISTANCE, Y_DISTANCE = 0.28, 0.13
"""Inches that ticks need."""


@dataclass(frozen=True)
class SymLog:
    """Where the scale is linear, and the smallest and largest value on it; the smallest is 0 or below."""

    linear: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Values) -> "SymLog":
        """Return the scale of values; of none or zeros alone, one up to 1."""
        finite = values[np.isfinite(values)]
        largest = float(np.abs(finite).max(initial=0.0)) or 1.0
        linear = 10.0 ** (ceil(log10(largest)) - DECADES)
        return cls(linear, float(finite.min(initial=0.0)), float(finite.max(initial=0.0)) or linear)

    def mirrored(self) -> "SymLog":
        """Return the scale that reaches as far below 0 as above, where it reaches below."""
        largest = max(-self.low, self.high)
        return SymLog(self.linear, -largest if self.low < 0 else 0.0, largest)

    def norm(self) -> SymLogNorm:
        """Return the scale as that of a map's colours."""
        return SymLogNorm(self.linear, linscale=LINEAR_SHARE, vmin=self.low, vmax=self.high)

    def ticks(self, inches: float, distance: float) -> list[float]:
        """Return 0 and the powers of ten that fit on an axis, the outer before the inner."""
        powers = [self.linear * 10**power for power in range(DECADES + 1)]
        outer = [sign * power for power in reversed(powers) for sign in (1, -1)]
        places = {tick: self._place(tick) for tick in (0.0, *outer) if self.low <= tick <= self.high * 1.0001}
        length = (self._place(self.high) - self._place(self.low)) or 1.0
        kept: list[float] = []
        for tick, place in places.items():
            if all(abs(place - places[other]) / length * inches >= distance for other in kept):
                kept.append(tick)
        return sorted(kept)

    def set_on(self, axis: Axes, which: str, inches: float) -> None:
        """Give an axes' "x" or "y" this scale, with some room at both ends."""
        beyond = 1.5
        low, high = (min(self.low, -self.linear / 4) * beyond, max(self.high, self.linear) * beyond)
        wider = SymLog(self.linear, low, high)
        along = axis.xaxis if which == "x" else axis.yaxis
        if which == "x":
            axis.set_xscale("symlog", linthresh=self.linear, linscale=LINEAR_SHARE)
            axis.set_xlim(low, high)
        else:
            axis.set_yscale("symlog", linthresh=self.linear, linscale=LINEAR_SHARE)
            axis.set_ylim(low, high)
        marks = wider.ticks(inches, X_DISTANCE if which == "x" else Y_DISTANCE)
        along.set_minor_locator(NullLocator())
        along.set_ticks(marks, [number(mark) for mark in marks])

    def _place(self, value: float) -> float:
        """Return where a value lies, in decades from 0."""
        size = abs(value) / self.linear
        # As matplotlib: a linear part that continues into decades of equal length.
        beyond = LINEAR_SHARE / 0.9 + log10(size) if size > 1 else size * LINEAR_SHARE / 0.9
        return float(np.sign(value)) * beyond


def number(value: float) -> str:
    """Return a tick's number, with a true minus."""
    return f"{value:g}".replace("-", "−")
