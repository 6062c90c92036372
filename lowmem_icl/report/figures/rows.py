"""Dot plots: a row per task, a panel per shot count or one for all, values with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.layout import new_figure, share_ticks, shots_title
from lowmem_icl.report.figures.names import short_names
from lowmem_icl.report.figures.scales import number
from lowmem_icl.report.figures.style import GREY, LINE, PALE, SMALL

WIDEST_NAME = 0.85
"""In inches, of a task's name left of its row."""


def bounds_of(records: pl.DataFrame) -> NDArray[np.float64]:
    """Return how far 95 % intervals reach below and above their values, [2, N]; 0 where there is none."""
    value, low, high = (records[name].to_numpy() for name in ("value", "low", "high"))
    return np.nan_to_num(np.maximum(np.stack([value - low, high - value]), 0))


@dataclass(frozen=True)
class RowPanels:
    """A figure of rows: its axes by shot count (None: all of them), and the width of one in inches."""

    figure: Figure
    axes: Mapping[int | None, Axes]
    width: float


@dataclass(frozen=True)
class TaskRows:
    """Rows of tasks, the first on top; lanes: so many values stand below each other in a row."""

    tasks: Sequence[str]
    lanes: int

    def panels(self, width: float, shots: Sequence[int] = (), margin: float = 0.0) -> RowPanels:
        """Return a figure of a width with panels side by side that share the rows, a shot count's each.

        shots: none for one panel of all; margin: inches right of every panel.
        """
        count = max(1, len(shots))
        panel_width = (width - WIDEST_NAME - 0.15) / count - 0.08 - margin
        row = 0.07 + 0.075 * self.lanes
        figure = new_figure(width, row * len(self.tasks) + 0.45 + 0.2 * bool(shots))
        axes = figure.subplots(1, count, sharey=True, squeeze=False)[0].tolist()
        for place, axis in enumerate(axes):
            self.set_up(axis, panel_width)
            axis.tick_params(labelleft=place == 0)
            if shots:
                axis.set_title(shots_title(shots[place], panel_width))
        return RowPanels(figure, dict(zip(shots or (None,), axes, strict=True)), panel_width)

    def set_up(self, axis: Axes, panel_width: float) -> None:
        """Give axes the rows with their names, and an x axis from 0 to 1; panel_width: in inches."""
        axis.set_ylim(len(self.tasks) - 0.5, -0.5)
        axis.set_yticks(range(len(self.tasks)), list(short_names(self.tasks, WIDEST_NAME).values()))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        for index in range(1, len(self.tasks)):
            is_mean = self.tasks[index] == AGGREGATE
            axis.axhline(index - 0.5, color=GREY if is_mean else PALE, linewidth=LINE, zorder=0)
        share_ticks(axis, "x", panel_width)

    def lane(self, records: pl.DataFrame, lane: int) -> NDArray[np.float64]:
        """Return the heights of records on a lane of their tasks' rows, [N]."""
        rows = np.array([self.tasks.index(task) for task in records["task"]], dtype=np.float64)
        return rows + (lane - (self.lanes - 1) / 2) * 0.8 / self.lanes

    def dots(self, axis: Axes, records: pl.DataFrame, lane: int, colour: str, marker: str) -> None:
        """Draw values with their intervals; those in column `at_chance`, where there is one, are hollow."""
        heights = self.lane(records, lane)
        axis.errorbar(
            records["value"].to_numpy(), heights, xerr=bounds_of(records), fmt="none",
            ecolor=colour, elinewidth=1.5 * LINE, zorder=2,
        )  # fmt: skip
        hollow = np.zeros(len(records), bool)
        if "at_chance" in records.columns:
            hollow = records["at_chance"].to_numpy()
        for is_hollow in (False, True):
            axis.plot(
                records["value"].to_numpy()[hollow == is_hollow], heights[hollow == is_hollow], marker,
                color=colour, markerfacecolor="white" if is_hollow else colour, markeredgewidth=1.5 * LINE,
                zorder=3,
            )  # fmt: skip

    def ticks(self, axis: Axes, records: pl.DataFrame, column: str, colour: str, style: str) -> None:
        """Draw a line through a task's row at the value in a column, such as chance, where it is known."""
        known = records.filter(pl.col(column).is_not_null()).unique(["task", column], maintain_order=True)
        rows = np.array([self.tasks.index(task) for task in known["task"]], dtype=np.float64)
        axis.vlines(
            known[column].to_numpy(), rows - 0.42, rows + 0.42,
            colors=colour, linestyles=style, linewidth=1.6 * LINE, zorder=1,
        )  # fmt: skip


def loss_ticks(axis: Axes, values: NDArray[np.float64], inches: float) -> None:
    """Set an x axis of losses, which begins at 0 or below, with so many ticks as fit."""
    low, high = min(0.0, float(values.min())), max(0.05, float(values.max()))
    axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    places = MaxNLocator(max(2, min(5, int(inches / 0.34))), min_n_ticks=2).tick_values(low, high)
    marks = [float(mark) for mark in places if low <= mark <= high]
    axis.set_xticks(marks, [number(mark) for mark in marks])
    for tick in axis.xaxis.get_major_ticks():
        tick.label1.set_horizontalalignment("center")


def line_key(colour: str, style: str = "-") -> Artist:
    """Return what stands for a line in a key."""
    return Line2D([], [], color=colour, linestyle=style, linewidth=1.6 * LINE)


def tick_key(colour: str, style: str = "solid") -> Artist:
    """Return what stands for an upright tick in a key."""
    if style == "solid":
        return Line2D(
            [], [], color=colour, marker="|", linestyle="", markersize=SMALL, markeredgewidth=1.6 * LINE
        )
    return Line2D([], [], color=colour, linestyle=":", linewidth=1.6 * LINE)


def dot_key(colour: str, marker: str = "o", *, hollow: bool = False) -> Artist:
    """Return what stands for a dot with its interval in a key."""
    return Line2D(
        [], [], color=colour, marker=marker, markerfacecolor="white" if hollow else colour,
        linewidth=1.5 * LINE, markeredgewidth=1.5 * LINE,
    )  # fmt: skip


def marker_key(colour: str, marker: str = "o", *, hollow: bool = False) -> Artist:
    """Return what stands for a dot alone in a key."""
    return Line2D(
        [], [], color=colour, marker=marker, linestyle="", markerfacecolor="white" if hollow else colour,
        markersize=4.5 if hollow else 3, markeredgewidth=1.5 * LINE,
    )  # fmt: skip


def band_key(colour: str = PALE) -> Artist:
    """Return what stands for a band in a key."""
    return Patch(facecolor=colour, edgecolor="none")
