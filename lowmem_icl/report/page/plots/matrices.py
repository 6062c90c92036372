"""Square matrices between tasks: how rankings agree, and how one task's mask does on the others."""

from bokeh.models import FactorRange, LinearColorMapper

from lowmem_icl.report.page.plots.style import PagePlot, empty_source, new_plot

TOOLTIP = "<div><b>@row → @column</b><br>@text</div>"


def matrix_plot(
    name: str, tasks: int, caption: str, images: tuple[str, ...] = (), labels: tuple[str, str] = ("", "")
) -> PagePlot:
    """Return an empty matrix with so many rows; the page's script fills the source NAME-cells and its ranges.

    labels: of the horizontal and the vertical axis.
    """
    side = max(220, min(620, 34 * tasks + 110))
    plot = new_plot(name, height=side, tooltips=TOOLTIP, x_range=FactorRange(), y_range=FactorRange(),
                    x_axis_label=labels[0], y_axis_label=labels[1])  # fmt: skip
    plot.max_width = int(side * 1.35)
    plot.grid.visible = False
    plot.xaxis.major_label_orientation = 0.9
    mapper = LinearColorMapper(palette=["#ffffff"], low=-1, high=1, nan_color="rgba(0,0,0,0)",
                               name=f"{name}-mapper")  # fmt: skip
    source = empty_source(f"{name}-cells", "row", "column", "value", "colour", "shown", "ink", "text")
    cells = plot.rect("column", "row", 1, 1, source=source, line_color=None,
                      fill_color={"field": "colour", "transform": mapper})  # fmt: skip
    plot.tools[0].renderers = [cells]
    plot.text("column", "row", text="shown", text_color="ink", text_align="center", text_baseline="middle",
              text_font_size="11px", source=source)  # fmt: skip
    return PagePlot(f"plot-{name}", plot, caption, images)
