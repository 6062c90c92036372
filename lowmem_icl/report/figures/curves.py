"""Figures: pruning curves of heads and of FFNs."""

from dataclasses import dataclass, field

import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.layout import (
    Asked,
    PanelSize,
    Record,
    axis_labels,
    key_above,
    percent_ticks,
    share_ticks,
    shots_of,
    task_panels,
    tasks_of,
)
from lowmem_icl.report.figures.lines import LineEnd, name_ends
from lowmem_icl.report.figures.maps import shape_of
from lowmem_icl.report.figures.rows import band_key, bounds_of, line_key, marker_key
from lowmem_icl.report.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINE,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
)
from lowmem_icl.report.points import CURVE_NAMES, UNDRAWN, curve_points
from lowmem_icl.tables.schema import ACCURACIES

# By the curves' names: colour, line.
STYLES = {
    "own ranking": (BLUE, "-"),
    "ranking of all tasks": (ORANGE, "-"),
    "scored again at every level": (GREEN, "-"),
    "by in-context effect": (SKY, "-"),
    "most similar task's ranking": (RED, "--"),
    "least similar task's ranking": (PURPLE, "--"),
}
RANDOM, NO_RANDOM, KNEE, CHANCE = "random masks", "random masks: not measured", "knee", "chance"
NAMED_WIDTH = 1.7
"""In inches: from this width on the lines of one task's last panel are named at their ends."""


def prune_heads(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw accuracy against the share of heads removed."""
    return _pruning(pruning_records(results, record, "head"), "heads", asked)


def prune_ffns(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw accuracy against the share of FFNs removed."""
    return _pruning(pruning_records(results, record, "ffn"), "FFNs", asked)


def pruning_records(results: pl.DataFrame, record: Record, kind: str) -> pl.DataFrame:
    """Return the accuracies and knees of the curves of a kind of units; `share`: per cent of it removed.

    Each set of removed units stands once in a curve: few units have few levels.
    """
    layers, heads = shape_of(record)
    points = curve_points(results, record["model"]).filter(pl.col("metric").is_in(ACCURACIES))
    knees = results.filter((pl.col("experiment") == "prune") & (pl.col("metric") == "knee"))
    n_units = layers * heads if kind == "head" else layers
    knees = knees.with_columns(share=100 * pl.col(f"{kind}s_removed") / n_units)
    return pl.concat([points.select(knees.columns), knees]).filter(
        (pl.col("kind") == kind) & ~pl.col("procedure").is_in(UNDRAWN)
    )


def _pruning(records: pl.DataFrame, units: str, asked: Asked) -> Figure | None:
    """Draw a panel per task and shot count: curves with knees, the band of random masks, chance."""
    points = asked.of(records)
    curves = points.filter(pl.col("metric") != "knee")
    if curves.is_empty():
        return None
    panels = task_panels(asked, tasks_of(curves), shots_of(curves), PanelSize(0.9, 0.75, 0.3, 1.6))
    entries: list[tuple[Artist, str]] = []
    ends: list[LineEnd] = []
    by_panel = points.partition_by("task", "shots", as_dict=True)
    for task, shots, axis in panels:
        drawn = _draw_panel(axis, by_panel.get((task, shots), points.clear()), with_bars=panels.width > 0.8)
        percent_ticks(axis, panels.width)
        share_ticks(axis, "y", panels.height)
        entries += drawn.key
        ends = drawn.ends
    if asked.task is not None and panels.width >= NAMED_WIDTH:
        name_ends(axis, ends, panels.height)
        named = {name for _, name, _ in ends}
        entries = [entry for entry in entries if entry[1] not in named]
    order = [*STYLES, KNEE, RANDOM, CHANCE]
    entries.sort(key=lambda entry: order.index(entry[1]))
    if (points["method"] != "random").all():
        entries.append((Line2D([], [], linestyle=""), NO_RANDOM))
    axis_labels(panels.figure, f"{units} removed, %", "accuracy")
    key_above(panels.figure, entries)
    return panels.figure


@dataclass(frozen=True)
class Drawn:
    """What stands for a panel's curves in the key, and where they end."""

    key: list[tuple[Artist, str]] = field(default_factory=list)
    ends: list[LineEnd] = field(default_factory=list)


def _draw_panel(axis: Axes, panel: pl.DataFrame, *, with_bars: bool) -> Drawn:
    """Draw the curves of a task and shot count."""
    drawn = Drawn()
    accuracies = panel.filter(pl.col("metric") != "knee").sort("share")
    # Single draws have a mask, their mean has none.
    _draw_random(axis, accuracies.filter((pl.col("method") == "random") & pl.col("mask").is_null()), drawn)
    shared = (pl.col("other_task") == AGGREGATE).fill_null(value=False)
    for number, ((method, is_shared), name) in enumerate(CURVE_NAMES.items()):
        colour, line = STYLES[name]
        is_chosen = (pl.col("method") == method) & (shared == is_shared)
        # A mean's clean point is named, those of tasks' masks that remove as little are not.
        curve = accuracies.filter(is_chosen).unique("share", keep="first", maintain_order=True)
        if curve.is_empty():
            continue
        order = 4 - number / 10
        axis.errorbar(
            curve["share"].to_numpy(), curve["value"].to_numpy(),
            yerr=bounds_of(curve) if with_bars else None, color=colour, linestyle=line,
            linewidth=1.6 * LINE, elinewidth=LINE, zorder=order,
        )  # fmt: skip
        drawn.key.append((line_key(colour, line), name))
        drawn.ends.append((curve["value"][-1], name, colour))
        knee = curve.join(panel.filter(is_chosen & (pl.col("metric") == "knee")), on="share", how="semi")
        if len(knee):
            axis.plot(
                knee["share"], knee["value"], "o", color=colour, markersize=4.5, markerfacecolor="white",
                markeredgewidth=1.6 * LINE, zorder=order + 2, clip_on=False,
            )  # fmt: skip
            drawn.key.append((marker_key(GREY, hollow=True), KNEE))
    chance = accuracies["chance"].drop_nulls()
    if len(chance):
        axis.axhline(chance[0], color=BLACK, linestyle=":", linewidth=1.2 * LINE, zorder=1)
        drawn.key.append((line_key(BLACK, ":"), CHANCE))
    return drawn


def _draw_random(axis: Axes, control: pl.DataFrame, drawn: Drawn) -> None:
    """Draw the mean over random masks in the band that holds the next one."""
    if control.is_empty():
        return
    removed, value = control["share"].to_numpy(), control["value"].to_numpy()
    below, above = bounds_of(control)
    axis.fill_between(removed, value - below, value + above, color=PALE, linewidth=0, zorder=0)
    axis.plot(removed, value, color=GREY, linewidth=LINE, zorder=1)
    drawn.key.append((band_key(), RANDOM))
