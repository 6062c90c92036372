"""What the page is made of, as plain values: sections of text, plots and tables of formatted cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_icl.report.page.plots.style import PagePlot

Record = Mapping[str, Any]
"""The content of a run's run.json."""
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """A table of formatted cells; `caption` says what a row is."""

    columns: Sequence[str]
    rows: Rows
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: text, then what its own template shows, then plots, then a table.

    id: its anchor, and the name of its own template where it has one. meaning: the headings of
    docs/numbers.md that say what its numbers mean. data: for its own template.
    """

    id: str
    title: str
    text: str = ""
    plots: Sequence[PagePlot] = ()
    table: Table | None = None
    meaning: Sequence[str] = ()
    data: Any = None


def number_text(value: float | None) -> str:
    """Return a number with three decimals; empty where it is null or NaN."""
    # Adding zero turns a zero below zero into a plain one.
    return "" if value is None or value != value else f"{round(value, 3) + 0:.3f}"


def interval_text(low: float | None, high: float | None) -> str:
    """Return the bounds of an interval; empty where there is none."""
    lower, upper = number_text(low), number_text(high)
    return f"{lower} to {upper}" if lower and upper else ""
