"""Tables of masks that fit the terminal: columns are left out before names are broken, at a minus."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lowmem_icl.cli.terminal import plain_console
from lowmem_icl.masks.naming import task_slug

GAP = 3
MOST_NAMES = 0.5
NAMES = ("name", "masks", "task", "method", "verdict")
"""Columns of words; all others are of numbers."""
COLUMNS = ("name", "method", "task", "shots", "removed", "accuracy", "verdict")


def print_list(masks: Sequence[Mapping[str, Any]]) -> None:
    """Print masks with what they remove, what for, and the accuracy they leave, as `masks list` knows them.

    Where the terminal is narrow, what most names say is left out, and then whether the tolerance holds.
    """
    cells = {name: [_cell(mask, name) for mask in masks] for name in COLUMNS}
    shown = [name for name in COLUMNS if any(cells[name])]
    width = plain_console().width
    for name in [*(name for name in ("method", "task", "shots") if _is_said(masks, name)), "verdict"]:
        if sum(max(map(len, (name, *cells[name]))) + GAP for name in shown) - GAP > width and name in shown:
            shown.remove(name)
    print_table(shown, list(zip(*(cells[name] for name in shown), strict=True)))


def _cell(mask: Mapping[str, Any], column: str) -> str:
    if column == "task":
        return ",".join(mask["tasks"]) if len(mask["tasks"]) < 3 else f"{len(mask['tasks'])} tasks"
    if column == "shots":
        return ",".join(map(str, mask["shots"]))
    if column == "removed":
        return f"{mask['heads_removed']}H {mask['ffns_removed']}F"
    if column == "accuracy":
        before, after = mask["accuracy_before"], mask["accuracy_after"]
        if after is None:
            return ""
        return f"{after:.3f}" if before is None else f"{before:.3f} → {after:.3f}"
    return str(mask[column] or "")


def _is_said(masks: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Tell whether most names say the masks' method, task or shots."""

    def said(mask: Mapping[str, Any]) -> bool:
        name = f"-{mask['name']}-"
        if column == "method":
            return name.startswith(f"-{mask['method']}-")
        if column == "shots":
            return all(f"-{shots}shot-" in name for shots in mask["shots"])
        return "-aggregate-" in name or all(f"-{task_slug(task)}-" in name for task in mask["tasks"])

    return sum(map(said, masks)) > MOST_NAMES * len(masks)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; names are broken at a minus where they are too long for the terminal, numbers never."""
    console = plain_console()
    widths = [_width([column, *(row[number] for row in rows)]) for number, column in enumerate(columns)]
    room = console.width - sum(widths[1:]) - GAP * (len(columns) - 1)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        is_name = column in NAMES
        table.add_column(column, overflow="fold", no_wrap=not is_name, justify="left" if is_name else "right")
    for first, *others in rows:
        name = "\n".join(broken(line, max(room, 1)) for line in str(first).split("\n"))
        table.add_row(Text(name), *(Text(str(cell)) for cell in others))
    console.print(table)


def _width(cells: Sequence[Any]) -> int:
    return max(len(line) for cell in cells for line in str(cell).split("\n"))


def broken(name: str, width: int) -> str:
    """Return a name in lines of at most a width, each but the last ending with a minus where that can be."""
    lines = [""]
    for piece in re.findall(r"[^-]*-|[^-]+$", name):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
