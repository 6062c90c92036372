"""The map of all heads and FFNs, with the mean of every layer at its side."""

from bokeh.layouts import row
from bokeh.models import (
    BasicTicker,
    ColorBar,
    FixedTicker,
    LinearColorMapper,
    Range1d,
    TapTool,
)
from bokeh.plotting import figure

from lowmem_icl.report.page.plots.style import GREY, PagePlot, empty_source, new_plot

TOOLTIP = """<div style="max-width: 20rem"><b>@unit</b> @value<br>@more</div>"""
CAPTION = (
    "Every cell is a head, the column at the right an FFN; layer 0 is at the bottom. Dot: q ≤ 0.05 by the "
    "chosen metric or, where nothing is claimed by it, by the drop of gold log-probability; outline: kept by "
    "the greedy mask (it may cost nothing alone); triangle: induction head. The scale is "
    "symmetric-logarithmic and the same for all tasks and shot counts. Click, or use the arrow keys, for a "
    "unit."
)
LARGEST_HEIGHT, SMALLEST_HEIGHT, MARGIN = 620, 200, 60
PROFILE_WIDTH = 120
FFN_GAP = 1
"""Empty columns between heads and FFNs."""


def head_map(layers: int, heads: int) -> PagePlot:
    """Return the map, without values: the page's script puts in those of the chosen setting and metric."""
    cell = max(9, min(34, LARGEST_HEIGHT // layers))
    height = max(SMALLEST_HEIGHT, min(LARGEST_HEIGHT, cell * layers) + MARGIN)
    plot = new_plot(
        "map", height=height, tooltips=TOOLTIP,
        x_range=Range1d(-0.6, heads + FFN_GAP + 0.6), y_range=Range1d(-0.6, layers - 0.4),
        x_axis_label="head", y_axis_label="layer",
    )  # fmt: skip
    plot.max_width = int(150 + (heads + 2) * max(11, min(64, 900 / heads)))
    plot.grid.visible = False
    _mark_axes(plot, heads)
    _draw_cells(plot, cell)
    profile = _layer_profile(plot, height)
    layout = row(plot, profile, sizing_mode="stretch_width", spacing=6)
    return PagePlot("plot-map", layout, CAPTION, ("ablate-heads", "ablate-ffns", "patch-heads"))


def _mark_axes(plot: figure, heads: int) -> None:
    step = max(1, heads // 12)
    ffn = heads + FFN_GAP
    plot.xaxis.ticker = FixedTicker(ticks=[*range(0, heads, step), ffn])
    plot.xaxis.major_label_overrides = {ffn: "FFN"}
    plot.yaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)


def _draw_cells(plot: figure, cell: int) -> None:
    mapper = LinearColorMapper(palette=["#ffffff"], low=-1, high=1, nan_color="rgba(0,0,0,0)", name="mapper")
    cells = empty_source("cells", "x", "y", "colour", "unit", "value", "more")
    drawn = plot.rect(
        "x", "y", 1, 1, source=cells, line_color=None, nonselection_fill_alpha=1,
        fill_color={"field": "colour", "transform": mapper},
    )  # fmt: skip
    plot.tools[0].renderers = [drawn]
    plot.add_tools(TapTool(renderers=[drawn]))
    plot.rect(
        "x",
        "y",
        0.86,
        0.86,
        source=empty_source("kept", "x", "y"),
        fill_color=None,
        line_width=1.4,
        name="kept-mark",
    )
    plot.scatter(
        "x",
        "y",
        size=4 if cell > 12 else 3,
        source=empty_source("stars", "x", "y"),
        line_color=None,
        name="star-mark",
    )
    plot.scatter(
        "x", "y", size=max(6, min(11, cell)), marker="triangle", fill_color=None, line_width=1.6,
        source=empty_source("induction", "x", "y"), name="induction-mark",
    )  # fmt: skip
    plot.rect(
        "x", "y", 1.1, 1.1, source=empty_source("chosen", "x", "y"), fill_color=None, line_width=2.5,
        line_color="#E69F00",
    )  # fmt: skip
    bar = ColorBar(
        color_mapper=mapper, width=10, padding=8, location=(0, 0),
        title_text_font_size="12px", title_standoff=6, ticker=FixedTicker(ticks=[]), name="scale",
        background_fill_color=None, major_tick_line_color=GREY, major_tick_in=0,
    )  # fmt: skip
    plot.add_layout(bar, "right")


def _layer_profile(plot: figure, height: int) -> figure:
    """Return bars of the heads' mean by layer, in line with the map's rows."""
    profile = new_plot(
        "profile", height=height, y_range=plot.y_range, x_axis_label="mean of heads", tooltips="@label"
    )
    profile.sizing_mode = "fixed"
    profile.width = PROFILE_WIDTH
    profile.yaxis.visible = False
    bars = profile.hbar("y", right="mean", height=0.7, source=empty_source("layers", "y", "mean", "label"),
                        line_color=None, fill_color=GREY)  # fmt: skip
    profile.tools[0].renderers = [bars]
    profile.xaxis.ticker.desired_num_ticks = 2
    return profile
