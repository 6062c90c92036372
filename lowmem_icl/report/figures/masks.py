"""Figure: accuracy under greedy masks and under masks of equal size."""

from collections.abc import Sequence

import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.report.figures.layout import Asked, Record, key_above, shots_of, tasks_of
from lowmem_icl.report.figures.rows import TaskRows, dot_key, tick_key
from lowmem_icl.report.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, SMALL
from lowmem_icl.report.numbers import clean_accuracy, greedy_accuracy

# Label, colour and marker, from the top lane of a row to the last.
METHODS = {
    "greedy": ("greedy mask", BLUE, "o"),
    "certified": ("certified part", GREEN, "^"),
    "gradient": ("lowest by gradient", ORANGE, "s"),
    "random": ("random mask", GREY, "D"),
}
WHOLE, CHANCE = "whole model", "chance"
COUNT_MARGIN = 0.5
"""Inches right of a panel for how many units are removed."""
COUNTED_WIDTH = 1.0
"""Inches of a panel from which on that is written."""


def prune_masks(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw a panel per shot count: a row per task, the whole model's accuracy as a tick."""
    records = asked.of(greedy_accuracy(results)).filter(pl.col("value").is_not_null())
    if records.is_empty():
        return None
    tasks, shots = tasks_of(records), shots_of(records)
    lanes = [method for method in METHODS if (records["method"] == method).any()]
    counted = (asked.width - 1.0) / len(shots) - COUNT_MARGIN >= COUNTED_WIDTH
    rows = TaskRows(tasks, max(2, len(lanes)))
    panels = rows.panels(asked.width, shots, COUNT_MARGIN if counted else 0.0)
    clean = clean_accuracy(results)
    for n_shots, axis in panels.axes.items():
        panel = records.filter(pl.col("shots") == n_shots)
        draw_masks(rows, axis, panel, clean.filter(pl.col("shots") == n_shots), lanes)
        if counted:
            for mask in panel.filter(pl.col("method") == lanes[0]).iter_rows(named=True):
                axis.text(
                    1.04, tasks.index(mask["task"]), f"{mask['heads_removed']} H\n{mask['ffns_removed']} F",
                    transform=axis.get_yaxis_transform(), fontsize=SMALL - 1, va="center", linespacing=1.05,
                )  # fmt: skip
    panels.figure.supxlabel("accuracy" + ("; right: heads (H) and FFNs (F) removed" if counted else ""))
    key_above(panels.figure, mask_key(lanes))
    return panels.figure


def draw_masks(
    rows: TaskRows, axis: Axes, masks: pl.DataFrame, clean: pl.DataFrame, lanes: Sequence[str]
) -> None:
    """Draw accuracies under masks of one shot count, a lane per method; ticks: whole model, chance."""
    rows.ticks(axis, masks, "chance", GREY, "dotted")
    whole = clean.filter(pl.col("task").is_in(masks["task"].to_list()))
    rows.ticks(axis, whole, "value", BLACK, "solid")
    for lane, method in enumerate(lanes):
        _, colour, marker = METHODS[method]
        rows.dots(axis, masks.filter(pl.col("method") == method), lane, colour, marker)


def mask_key(lanes: Sequence[str]) -> list[tuple[Artist, str]]:
    """Return what stands in the key for the methods of lanes, the whole model and chance."""
    entries = [(dot_key(*METHODS[method][1:]), METHODS[method][0]) for method in lanes]
    return [*entries, (tick_key(BLACK), WHOLE), (tick_key(GREY, "dotted"), CHANCE)]
