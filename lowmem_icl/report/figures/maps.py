"""Maps of heads: a panel per task and shot count, all on one symmetric-log scale with one bar."""

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from lowmem_icl.report.figures.layout import (
    Asked,
    PanelSize,
    Record,
    axis_labels,
    few_ticks,
    grow,
    shots_of,
    task_panels,
    tasks_of,
)
from lowmem_icl.report.figures.scales import X_DISTANCE, SymLog, number
from lowmem_icl.report.figures.style import LINE, PALE

Grid = NDArray[np.float64]
BELOW_BAR = 0.08
"""In inches, between a scale and the titles of the maps below it."""


def shape_of(record: Record) -> tuple[int, int]:
    """Return a model's layers and heads per layer."""
    return record["model"]["layers"], record["model"]["heads"]


def unit_grid(heads: pl.DataFrame, shape: tuple[int, int]) -> Grid:
    """Return the values of heads [L, H], NaN where there is none."""
    grid = np.full(shape, np.nan)
    grid[heads["layer"].to_numpy(), heads["head"].to_numpy()] = heads["value"].to_numpy()
    return grid


class MapScale:
    """The scale and the colours that all maps of a figure share; values: of all maps.

    Without negative values they are shades of one colour, from 0.
    """

    def __init__(self, values: Grid) -> None:
        self.scale = SymLog.of(values).mirrored()
        self.norm = self.scale.norm()
        colours = "RdBu_r" if self.scale.low < 0 else "Blues"
        self.colours = matplotlib.colormaps[colours].with_extremes(bad=PALE)

    def draw(self, axis: Axes, grid: Grid) -> AxesImage:
        """Draw a map [L, H], layer 0 at the bottom; heads without a value are grey."""
        for spine in axis.spines.values():
            spine.set_visible(True)
            spine.set_linewidth(LINE / 2)
        return axis.imshow(
            grid, origin="lower", aspect="auto", interpolation="none", cmap=self.colours, norm=self.norm
        )

    def bar(self, figure: Figure, image: AxesImage, label: str) -> None:
        """Put the scale above all maps of a figure."""
        width, height = figure.get_size_inches()
        inches = min(3.0, width - 0.6)
        bar = figure.colorbar(
            image, ax=figure.axes, location="top", orientation="horizontal", fraction=0.05, aspect=36,
            shrink=inches / (width - 0.4), pad=BELOW_BAR / height, anchor=(0, 0),
        )  # fmt: skip
        marks = self.scale.ticks(inches, X_DISTANCE)
        bar.set_ticks(marks, labels=[number(mark) for mark in marks])
        bar.minorticks_off()
        bar.ax.tick_params(length=1.5, pad=1)
        bar.set_label(label, loc="left", labelpad=2)
        bar.ax.spines["outline"].set_linewidth(LINE / 2)
        grow(figure, 0.42 + BELOW_BAR)


def head_maps(records: pl.DataFrame, record: Record, asked: Asked, label: str) -> Figure | None:
    """Draw the values of heads as a map per task and shot count; label: of the scale, with its unit."""
    heads = asked.of(records.filter(pl.col("kind") == "head"))
    if heads.is_empty():
        return None
    shape = shape_of(record)
    size = PanelSize(0.9, shape[0] / shape[1], 0.3, 1.9)
    panels = task_panels(asked, tasks_of(heads), shots_of(heads), size)
    scale = MapScale(heads["value"].to_numpy())
    by_panel = heads.partition_by("task", "shots", as_dict=True)
    image = None
    for task, shots, axis in panels:
        image = scale.draw(axis, unit_grid(by_panel.get((task, shots), heads.clear()), shape))
        few_ticks(axis, "x", panels.width, integer=True, bounds=True)
        few_ticks(axis, "y", panels.height, integer=True, bounds=True)
    axis_labels(panels.figure, "head", "layer")
    assert image is not None
    scale.bar(panels.figure, image, label)
    return panels.figure
