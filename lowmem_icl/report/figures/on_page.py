"""What the page's figures share: style, axes, maps of heads, and how a figure becomes part of the page."""

import io
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.section import PageFigure

Arguments = ParamSpec("Arguments")

# Okabe and Ito's colours, distinct under every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
STYLE = {
    "svg.hashsalt": "lowmem-icl",
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "figure.facecolor": "white",
    # Dollar signs in names are no formulas.
    "text.parse_math": False,
}


def page_figure(
    name: str,
    caption: str,
    draw: Callable[Arguments, Figure | None],
    *arguments: Arguments.args,
    **keywords: Arguments.kwargs,
) -> tuple[PageFigure, ...]:
    """Return what `draw` draws of the arguments after it, in our style; nothing where that is None.

    The same numbers give the same SVG.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Names in scripts that the font lacks appear as boxes; the tables have them in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = draw(*arguments, **keywords)
        if figure is None:
            return ()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return (PageFigure(name, text[text.index("<svg") :], caption),)


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, NDArray[np.object_]]:
    """Return a figure and its axes, [rows, columns]; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend_label(name: str) -> str:
    """Return a name as a legend shows it; matplotlib hides labels that start with an underscore."""
    return f" {name}" if name.startswith("_") else name


def error_bars(records: pl.DataFrame) -> NDArray[np.float64]:
    """Return how far 95 % intervals reach below and above their values, [2, N]; 0 where there is none."""
    value, low, high = (records[name].to_numpy() for name in ("value", "low", "high"))
    return np.nan_to_num(np.maximum(np.stack([value - low, high - value]), 0))


def task_order(tasks: Iterable[str]) -> list[str]:
    """Return each task once, in order of appearance, their mean last."""
    return sorted(dict.fromkeys(tasks), key=lambda task: task == AGGREGATE)


def unit_grid(records: pl.DataFrame, layers: int, heads: int) -> NDArray[np.float64]:
    """Return head values as an array [L, H], NaN where there is none."""
    grid = np.full((layers, heads), np.nan)
    head_records = records.filter(pl.col("kind") == "head")
    grid[head_records["layer"].to_numpy(), head_records["head"].to_numpy()] = head_records["value"].to_numpy()
    return grid


def draw_head_map(
    axis: Axes, grid: NDArray[np.float64], *, signed: bool, largest: float | None = None
) -> None:
    """Draw a map of heads [L, H], layer 0 at the bottom, with a colour bar up to the largest value."""
    if largest is None:
        largest = float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 1.0
    image = axis.imshow(
        grid,
        origin="lower",
        aspect="auto",
        cmap="RdBu_r" if signed else "viridis",
        vmin=-largest if signed else 0,
        vmax=largest or 1.0,
    )
    axis.figure.colorbar(image, ax=axis, fraction=0.05)
    layers = len(grid)
    axis.set_yticks(range(0, layers, max(1, layers // 4)))


def head_maps(results: pl.DataFrame, metric: str, shape: tuple[int, int], label: str) -> Figure | None:
    """Draw a metric of heads as a map per task (down) and shot count (across).

    Each map has its own colour scale; shape: layers and heads.
    """
    records = results.filter((pl.col("metric") == metric) & (pl.col("kind") == "head"))
    if records.is_empty():
        return None
    tasks, shots = task_order(records["task"]), sorted(set(records["shots"]))
    height = max(1.0, min(2.4, 0.22 * shape[0] + 0.5))
    figure, axes = new_figure(
        min(10, 2.7 * len(shots) + 0.6), height * len(tasks) + 0.3, len(tasks), len(shots)
    )
    signed = bool((records["value"] < 0).any())
    for row, task in enumerate(tasks):
        for column, n_shots in enumerate(shots):
            axis = axes[row, column]
            panel = records.filter((pl.col("task") == task) & (pl.col("shots") == n_shots))
            draw_head_map(axis, unit_grid(panel, *shape), signed=signed)
            axis.set_title(f"{task}, {n_shots} shots", fontsize=8)
            if column == 0:
                axis.set_ylabel("layer")
            if row == len(tasks) - 1:
                axis.set_xlabel("head")
    figure.suptitle(label, fontsize=9)
    return figure
