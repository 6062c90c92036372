"""Induction heads on the page: their scores against what they cost, and accuracy without them."""

from bokeh.models import FactorRange, FixedTicker, Range1d, Span, Whisker

from lowmem_icl.report.numbers import INDUCTION_SCORE
from lowmem_icl.report.page.plots.style import BLUE, GREY, RED, PagePlot, empty_source, new_plot

TOOLTIP = "<div><b>@task</b><br>@text</div>"
SCATTER_CAPTION = (
    "Every head: its prefix-matching score against the chosen metric at the chosen task and shots; right of "
    "the line heads count as induction heads."
)
REMOVAL_CAPTION = (
    "Accuracy lost without the induction heads (red) and without as many other heads of the same layers, "
    "previous-token heads left out (grey: median, and where the next draw lies at 95 %), each paired with "
    "the clean model on the same documents."
)


def score_plot() -> PagePlot:
    """Return the plot of prefix matching against the chosen metric; the source is `head-scores`."""
    plot = new_plot("scores", height=300, tooltips='<div><b>@unit</b> @text</div>',
                    x_axis_label="prefix matching", y_axis_label="chosen metric",
                    x_range=Range1d(-0.02, 1.02))  # fmt: skip
    plot.yaxis.ticker = FixedTicker(ticks=[])
    plot.add_layout(Span(location=INDUCTION_SCORE, dimension="height", line_color=GREY, line_dash="dotted"))
    dots = plot.scatter("x", "y", size=6, source=empty_source("head-scores", "x", "y", "unit", "text"),
                        color=BLUE, alpha=0.6)  # fmt: skip
    plot.tools[0].renderers = [dots]
    return PagePlot("plot-scores", plot, SCATTER_CAPTION, ("induction-scores",))


def removal_plot(tasks: int) -> PagePlot:
    """Return the plot of what is lost without induction heads; its sources are `removal-*`."""
    plot = new_plot("removal", height=70 + 24 * tasks, y_range=FactorRange(), x_range=Range1d(0, 1),
                    tooltips=TOOLTIP, x_axis_label="accuracy lost")  # fmt: skip
    plot.ygrid.visible = False
    plot.add_layout(Span(location=0, dimension="height", line_color=GREY, line_width=1))
    band = empty_source("removal-random", "task", "value", "low", "high", "text")
    plot.hbar("task", left="low", right="high", height=0.5, source=band, fill_color=GREY, fill_alpha=0.3,
              line_color=None)  # fmt: skip
    random = plot.scatter("value", "task", marker="dash", angle=1.5708, size=12, source=band, color=GREY)
    without = empty_source("removal-induction", "task", "value", "low", "high", "text")
    plot.add_layout(Whisker(base="task", lower="low", upper="high", dimension="width", source=without,
                            line_color=RED, upper_head=None, lower_head=None))  # fmt: skip
    removed = plot.scatter("value", "task", size=8, source=without, color=RED)
    plot.tools[0].renderers = [removed, random]
    return PagePlot("plot-removal", plot, REMOVAL_CAPTION, ("induction-removal",))
