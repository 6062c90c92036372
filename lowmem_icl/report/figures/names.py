"""Texts that fit: widths of texts, names shortened, labels moved apart."""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.style import SMALL

ELLIPSIS = "…"
MEAN = "mean of tasks"
LEADING = 1.25
"""Height of a line of text, in its size."""


def text_width(text: str, size: float = SMALL) -> float:
    """Return the width of a text in inches; size: in points."""
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return float(width) / 72


def shown_name(task: str) -> str:
    """Return a task's name as figures show it: AGGREGATE in words, unprintable characters replaced.

    matplotlib hides labels that start with an underscore, and breaks lines.
    """
    if task == AGGREGATE:
        return MEAN
    text = "".join(character if character.isprintable() else "\ufffd" for character in task)
    return f" {text}" if text.startswith("_") else text


def short_names(tasks: Sequence[str], inches: float, size: float = SMALL) -> dict[str, str]:
    """Return a name per task that is at most so wide, all different.

    What does not fit loses its middle, where paths and families differ least; equal ones get a number.
    """
    shortened: dict[str, str] = {}
    for task in tasks:
        text, number = _shortened(shown_name(task), inches, size), 2
        while text in shortened.values():
            mark = f" ({number})"
            text = _shortened(shown_name(task), inches - text_width(mark, size), size) + mark
            number += 1
        shortened[task] = text
    return shortened


def _shortened(text: str, inches: float, size: float) -> str:
    if text_width(text, size) <= inches:
        return text
    for kept in range(len(text) - 1, 1, -1):
        tail = kept // 3
        short = text[: kept - tail].rstrip() + ELLIPSIS + text[len(text) - tail :].lstrip()
        if text_width(short, size) <= inches:
            return short
    return text[:1] + ELLIPSIS


def broken(text: str, inches: float, size: float = SMALL) -> list[str]:
    """Return a text in lines of so many inches, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= inches:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def moved_apart(positions: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Return positions at least a distance apart within bounds, in their order, each moved little.

    Where there is no room for all, they are spread evenly over the bounds.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    if (len(order) - 1) * distance > high - low:
        step = (high - low) / max(1, len(order) - 1)
        return [low + step * order.index(index) for index in range(len(order))]
    placed = [min(max(positions[index], low), high) for index in order]
    # Back and forth until all are apart; each round moves a pair by half of what it lacks.
    for _ in range(200):
        lacking = [distance - (right - left) for left, right in pairwise(placed)]
        if max(lacking, default=0.0) <= 1e-9:
            break
        for number, lack in enumerate(lacking):
            lack = distance - (placed[number + 1] - placed[number])
            if lack > 0:
                placed[number] -= lack / 2
                placed[number + 1] += lack / 2
        placed = _within(placed, distance, low, high)
    return [placed[order.index(index)] for index in range(len(order))]


def _within(placed: list[float], distance: float, low: float, high: float) -> list[float]:
    """Push positions in from both bounds."""
    for number in range(len(placed)):
        placed[number] = max(placed[number], low + number * distance)
    for number in reversed(range(len(placed))):
        placed[number] = min(placed[number], high - (len(placed) - 1 - number) * distance)
    return placed
