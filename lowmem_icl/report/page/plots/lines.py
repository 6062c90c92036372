"""Plots of curves over what was removed: the chosen task in front, the others behind, the random band."""

from bokeh.models import BasicTicker, Range1d, Whisker
from bokeh.plotting import figure

from lowmem_icl.report.page.plots.style import GREY, PagePlot, empty_source, new_plot

TOOLTIP = "<div><b>@label</b><br>@text</div>"


def curves_plot(
    name: str, x_label: str, y_label: str, caption: str, images: tuple[str, ...], height: int = 300
) -> PagePlot:
    """Return a plot of curves, without any: the page's script puts in those of the chosen task and shots.

    Sources: `NAME-band`, `NAME-behind`, `NAME-lines`, `NAME-points`, `NAME-marks`, `NAME-labels`,
    `NAME-level`.
    """
    plot = new_plot(name, height=height, tooltips=TOOLTIP, x_axis_label=x_label, y_axis_label=y_label,
                    x_range=Range1d(0, 1),
                    y_range=Range1d(0, 1.03))  # fmt: skip
    plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    _draw(plot, name)
    return PagePlot(f"plot-{name}", plot, caption, images)


def _draw(plot: figure, name: str) -> None:
    plot.varea("x", "low", "high", source=empty_source(f"{name}-band", "x", "low", "high"), fill_color=GREY,
               fill_alpha=0.25)  # fmt: skip
    plot.multi_line("xs", "ys", source=empty_source(f"{name}-behind", "xs", "ys"), line_color=GREY,
                    line_alpha=0.45, line_width=1)  # fmt: skip
    plot.multi_line("xs", "ys", source=empty_source(f"{name}-lines", "xs", "ys", "colour", "width"),
                    line_color="colour", line_width="width")  # fmt: skip
    plot.multi_line("xs", "ys", source=empty_source(f"{name}-level", "xs", "ys"), line_color=GREY,
                    line_dash="dotted", line_width=1.2)  # fmt: skip
    points = empty_source(f"{name}-points", "x", "y", "low", "high", "colour", "label", "text")
    drawn = plot.scatter("x", "y", size=5, source=points, color="colour")
    plot.tools[0].renderers = [drawn]
    plot.add_layout(Whisker(base="x", lower="low", upper="high", source=points, line_color="colour",
                            upper_head=None, lower_head=None, level="underlay"))  # fmt: skip
    plot.scatter("x", "y", size=12, marker="diamond", line_width=2, fill_color=None, line_color="colour",
                 source=empty_source(f"{name}-marks", "x", "y", "colour"))  # fmt: skip
    plot.text("x", "y", text="text", text_color="colour", text_font_size="12px", text_baseline="middle",
              x_offset=6, source=empty_source(f"{name}-labels", "x", "y", "text", "colour"))  # fmt: skip
