"""Patched units on the page: what restores the right answer against what it breaks without."""

from bokeh.models import FixedTicker, Range1d, Span

from lowmem_icl.report.page.plots.style import BLUE, GREY, ORANGE, PagePlot, empty_source, new_plot

CAPTION = (
    "Every head (dot) and FFN (triangle) at the chosen task and shots: to the right, what its clean value "
    "restores in the corrupted prompt; downwards, what its corrupted value breaks in the clean prompt. Far "
    "to the right alone: it suffices, and others can stand in for it. Far down alone: it is needed, and "
    "works with others. Scales as the map's; filled: q ≤ 0.05 in either direction."
)


def patch_plot() -> PagePlot:
    """Return the plot of both effects, by unit; its sources are `patched-heads` and `patched-ffns`."""
    plot = new_plot("patched", height=340, tooltips='<div><b>@unit</b> @text</div>',
                    x_axis_label="restored", y_axis_label="broken",
                    x_range=Range1d(-1, 1), y_range=Range1d(-1, 1))  # fmt: skip
    for axis in (plot.xaxis, plot.yaxis):
        axis.ticker = FixedTicker(ticks=[])
    for dimension in ("height", "width"):
        plot.add_layout(Span(location=0, dimension=dimension, line_color=GREY, line_dash="dotted"))
    drawn = []
    for kind, marker, colour in (("heads", "circle", BLUE), ("ffns", "triangle", ORANGE)):
        units = empty_source(f"patched-{kind}", "x", "y", "unit", "text", "filled")
        drawn.append(
            plot.scatter("x", "y", size=7, marker=marker, source=units, color=colour, fill_alpha="filled")
        )
    plot.tools[0].renderers = drawn
    return PagePlot("plot-patched", plot, CAPTION, ("patch-heads",))
