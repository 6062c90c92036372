"""Figure: how far rankings of heads agree between tasks, and could agree."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import polars as pl
import scipy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.layout import (
    TALLEST,
    Asked,
    Record,
    key_above,
    new_figure,
    shots_of,
    shots_text,
)
from lowmem_icl.report.figures.matrices import value_size, value_text, write_values
from lowmem_icl.report.figures.names import short_names, text_width
from lowmem_icl.report.figures.rows import TaskRows, dot_key, tick_key
from lowmem_icl.report.figures.scales import number
from lowmem_icl.report.figures.style import BLACK, LINE, NORMAL, PALE, SMALL, shot_colours

METHOD = "gradient"
TITLE_INCHES = 1.1
"""What the title of a matrix needs."""
NAME_INCHES = 0.8
"""The longest name of a task beside a matrix."""
Matrix = NDArray[np.float64]


def agreement_heads(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw rank correlations of heads between tasks, a matrix per shot count.

    Of the task asked for: a row per other task.
    """
    pairs = _pairs(results)
    if asked.task is not None:
        pairs = pairs.filter(pl.col("task") == asked.task)
    if pairs.is_empty():
        return None
    return _matrices(pairs, asked) if asked.task is None else _rows(pairs, asked)


def _pairs(results: pl.DataFrame) -> pl.DataFrame:
    """Return the correlations of different tasks at one shot count, each in both directions, with ceilings.

    A ceiling is √(a·b) of the two rankings' split-half reliabilities, null where one is unknown.
    """
    overlap = results.filter(
        (pl.col("experiment") == "overlap") & (pl.col("method") == METHOD) & (pl.col("task") != AGGREGATE)
    )
    one_way = overlap.filter(
        (pl.col("metric") == "spearman")
        & (pl.col("other_method") == METHOD)
        & (pl.col("shots") == pl.col("other_shots"))
        & (pl.col("other_task") != AGGREGATE)
        & (pl.col("other_task") != pl.col("task"))
    ).select("task", "other_task", "shots", "value", "low", "high")
    turned = one_way.rename({"task": "other_task", "other_task": "task"}).select(one_way.columns)
    reliability = overlap.filter(pl.col("metric") == "split_half").select(
        "task", "shots", pl.col("value").clip(lower_bound=0).alias("own")
    )
    others = reliability.rename({"task": "other_task", "own": "other"})
    return (
        pl.concat([one_way, turned])
        .join(reliability, on=["task", "shots"], how="left", maintain_order="left")
        .join(others, on=["other_task", "shots"], how="left", maintain_order="left")
        .with_columns(ceiling=(pl.col("own") * pl.col("other")).sqrt())
    )


def _matrices(pairs: pl.DataFrame, asked: Asked) -> Figure:
    shots = shots_of(pairs)
    grids, tasks = _ordered(pairs, shots)
    names = list(short_names(tasks, NAME_INCHES).values())
    pitch = SMALL * 1.25 / 72
    longest = max(map(text_width, names))
    room = asked.width - longest - 0.55
    across = max(1, min(len(shots), int(room / (max(TITLE_INCHES, pitch * len(tasks)) + 0.1))))
    down = -(-len(shots) // across)
    side = min(room / across - 0.1, 2.3, (TALLEST - 1) / down - 0.34)
    figure = new_figure(asked.width, down * (side + 0.34) + longest + 0.12)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    size = value_size(np.concatenate(grids), side / len(tasks), side / len(tasks))
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=PALE)
    for place, (axis, grid, n_shots) in enumerate(zip(axes, grids, shots, strict=False)):
        image = axis.imshow(grid, cmap=colours, vmin=-1, vmax=1, interpolation="none")
        if size is not None:
            write_values(axis, grid, image, size)
        axis.set_title(f"{shots_text(n_shots)}\n{_mean_text(pairs.filter(pl.col('shots') == n_shots))}")
        axis.set_xticks(range(len(tasks)), names, rotation=90)
        axis.set_yticks(range(len(tasks)), names)
        axis.tick_params(length=0, labelbottom=place + across >= len(shots), labelleft=place % across == 0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    for axis in axes[len(shots) :]:
        axis.remove()
    bar = figure.colorbar(
        image, ax=figure.axes, location="right", fraction=0.04, shrink=0.8, aspect=24, pad=0.02
    )
    bar.set_label("rank correlation")
    bar.set_ticks([-1, 0, 1], labels=["−1", "0", "1"])
    bar.ax.tick_params(length=1.5, pad=1)
    bar.ax.spines["outline"].set_linewidth(LINE / 2)
    return figure


def _ordered(pairs: pl.DataFrame, shots: Sequence[int]) -> tuple[list[Matrix], list[str]]:
    """Return a matrix [tasks, tasks] per shot count, similar tasks side by side in all of them."""
    tasks = list(dict.fromkeys([*pairs["task"], *pairs["other_task"]]))
    place = {task: index for index, task in enumerate(tasks)}
    grids = []
    for n_shots in shots:
        grid = np.full((len(tasks), len(tasks)), np.nan)
        for pair in pairs.filter(pl.col("shots") == n_shots).iter_rows(named=True):
            grid[place[pair["task"]], place[pair["other_task"]]] = pair["value"]
        grids.append(grid)
    order = _clustered(np.stack(grids)) if len(tasks) > 3 else np.arange(len(tasks))
    return [grid[np.ix_(order, order)] for grid in grids], [tasks[index] for index in order]


def _clustered(grids: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return an order of tasks by average linkage of their mean correlation over shots."""
    known = np.isfinite(grids)
    mean = np.where(known, grids, 0).sum(0) / np.maximum(known.sum(0), 1)
    distances = (1 - mean)[np.triu_indices(len(mean), 1)]
    tree = scipy.cluster.hierarchy.linkage(distances, "average", optimal_ordering=True)
    return np.asarray(scipy.cluster.hierarchy.leaves_list(tree), dtype=np.int64)


def _mean_text(pairs: pl.DataFrame) -> str:
    """Return the mean over pairs, and the mean of what it could be."""
    text = f"mean {value_text(float(np.mean(pairs['value'].to_numpy())))}"
    ceilings = pairs["ceiling"].drop_nulls()
    return f"{text}, ceiling {value_text(float(np.mean(ceilings.to_numpy())))}" if len(ceilings) else text


def _rows(pairs: pl.DataFrame, asked: Asked) -> Figure:
    shots = shots_of(pairs)
    others = pairs.select(pl.col("other_task").alias("task"), "shots", "value", "low", "high", "ceiling")
    rows = TaskRows(list(dict.fromkeys(others["task"])), len(shots))
    panels = rows.panels(asked.width)
    axis = panels.axes[None]
    colours = shot_colours(shots)
    for lane, n_shots in enumerate(shots):
        panel = others.filter(pl.col("shots") == n_shots)
        rows.dots(axis, panel, lane, colours[n_shots], "o")
        known = panel.filter(pl.col("ceiling").is_not_null())
        axis.plot(known["ceiling"], rows.lane(known, lane), "|", color=colours[n_shots], markersize=5)
    lowest = float(np.nanmin([*others["value"], *others["low"].drop_nulls(), -0.02]))
    axis.set_xlim(max(-1.02, lowest * 1.05), 1.02)
    marks = [mark for mark in (-1, -0.5, 0, 0.5, 1) if mark >= lowest]
    axis.set_xticks(marks, [number(mark) for mark in marks])
    axis.axvline(0, color=BLACK, linewidth=LINE, zorder=0)
    (name,) = short_names([str(asked.task)], asked.width - 2.2, NORMAL).values()
    axis.set_xlabel(f"rank correlation with {name}")
    entries = [(dot_key(colours[n_shots]), shots_text(n_shots)) for n_shots in shots]
    key_above(panels.figure, [*entries, (tick_key(BLACK), "ceiling")])
    return panels.figure
