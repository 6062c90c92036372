"""Figure: the clean model's accuracy, a row per task; of one task, a line over its shot counts."""

import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.protocols import LABELS
from lowmem_icl.report.figures.layout import (
    Asked,
    Record,
    key_above,
    new_figure,
    share_ticks,
    shots_of,
    shots_text,
    tasks_of,
)
from lowmem_icl.report.figures.lines import LineEnd, name_ends, ticks_apart
from lowmem_icl.report.figures.names import short_names
from lowmem_icl.report.figures.rows import TaskRows, bounds_of, dot_key, tick_key
from lowmem_icl.report.figures.style import BLACK, BLUE, GREEN, GREY, LINE, NORMAL, ORANGE, shot_colours
from lowmem_icl.report.numbers import accuracy, clean_evaluation, with_right_labels
from lowmem_icl.tables.guessing import settings_at_chance
from lowmem_icl.tables.schema import ACCURACIES

CHANCE, MAJORITY, AT_CHANCE = "chance", "best constant answer", "no better than guessing"
LABEL_COLOURS: dict[str, str] = dict(zip(LABELS, (BLUE, ORANGE, GREEN), strict=True))
HEIGHT = 2.0
"""In inches, of the figure of one task."""
LABEL_MARKERS: dict[str, str] = dict(zip(LABELS, "os^", strict=True))


def accuracy_figure(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw clean accuracies with chance and the best constant answer."""
    records = asked.of(accuracy(results).filter(pl.col("value").is_not_null()))
    if records.is_empty():
        return None
    at_chance = settings_at_chance(clean_evaluation(results).filter(with_right_labels()))
    settings = zip(records["task"], records["shots"], strict=True)
    records = records.with_columns(at_chance=pl.Series([setting in at_chance for setting in settings]))
    if asked.task is not None and len(shots_of(records)) > 1:
        return _over_shots(results, records, asked)
    return _by_task(records, asked)


def _by_task(records: pl.DataFrame, asked: Asked) -> Figure:
    shots = shots_of(records)
    rows = TaskRows(tasks_of(records), len(shots))
    panels = rows.panels(asked.width)
    axis = panels.axes[None]
    colours = shot_colours(shots)
    for column, colour, style in (("chance", BLACK, "solid"), ("majority", GREY, "dotted")):
        rows.ticks(axis, records, column, colour, style)
    for lane, n_shots in enumerate(shots):
        rows.dots(axis, records.filter(pl.col("shots") == n_shots), lane, colours[n_shots], "o")
    axis.set_xlabel("accuracy")
    entries = [(dot_key(colours[n_shots]), shots_text(n_shots)) for n_shots in shots]
    key_above(panels.figure, [*entries, *_guess_keys(records)])
    return panels.figure


def _guess_keys(records: pl.DataFrame) -> list[tuple[Artist, str]]:
    keys = {"chance": (tick_key(BLACK), CHANCE), "majority": (tick_key(GREY, "dotted"), MAJORITY)}
    known = [key for column, key in keys.items() if records[column].null_count() < len(records)]
    return known + ([(dot_key(BLACK, hollow=True), AT_CHANCE)] if records["at_chance"].any() else [])


def _over_shots(results: pl.DataFrame, records: pl.DataFrame, asked: Asked) -> Figure:
    """Draw a task's accuracy over shots on their true scale, with right and with other labels."""
    figure = new_figure(asked.width, HEIGHT)
    axis = figure.subplots()
    evaluated = clean_evaluation(results).filter(
        (pl.col("task") == asked.task) & pl.col("metric").is_in(ACCURACIES)
    )
    lines = {labels: evaluated.filter(pl.col("labels") == labels) for labels in LABELS[:0:-1]}
    lines = {labels: line for labels, line in lines.items() if len(line)} | {LABELS[0]: records}
    ends = []
    for labels, line in lines.items():
        name = f"{labels} labels" if len(lines) > 1 else "accuracy"
        ends.append(_draw_line(axis, line.sort("shots"), labels, name))
    for column, name, colour, style in (("chance", CHANCE, BLACK, "-"), ("majority", MAJORITY, GREY, ":")):
        known = records.filter(pl.col(column).is_not_null()).sort("shots")
        if len(known):
            axis.plot(known["shots"], known[column], style, color=colour, linewidth=1.6 * LINE, zorder=1)
            ends.append((known[column][-1], name, colour))
    share_ticks(axis, "y", 1.5)
    axis.set_xticks(*ticks_apart(shots_of(records), asked.width - 2.0))
    axis.set_title(short_names([str(asked.task)], asked.width - 1, NORMAL)[str(asked.task)])
    axis.set(xlabel="demonstrations", ylabel="accuracy")
    name_ends(axis, ends, HEIGHT - 0.6)
    if records["at_chance"].any():
        key_above(figure, [(dot_key(BLUE, hollow=True), AT_CHANCE)])
    return figure


def _draw_line(axis: Axes, line: pl.DataFrame, labels: str, name: str) -> LineEnd:
    colour, shots = LABEL_COLOURS[labels], line["shots"].to_numpy()
    axis.errorbar(
        shots, line["value"].to_numpy(), yerr=bounds_of(line), color=colour, marker=LABEL_MARKERS[labels],
        elinewidth=1.5 * LINE, zorder=2,
    )  # fmt: skip
    if "at_chance" in line.columns:
        hollow = line.filter("at_chance")
        axis.plot(hollow["shots"], hollow["value"], "o", color=colour, markerfacecolor="white", zorder=3)
    return line["value"][-1], name, colour
