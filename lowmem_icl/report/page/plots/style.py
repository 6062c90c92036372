"""What the page's plots share: colours, fonts, tools, and how a plot is handed to the page.

Colours that differ between light and dark are set by the page's script, which knows the reader's choice; here
stand only those that hold on both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, LayoutDOM
from bokeh.plotting import figure
from matplotlib.colors import Colormap, LinearSegmentedColormap

# Okabe and Ito's colours, distinct under every kind of colour vision, on white and on black.
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
GREY = "#8a8f98"
# On a dark page nothing is dark grey, so that a cell without effect differs from the ground.
DARK_SIGNED = LinearSegmentedColormap.from_list(
    "dark", ["#a9d3ff", "#3f8fe0", "#2e343d", "#e2604f", "#ffb9a6"]
)
SIGNED_PALETTES = {"light": matplotlib.colormaps["RdBu_r"], "dark": DARK_SIGNED}
UNSIGNED_PALETTES = {"light": matplotlib.colormaps["YlGnBu"], "dark": matplotlib.colormaps["viridis"]}
PALETTE_COLOURS = 255


@dataclass(frozen=True)
class PagePlot:
    """A plot, the id of its place on the page, the sentence below it, and the figure files that readers
    without JavaScript see in its place.
    """

    id: str
    plot: LayoutDOM
    caption: str
    images: Sequence[str] = ()


def new_plot(name: str, *, height: int, tooltips: Any = None, **fields: Any) -> figure:
    """Return an empty plot, as wide as its place; tools: only those that its tooltips need."""
    tools: list[Any] = []
    if tooltips is not None:
        tools.append(HoverTool(tooltips=tooltips, renderers=[]))
    plot = figure(
        name=name, height=height, sizing_mode="stretch_width", tools=tools, toolbar_location=None,
        background_fill_color=None, border_fill_color=None, outline_line_color=None, min_border=0, **fields,
    )  # fmt: skip
    plot.grid.grid_line_alpha = 0.25
    plot.grid.grid_line_color = GREY
    for axis in plot.axis:
        axis.minor_tick_line_color = None
        axis.major_tick_in = 0
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
    return plot


def empty_source(name: str, *columns: str) -> ColumnDataSource:
    """Return a source that the page's script fills."""
    return ColumnDataSource({column: [] for column in columns}, name=name)


def palettes() -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Return the palettes of maps as colours, for signed and unsigned metrics, in light and dark."""
    kinds = {"signed": SIGNED_PALETTES, "unsigned": UNSIGNED_PALETTES}
    return {
        kind: {theme: _colours(colours) for theme, colours in by_theme.items()}
        for kind, by_theme in kinds.items()
    }


def _colours(colours: Colormap) -> list[str]:
    places = np.linspace(0, 1, PALETTE_COLOURS)
    return [matplotlib.colors.to_hex(colour) for colour in colours(places)]
