"""What a figure is asked for, and where its panels stand: small multiples that wrap, keys above them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, MaxNLocator

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.names import LEADING, broken, short_names, text_width
from lowmem_icl.report.figures.style import NORMAL, SMALL

Record = Mapping[str, Any]
"""The content of a run's run.json."""
PAGE_WIDTH = 6.75
"""In inches: the text of a page."""
TALLEST = 8.6
"""In inches, with room for a caption on a page of eleven."""
SIDE = 0.5
"""In inches: ticks and label left of the first panel."""
BASE, KEY = 0.55, 0.45
"""In inches: ticks and label below the last row with shot counts above the first; and a key or a scale."""
HANDLE = 3.3
"""In sizes of text: what stands for a label in a key, and the room between columns."""
GAP = 0.06
"""In inches, between the tasks of a row."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a figure: its width in inches, and one task, or None for all."""

    width: float = PAGE_WIDTH
    task: str | None = None

    def of(self, records: pl.DataFrame) -> pl.DataFrame:
        """Return the records of the task asked for, or all."""
        return records if self.task is None else records.filter(pl.col("task") == self.task)


@dataclass(frozen=True)
class Panels:
    """A figure of a panel per task and shot count; width and height of a panel in inches."""

    figure: Figure
    axes: Mapping[tuple[str, int], Axes]
    width: float
    height: float

    def __iter__(self) -> Iterator[tuple[str, int, Axes]]:
        """Yield task, shot count and axes of every panel."""
        return ((task, shots, axis) for (task, shots), axis in self.axes.items())


@dataclass(frozen=True)
class PanelSize:
    """Sizes of panels in inches: the narrowest, and height by width between bounds."""

    narrowest: float
    ratio: float
    lowest: float
    highest: float

    def height(self, width: float, rows: int, spare: float) -> float:
        """Return the height of a panel of a width, in that many rows; spare: taken by a row's title."""
        fits = (TALLEST - BASE - KEY) / rows - spare
        return max(self.lowest, min(self.ratio * width, self.highest, fits))


def tasks_of(records: pl.DataFrame) -> list[str]:
    """Return each task once, in order of appearance, their mean last."""
    named = [task for task in dict.fromkeys(records["task"]) if task is not None]
    return sorted(named, key=lambda task: task == AGGREGATE)


def shots_of(records: pl.DataFrame) -> list[int]:
    """Return the shot counts, ascending."""
    return sorted(set(records["shots"].drop_nulls()))


def shots_text(shots: int) -> str:
    """Return a shot count in words."""
    return f"{shots} shot" if shots == 1 else f"{shots} shots"


