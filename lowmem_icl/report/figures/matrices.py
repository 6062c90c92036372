"""What figures of matrices share: numbers in cells, legible on every colour."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from lowmem_icl.report.figures.names import text_width
from lowmem_icl.report.figures.style import SMALL, text_colour

SMALLEST = 4.5
"""Points: smaller numbers than these are not written."""


def value_text(value: float) -> str:
    """Return two digits of a share or a correlation: .85, −.07, 1."""
    text = f"{abs(value):.2f}"
    text = "1" if text == "1.00" else "0" if text == "0.00" else text[1:]
    return f"−{text}" if value < 0 and text != "0" else text


def value_size(grid: NDArray[np.float64], cell_width: float, cell_height: float) -> float | None:
    """Return the size in points at which all numbers of a grid fit into its cells; None where none does.

    cell_width, cell_height: in inches.
    """
    texts = {value_text(value) for value in grid[np.isfinite(grid)].tolist()}
    widest = max((text_width(text) for text in texts), default=1.0)
    size = SMALL * min(1.0, 0.86 * cell_width / widest, 0.8 * cell_height * 72 / SMALL)
    return size if size >= SMALLEST else None


def write_values(axis: Axes, grid: NDArray[np.float64], image: AxesImage, size: float) -> None:
    """Write the numbers of a grid into its cells, black or white, whichever is legible on their colour."""
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(np.array([value]))[0].tolist()
            colour = text_colour((red, green, blue))
            axis.text(x, y, value_text(value), ha="center", va="center", fontsize=size, color=colour)


def thinned(labels: list[str], inches: float, each: float) -> tuple[list[int], list[str]]:
    """Return ticks for so many labels of a row as fit, the first and then every n-th.

    each: inches that a label needs.
    """
    step = max(1, -(-len(labels) * each // inches)) if inches > 0 else len(labels)
    chosen = list(range(0, len(labels), int(step)))
    return chosen, [labels[index] for index in chosen]
