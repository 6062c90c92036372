"""Figures: what FFNs cost when removed alone, and how good first-order estimates of drops are."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.report.figures.layout import (
    TALLEST,
    Asked,
    PanelSize,
    Record,
    axis_labels,
    few_ticks,
    key_above,
    new_figure,
    shots_of,
    shots_text,
    task_panels,
    tasks_of,
)
from lowmem_icl.report.figures.maps import shape_of
from lowmem_icl.report.figures.rows import bounds_of, dot_key, line_key, marker_key
from lowmem_icl.report.figures.scales import SymLog
from lowmem_icl.report.figures.style import BLUE, GREY, LINE, RED, shot_colours
from lowmem_icl.report.numbers import compared_drops, unit_drops
from lowmem_icl.statistics.agreement import spearman

DROP = "gold log-probability lost, nats"
KINDS = {"head": ("heads", BLUE, "o"), "ffn": ("FFNs", RED, "^")}
MOST_DOTS = 24
"""Layers up to which every FFN has a dot and a bar; beyond, lines have bands."""
ASIDE = 0.32
"""In layers, from a layer to the bounds within which its dots of several shot counts stand side by side."""
NARROW = 1.7
"""Inches of a panel up to which its coefficients stand below each other."""
MOST_VECTOR_DOTS = 500
"""Dots up to which a scatter is drawn as such; beyond, as an image."""


def ablate_ffns(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw what removing each FFN alone costs, a panel per task and a line per shot count."""
    drops = asked.of(unit_drops(results).filter(pl.col("kind") == "ffn"))
    if drops.is_empty():
        return None
    shots = shots_of(drops)
    panels = task_panels(asked, tasks_of(drops), (0,), PanelSize(1.2, 0.6, 0.6, 1.8))
    colours = shot_colours(shots)
    scale = SymLog.of(drops.select("value", "low", "high").to_numpy())
    layers, _ = shape_of(record)
    for task, _, axis in panels:
        axis.axhline(0, color=GREY, linewidth=LINE, zorder=0)
        for aside, n_shots in zip(np.linspace(-ASIDE, ASIDE, len(shots) + 2)[1:-1], shots, strict=True):
            line = drops.filter((pl.col("task") == task) & (pl.col("shots") == n_shots)).sort("layer")
            _draw_layers(axis, line, colours[n_shots], aside if layers <= MOST_DOTS else None)
        scale.set_on(axis, "y", panels.height)
        axis.set_xlim(-0.5, layers - 0.5)
        few_ticks(axis, "x", panels.width, integer=True)
    axis_labels(panels.figure, "layer", DROP)
    key = dot_key if layers <= MOST_DOTS else line_key
    key_above(panels.figure, [(key(colours[n_shots]), shots_text(n_shots)) for n_shots in shots])
    return panels.figure


def _draw_layers(axis: Axes, line: pl.DataFrame, colour: str, aside: float | None) -> None:
    """Draw drops by layer: dots with their intervals, so far aside of it, or with None a line with a band."""
    layers, values = line["layer"].to_numpy(), line["value"].to_numpy()
    if aside is not None:
        axis.errorbar(
            layers + aside, values, yerr=bounds_of(line), color=colour, marker="o", markersize=2,
            linewidth=LINE, elinewidth=LINE,
        )  # fmt: skip
        return
    below, above = bounds_of(line)
    axis.fill_between(layers, values - below, values + above, color=colour, alpha=0.2, linewidth=0)
    axis.plot(layers, values, color=colour, linewidth=LINE)


def ablate_estimates(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw each unit's attribution against its exact drop, a panel per shot count."""
    both = asked.of(compared_drops(results)).filter(pl.col("value").is_finite() & pl.col("exact").is_finite())
    if both.is_empty():
        return None
    shots = shots_of(both)
    across = min(len(shots), max(1, int((asked.width - 0.5) / 1.35)))
    down = -(-len(shots) // across)
    side = min(2.4, (asked.width - 0.6) / across - 0.1, (TALLEST - 0.6) / down - 0.44)
    figure = new_figure(asked.width, down * (side + (0.44 if side < NARROW else 0.34)) + 0.32)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    scale = SymLog.of(both.select("value", "exact").to_numpy())
    for place, (axis, n_shots) in enumerate(zip(axes, shots, strict=False)):
        panel = both.filter(pl.col("shots") == n_shots)
        axis.axline((0, 0), (1, 1), color=GREY, linewidth=LINE, zorder=0)
        _scatter(axis, panel)
        ranks = ("\n" if side < NARROW else ", ").join(_rank_texts(panel))
        axis.set_title(f"{shots_text(n_shots)}\n{ranks}")
        scale.set_on(axis, "x", side)
        scale.set_on(axis, "y", side)
        axis.set_box_aspect(1)
        axis.tick_params(labelbottom=place + across >= len(shots))
    for axis in axes[len(shots) :]:
        axis.remove()
    axis_labels(figure, "estimate, nats", "exact drop, nats")
    kinds = [kind for kind in KINDS if (both["kind"] == kind).any()]
    key_above(figure, [(marker_key(*KINDS[kind][1:]), KINDS[kind][0]) for kind in kinds])
    return figure


def _scatter(axis: Axes, panel: pl.DataFrame) -> None:
    is_image = len(panel) > MOST_VECTOR_DOTS
    for kind, (_, colour, marker) in KINDS.items():
        units = panel.filter(pl.col("kind") == kind)
        axis.scatter(
            units["value"].to_numpy(), units["exact"].to_numpy(), s=2 if is_image else 6, color=colour,
            marker=marker, alpha=0.5, linewidths=0, rasterized=is_image, clip_on=False,
        )  # fmt: skip


def _rank_texts(panel: pl.DataFrame) -> list[str]:
    """Return Spearman's coefficients of heads and of FFNs, apart: FFNs are few and cost more."""
    found = []
    for kind, (name, _, _) in KINDS.items():
        units = panel.filter(pl.col("kind") == kind)
        rank = spearman(units["value"].to_numpy(), units["exact"].to_numpy()) if len(units) > 2 else np.nan
        if np.isfinite(rank):
            found.append(f"{name} ρ {round(rank, 2) + 0.0:.2f}".replace("-", "−"))
    return found
