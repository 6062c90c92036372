"""What figures of lines share: lines named at their ends, ticks that do not meet."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from lowmem_icl.report.figures.names import LEADING, moved_apart, text_width
from lowmem_icl.report.figures.style import SMALL

LineEnd = tuple[float, str, str]
"""Where a line ends on the y axis, what it is called, and its colour."""


def name_ends(axis: Axes, ends: Sequence[LineEnd], inches: float) -> None:
    """Name lines right of a panel where they end, moved apart where they end close together.

    inches: the panel's height; its limits must be set.
    """
    low, high = axis.transData.transform([(0, limit) for limit in axis.get_ylim()])[:, 1]
    heights = axis.transData.transform([(axis.get_xlim()[1], value) for value, _, _ in ends])[:, 1]
    # In shares of the panel's height, whatever scale it has.
    shares = [float((height - low) / (high - low)) for height in heights]
    line = SMALL * LEADING / 72 / inches
    placed = moved_apart(shares, line, line / 2, 1 - line / 2)
    for share, (_, text, colour) in zip(placed, ends, strict=True):
        axis.text(
            1.02, share, text, transform=axis.transAxes, color=colour, fontsize=SMALL, va="center", ha="left"
        )  # fmt: skip


def ticks_apart(values: Sequence[int], inches: float) -> tuple[list[int], list[str]]:
    """Return ticks at values on a true scale, and labels for those that do not meet another's.

    inches: the length of the axis, which the values fill. The last is always named.
    """
    span = max(values) - min(values) or 1
    labels, limit = [], float("inf")
    for value in reversed(values):
        place, half = (value - min(values)) / span * inches, text_width(f"{value}0") / 2
        named = place + half <= limit
        labels.append(str(value) if named else "")
        limit = place - half if named else limit
    return list(values), labels[::-1]
