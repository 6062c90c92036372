"""What removing heads by two scores leaves of accuracy, on the page: drawn once, the same for all tasks."""

from collections.abc import Mapping

import polars as pl
from bokeh.models import ColumnDataSource, FixedTicker, Range1d, Whisker

from lowmem_icl.report.page.plots.style import BLUE, GREY, ORANGE, PagePlot, new_plot

COLOURS = {"function_vector": BLUE, "induction": ORANGE}
TOOLTIP = "<div><b>@label</b><br>@text</div>"
LEVEL_WIDTH = 1.9
"""Levels stand side by side, whatever their percentages: each as wide as this share of the plot."""

LABEL_GAP = 0.06


def removal_curves(
    name: str, records: pl.DataFrame, labels: Mapping[str, str], clean: float | None, caption: str
) -> PagePlot:
    """Return a plot of accuracy over the share of heads removed, a line per method of `labels` that is there.

    records: one per method and percentage, with value, low, high and documents.
    """
    percents = sorted(records["percent"].unique().to_list())
    place = {percent: index for index, percent in enumerate(percents)}
    plot = new_plot(f"icl-heads-{name}", height=300, tooltips=TOOLTIP, x_axis_label="% of heads removed",
                    y_axis_label="first-token accuracy", y_range=Range1d(0, 1.03),
                    x_range=Range1d(-0.3, len(percents) - 1 + LEVEL_WIDTH))  # fmt: skip
    plot.xaxis.ticker = FixedTicker(ticks=list(place.values()))
    plot.xaxis.major_label_overrides = {index: f"{percent}" for percent, index in place.items()}
    drawn, ends = [], list[tuple[float, str, str, int]]()
    for method, label in labels.items():
        curve = records.filter(pl.col("method") == method).sort("percent")
        if curve.is_empty():
            continue
        colour = COLOURS.get(method, GREY)
        source = _source(curve, place, label)
        if method not in COLOURS:
            plot.varea("x", "low", "high", source=source, fill_color=GREY, fill_alpha=0.25)
        else:
            bars = Whisker(base="x", lower="low", upper="high", source=source, line_color=colour,
                           upper_head=None, lower_head=None, level="underlay")  # fmt: skip
            plot.add_layout(bars)
        plot.line("x", "value", source=source, line_color=colour, line_width=2)
        drawn.append(plot.scatter("x", "value", source=source, size=6, color=colour))
        ends.append((curve["value"][-1], label, colour, place[curve["percent"][-1]]))
    at = -LABEL_GAP
    for value, label, colour, x in sorted(ends):
        # None on another.
        at = max(value, at + LABEL_GAP)
        plot.text([x], [at], text=[label], text_color=colour, text_font_size="12px",
                  text_baseline="middle", x_offset=8)  # fmt: skip
    if clean is not None:
        plot.line([place[percents[0]], place[percents[-1]]], [clean, clean], line_color=GREY,
                  line_dash="dotted")  # fmt: skip
    plot.tools[0].renderers = drawn
    return PagePlot(f"plot-icl-heads-{name}", plot, caption)


def _source(curve: pl.DataFrame, place: Mapping[int, int], label: str) -> ColumnDataSource:
    rows = curve.to_dicts()
    columns = {
        "x": [place[row["percent"]] for row in rows],
        "value": [row["value"] for row in rows],
        "low": [row["value"] if row["low"] is None else row["low"] for row in rows],
        "high": [row["value"] if row["high"] is None else row["high"] for row in rows],
        "label": [f"{label}, {row['percent']} % ({row['count']} heads)" for row in rows],
        "text": [f"{row['value']:.3f}, {row['documents']} documents" for row in rows],
    }
    return ColumnDataSource(columns)
