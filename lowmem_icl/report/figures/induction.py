"""Figures: scores of induction heads, what pruning leaves of them, and what their removal costs."""

import numpy as np
import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.report.figures.layout import (
    Asked,
    Record,
    axis_labels,
    few_ticks,
    key_above,
    new_figure,
    percent_ticks,
    shots_of,
    shots_text,
    tasks_of,
)
from lowmem_icl.report.figures.maps import MapScale, shape_of, unit_grid
from lowmem_icl.report.figures.rows import TaskRows, band_key, dot_key, line_key, loss_ticks, tick_key
from lowmem_icl.report.figures.style import BLACK, GREY, LINE, PALE, RED, shot_colours
from lowmem_icl.report.numbers import mean_over_tasks
from lowmem_icl.tables.schema import ACCURACIES

SCORES = {
    "prefix_matching": "prefix matching",
    "copying": "copying",
    "previous_token": "previous token",
    "copying_eigenvalues": "copying, eigenvalues",
}
CAPACITIES = ("prefix_matching", "copying")
RANDOM = "random orders"
LEAST_BAND = 0.03
"""Of a panel's width: of a band, so that one of no width is not taken for the line at 0."""


def induction_scores(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw a map of all heads per score; None for one task, since scores come from random sequences."""
    scores = _records(results).filter(pl.col("metric").is_in(list(SCORES)))
    if scores.is_empty() or asked.task is not None:
        return None
    shape = shape_of(record)
    metrics = [metric for metric in SCORES if (scores["metric"] == metric).any()]
    across = min(len(metrics), 4 if asked.width > 5 else 2)
    down = -(-len(metrics) // across)
    width = (asked.width - 0.5) / across - 0.08
    height = max(0.6, min(width * shape[0] / shape[1], 1.9))
    figure = new_figure(asked.width, down * (height + 0.2) + 0.5)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    scale = MapScale(scores["value"].to_numpy())
    for axis, metric in zip(axes, metrics, strict=False):
        image = scale.draw(axis, unit_grid(scores.filter(pl.col("metric") == metric), shape))
        axis.set_title(SCORES[metric])
        few_ticks(axis, "x", width, integer=True, bounds=True)
        few_ticks(axis, "y", height, integer=True, bounds=True)
    for axis in axes[len(metrics) :]:
        axis.remove()
    axis_labels(figure, "head", "layer")
    scale.bar(figure, image, "score")
    return figure


def induction_capacity(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw how much prefix matching and copying is left when heads go by the gradient ranking.

    The ranking is that of the task asked for, or that of all tasks together.
    """
    layers, heads = shape_of(record)
    records = _records(results).filter(
        (pl.col("metric") == "capacity_retained") & pl.col("percent").is_not_null()
    )
    records = records.with_columns(removed=100 * pl.col("heads_removed") / (layers * heads))
    ranked = records.filter(pl.col("method") == "gradient")
    ranked = mean_over_tasks(ranked) if asked.task is None else asked.of(ranked)
    if ranked.is_empty():
        return None
    shots, height = shots_of(ranked), 1.5
    width = (asked.width - 0.5) / len(CAPACITIES) - 0.1
    figure = new_figure(asked.width, height + 0.55)
    axes = figure.subplots(1, len(CAPACITIES), sharey=True)
    colours, entries = shot_colours(shots), []
    for axis, capacity in zip(axes, CAPACITIES, strict=True):
        is_shown = pl.col("other_method") == capacity
        entries += _draw_random(axis, records.filter(is_shown & (pl.col("method") == "random")))
        for n_shots in shots:
            curve = ranked.filter(is_shown & (pl.col("shots") == n_shots))
            curve = curve.unique("removed", keep="first", maintain_order=True).sort("removed")
            axis.plot(curve["removed"], 100 * curve["value"], color=colours[n_shots])
        percent_ticks(axis, width)
        axis.set_ylim(-3, 103)
        axis.set_yticks([0, 50, 100])
        axis.set_title(SCORES[capacity])
    axis_labels(figure, "heads removed, %", "capacity left, %")
    keys: list[tuple[Artist, str]] = [(line_key(colours[n_shots]), shots_text(n_shots)) for n_shots in shots]
    key_above(figure, [*keys, *entries])
    return figure


def _draw_random(axis: Axes, orders: pl.DataFrame) -> list[tuple[Artist, str]]:
    orders = orders.unique("removed", keep="first", maintain_order=True).sort("removed")
    if orders.is_empty():
        return []
    axis.fill_between(
        orders["removed"], 100 * orders["low"], 100 * orders["high"], color=PALE, linewidth=0, zorder=0
    )
    return [(band_key(), RANDOM)]


def induction_removal(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw the accuracy lost without the induction heads beside that without random heads, a row per task.

    Losses, since these are paired: random heads are removed for fewer documents than the induction heads.
    """
    records = asked.of(_records(results).filter(pl.col("procedure") == "removal"))
    drops = records.filter(pl.col("metric") == "acc_drop")
    without = drops.filter(pl.col("method") == "induction")
    if without.is_empty():
        return None
    rows = TaskRows(tasks_of(without), 1)
    panels = rows.panels(asked.width, shots_of(without))
    whole = records.filter(pl.col("method").is_null() & pl.col("metric").is_in(ACCURACIES))
    above = whole.with_columns(above=pl.col("value") - pl.col("chance")).filter(pl.col("above").is_not_null())
    draws = drops.filter((pl.col("method") == "random-median") & pl.col("task").is_in(rows.tasks))
    ends = [table[end] for table in (without, draws) for end in ("low", "high")]
    shown_values = pl.concat([without["value"], above["above"], *ends]).drop_nulls()
    for n_shots, axis in panels.axes.items():
        axis.axvline(0, color=BLACK, linewidth=LINE, zorder=1)
        of_panel = pl.col("shots") == n_shots
        _draw_draws(rows, axis, draws.filter(of_panel), LEAST_BAND * np.ptp([0.0, *shown_values]))
        guessing = above.filter(of_panel & pl.col("task").is_in(rows.tasks))
        rows.ticks(axis, guessing, "above", GREY, "dotted")
        rows.dots(axis, without.filter(of_panel), 0, RED, "o")
        loss_ticks(axis, shown_values.to_numpy(), panels.width)
    panels.figure.supxlabel("accuracy lost")
    entries = [(dot_key(RED), f"{_removed(without)} induction heads removed")]
    if len(draws):
        entries.append((band_key(), "as many random heads removed"))
    if len(above):
        entries.append((tick_key(GREY, "dotted"), "down to chance"))
    key_above(panels.figure, entries)
    return panels.figure


def _draw_draws(rows: TaskRows, axis: Axes, draws: pl.DataFrame, least: float) -> None:
    """Draw the median over random draws in the band that holds the next one, at least so wide."""
    heights = rows.lane(draws, 0)
    low, high = (draws[name].fill_null(draws["value"]).to_numpy() for name in ("low", "high"))
    wider = np.maximum(least - (high - low), 0) / 2
    axis.barh(heights, high - low + 2 * wider, 0.62, left=low - wider, color=PALE, zorder=0)
    rows.ticks(axis, draws, "value", GREY, "solid")


def _removed(without: pl.DataFrame) -> str:
    """Return how many heads are removed."""
    counts = sorted(set(without["heads_removed"].drop_nulls()))
    return " or ".join(str(count) for count in counts)


def _records(results: pl.DataFrame) -> pl.DataFrame:
    return results.filter(pl.col("experiment") == "induction")
