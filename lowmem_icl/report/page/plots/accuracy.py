"""Clean accuracy as dots with intervals, and over demonstrations at their true distances."""

import itertools
from collections.abc import Sequence

import polars as pl
from bokeh.models import ColumnDataSource, FactorRange, Range1d, Whisker

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.wording import task_text
from lowmem_icl.report.page.plots.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, PagePlot, new_plot

SHOT_COLOURS = (SKY, BLUE, ORANGE, RED, PINK, GREEN)
TOOLTIP = "<div><b>@task, @shots shots</b><br>@text</div>"
CAPTION = (
    "Filled: credibly above guessing; hollow: not. Bars: 95 % intervals; tick: chance; cross: the best "
    "constant answer."
)


def accuracy_plot(accuracy: pl.DataFrame) -> PagePlot:
    """Return accuracies as dots: a row per task, a colour per shot count.

    accuracy: as `report.numbers.accuracy` returns it, with `at_chance`.
    """
    tasks = [task_text(task) for task in dict.fromkeys(accuracy["task"])]
    shots = sorted(set(accuracy["shots"]))
    plot = new_plot("accuracy", height=80 + len(tasks) * max(28, 15 * len(shots)), tooltips=TOOLTIP,
                    y_range=FactorRange(*reversed(tasks), range_padding=0.1), x_range=Range1d(0, 1.02),
                    x_axis_label="accuracy")  # fmt: skip
    plot.ygrid.visible = False
    step = 0.66 / max(1, len(shots) - 1) if len(shots) > 1 else 0
    for index, n_shots in enumerate(shots):
        rows = accuracy.filter(pl.col("shots") == n_shots)
        offset = 0.33 - step * index if len(shots) > 1 else 0.0
        source = _dots(rows, offset)
        colour = SHOT_COLOURS[index % len(SHOT_COLOURS)]
        plot.add_layout(Whisker(base="y", lower="low", upper="high", dimension="width", source=source,
                                line_color=colour, upper_head=None, lower_head=None))  # fmt: skip
        dots = plot.scatter("value", "y", size=8, source=source, line_color=colour, fill_color=colour,
                            fill_alpha="filled", legend_label=f"{n_shots} shots")  # fmt: skip
        plot.tools[0].renderers.append(dots)
        plot.scatter("chance", "y", size=9, marker="dash", angle=1.5708, source=source, color=GREY)
        plot.scatter("majority", "y", size=6, marker="x", source=source, color=GREY)
    plot.legend.orientation = "horizontal"
    plot.legend.background_fill_alpha = 0
    plot.legend.border_line_color = None
    plot.legend.padding = 0
    plot.add_layout(plot.legend[0], "above")
    return PagePlot("plot-accuracy", plot, CAPTION, ("accuracy",))


def _dots(rows: pl.DataFrame, offset: float) -> ColumnDataSource:
    texts = [
        f"{row['value']:.3f}"
        + ("" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]")
        + ("" if row["chance"] is None else f"; chance {row['chance']:.3f}")
        for row in rows.iter_rows(named=True)
    ]
    columns = rows.select("task", "shots", "value", "low", "high", "chance", "majority").to_dict(
        as_series=False
    )
    return ColumnDataSource({
        **columns,
        "low": rows["low"].fill_null(rows["value"]).to_list(),
        "high": rows["high"].fill_null(rows["value"]).to_list(),
        "y": [(task_text(task), offset) for task in rows["task"]],
        "filled": [0.0 if at_chance else 1.0 for at_chance in rows["at_chance"]],
        "text": texts,
    })  # fmt: skip


def shots_plot(accuracy: pl.DataFrame) -> PagePlot | None:
    """Return accuracies over demonstrations, a line per task named at its end; None for one shot count."""
    shots = sorted(set(accuracy["shots"]))
    if len(shots) < 2:
        return None
    lines = [
        (str(task), rows.sort("shots")) for (task,), rows in accuracy.group_by("task", maintain_order=True)
    ]
    plot = new_plot("shots", height=max(280, 15 * len(lines) + 90), x_axis_label="demonstrations",
                    y_axis_label="accuracy", y_range=Range1d(0, 1.03),
                    x_range=Range1d(-0.02 * shots[-1], shots[-1] * 1.5))  # fmt: skip
    plot.xaxis.ticker = shots
    colours = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
    ends = spread_apart([rows["value"][-1] for _, rows in lines], 15 / (plot.height - 60), 0.99)
    for index, ((task, rows), y) in enumerate(zip(lines, ends, strict=True)):
        mean = task == AGGREGATE
        colour = GREY if mean else colours[index % len(colours)]
        plot.line(
            rows["shots"].to_list(), rows["value"].to_list(), line_color=colour, line_width=3 if mean else 1.8
        )
        plot.scatter(rows["shots"].to_list(), rows["value"].to_list(), size=5, color=colour)
        plot.text([rows["shots"][-1]], [y], [task_text(task)], x_offset=8, text_baseline="middle",
                  text_color=colour, text_font_size="12px")  # fmt: skip
    return PagePlot(
        "plot-shots", plot, "Shot counts at their true distances; the thick line is the mean over tasks."
    )


def spread_apart(places: Sequence[float], gap: float, top: float) -> list[float]:
    """Return places moved apart to at least `gap` in the same order, none above `top`."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    limit = top
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved
