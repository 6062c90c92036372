"""What the page is made of, as plain values: sections of text, figures and tables of formatted cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
"""The content of a run's run.json."""
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class PageFigure:
    """A figure as an SVG element, the name of its file and the sentence below it."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page: text, then figures, then a table of formatted cells.

    `meaning`: the headings of docs/numbers.md that say what its numbers mean.
    """

    title: str
    text: str = ""
    figures: Sequence[PageFigure] = ()
    columns: Sequence[str] = ()
    rows: Rows = ()
    meaning: Sequence[str] = ()


def number_text(value: float | None) -> str:
    """Return a number with three decimals; empty where it is null or NaN."""
    return "" if value is None or value != value else f"{value:.3f}"


def interval_text(low: float | None, high: float | None) -> str:
    """Return the bounds of an interval; empty where there is none."""
    lower, upper = number_text(low), number_text(high)
    return f"{lower} to {upper}" if lower and upper else ""