def shots_title(shots: int, inches: float) -> str:
    """Return a shot count as the title of a panel of a width: in words, or a number alone."""
    return shots_text(shots) if inches > 0.55 else str(shots)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of exactly this size in inches, whose layout keeps texts apart."""
    figure = Figure(figsize=(width, height), layout="constrained")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=0.03, h_pad=0.025, wspace=0.02, hspace=0.02)
    return figure


def task_panels(
    asked: Asked, tasks: Sequence[str], shots: Sequence[int], size: PanelSize, together: int = 1
) -> Panels:
    """Return a figure with a panel per task and shot count.

    The panels of a task stand side by side; where there is room, tasks do too, and always so many `together`
    that follow each other. The task's name stands above its first panel, shot counts above the first row.
    """
    count, room = len(shots), asked.width - SIDE
    across = max(1, min(len(tasks), int((room + GAP) / (count * size.narrowest + GAP))))
    across -= across % together if across > together else 0
    rows = ceil(len(tasks) / across)
    across = ceil(len(tasks) / rows)
    across += -across % together if across > together else 0
    width = (room - (across - 1) * GAP) / (across * count) - 0.05
    title = NORMAL * LEADING / 72 + 0.06
    height = size.height(width, rows, title)
    figure = new_figure(asked.width, rows * (height + title) + BASE)
    spaced = [*([width] * count), GAP]
    grid = figure.add_gridspec(rows, across * (count + 1) - 1, width_ratios=(spaced * across)[:-1])
    names = short_names(tasks, count * width - 0.05, NORMAL)
    axes: dict[tuple[str, int], Axes] = {}
    for number, task in enumerate(tasks):
        row, block = divmod(number, across)
        for place, n_shots in enumerate(shots):
            axis = figure.add_subplot(grid[row, block * (count + 1) + place])
            lines = [names[task]] if place == 0 else []
            if count > 1 and row == 0:
                lines.append(shots_title(n_shots, width))
            axis.set_title("\n".join(lines))
            is_lowest = number + across >= len(tasks)
            axis.tick_params(labelleft=block + place == 0, labelbottom=is_lowest)
            axes[task, n_shots] = axis
    return Panels(figure, axes, width, height)


def few_ticks(axis: Axes, which: str, inches: float, *, integer: bool = False, bounds: bool = False) -> None:
    """Set so many ticks on "x" or "y" that their labels fit into a length.

    bounds: of integers, only the first and the last where there is no room for more.
    """
    each = 0.34 if which == "x" else 0.26
    most = max(1, min(5, int(inches / each)))
    along = axis.xaxis if which == "x" else axis.yaxis
    if bounds and most <= 2:
        low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
        along.set_major_locator(FixedLocator([ceil(low), int(high)]))
        return
    along.set_major_locator(MaxNLocator(most, integer=integer, min_n_ticks=1))


def percent_ticks(axis: Axes, inches: float) -> None:
    """Set an x axis from 0 to 100 per cent, whose outer labels stay within its panel."""
    marks = [0, 25, 50, 75, 100] if inches > 1.6 else [0, 50, 100] if inches > 0.6 else [0, 100]
    axis.set_xlim(-2, 102)
    axis.set_xticks(marks, [str(mark) for mark in marks])
    keep_inside(axis)


def share_ticks(axis: Axes, which: str, inches: float) -> None:
    """Set an axis from 0 to 1 with so many ticks as fit."""
    marks = [0, 0.25, 0.5, 0.75, 1] if inches > (1.6 if which == "x" else 1.2) else [0, 0.5, 1]
    texts = [f"{mark:g}" for mark in marks]
    if which == "x":
        axis.set_xlim(-0.02, 1.02)
        axis.set_xticks(marks, texts)
        keep_inside(axis)
    else:
        axis.set_ylim(-0.03, 1.05)
        axis.set_yticks(marks, texts)


def keep_inside(axis: Axes) -> None:
    """Let the first and last label of an x axis end where its panel does."""
    ticks = axis.xaxis.get_major_ticks()
    ticks[0].label1.set_horizontalalignment("left")
    ticks[-1].label1.set_horizontalalignment("right")


def key_above(figure: Figure, entries: Iterable[tuple[Artist, str]]) -> None:
    """Put a key above all panels, in so many columns as the figure's width takes."""
    by_label: dict[str, Artist] = {}
    for artist, label in entries:
        by_label.setdefault(label, artist)
    if not by_label:
        return
    columns = _key_columns(list(by_label), figure.get_size_inches()[0] - 0.15)
    figure.legend(list(by_label.values()), list(by_label), loc="outside upper left", ncols=columns)
    grow(figure, ceil(len(by_label) / columns) * SMALL * 1.6 / 72)


def _key_columns(labels: Sequence[str], inches: float) -> int:
    """Return the most columns of a key that fit; each is as wide as its widest label with what it names."""
    for columns in range(len(labels), 1, -1):
        longer, rows = len(labels) % columns, len(labels) // columns
        sizes = [rows + 1] * longer + [rows] * (columns - longer)
        ends = list(accumulate(sizes, initial=0))
        widths = [max(map(text_width, labels[first:last])) for first, last in pairwise(ends)]
        if sum(widths) + columns * HANDLE * SMALL / 72 <= inches:
            return columns
    return 1


def grow(figure: Figure, inches: float) -> None:
    """Make a figure higher, so that what is put above its panels does not make them lower."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + inches)


def axis_labels(figure: Figure, across: str, up: str) -> None:
    """Name the axes of all panels once; a name beside low panels is broken into lines."""
    # The name is centred on a figure that a key may still make higher, and must end below that.
    room = figure.get_size_inches()[1] - KEY
    figure.supxlabel(across)
    figure.supylabel("\n".join(broken(up, room, NORMAL)))
