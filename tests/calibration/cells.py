"""Cells of a calibration: how often intervals of one kind of data hold the truth, and the table of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

LOWEST_COVERAGE = 0.93
RARELY_GIVEN = 0.05
"""Where fewer samples than these have an interval, the tool says that it has none."""
ROUNDING = 1e-12


@dataclass(frozen=True)
class Cell:
    """Which share of the samples had an interval, and how many of these intervals held the truth."""

    name: str
    samples: int
    given: int
    holding: int
    width: float

    @property
    def share_given(self) -> float:
        """Return the share of samples with an interval."""
        return self.given / self.samples

    @property
    def coverage(self) -> float:
        """Return the share of intervals that hold the truth; NaN where there are none."""
        return self.holding / self.given if self.given else float("nan")

    @property
    def coverage_error(self) -> float:
        """Return the Monte Carlo standard error of a coverage of LOWEST_COVERAGE."""
        return float(np.sqrt(LOWEST_COVERAGE * (1 - LOWEST_COVERAGE) / max(self.given, 1)))


def cell(name: str, low: Values, high: Values, truth: Values | float) -> Cell:
    """Return the cell of one interval per sample, [S] each; NaN where a sample has none."""
    given = np.isfinite(low) & np.isfinite(high)
    holds = (low <= truth + ROUNDING) & (truth <= high + ROUNDING)
    width = float(np.median((high - low)[given])) if given.any() else float("nan")
    return Cell(name, len(low), int(given.sum()), int((given & holds).sum()), width)


def check(cells: Iterable[Cell]) -> None:
    """Fail where intervals are given but hold less often than LOWEST_COVERAGE, naming the cells.

    As far as samples can tell: two Monte Carlo standard errors below it fail nothing.
    """
    cells = list(cells)
    assert cells
    failing = [
        f"{one.name}: {one.coverage:.3f}"
        for one in cells
        if one.share_given > RARELY_GIVEN and one.coverage + 2 * one.coverage_error < LOWEST_COVERAGE
    ]
    assert not failing, failing


def markdown(cells: Iterable[Cell]) -> str:
    """Return the table of docs/numbers.md."""
    lines = ["| what | with an interval | coverage | width |", "|---|--:|--:|--:|"]
    for one in cells:
        coverage = f"{one.coverage:.3f}" if one.share_given > RARELY_GIVEN else "—"
        width = f"{one.width:.2g}" if one.share_given > RARELY_GIVEN else "—"
        lines.append(f"| {one.name} | {one.share_given:.0%} | {coverage} | {width} |")
    return "\n".join(lines)
