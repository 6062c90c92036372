"""Figures: what units restore and break when they are patched, and the heads of function vectors."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.report.figures.layout import (
    SIDE,
    Asked,
    PanelSize,
    Record,
    axis_labels,
    few_ticks,
    keep_inside,
    shots_of,
    task_panels,
    tasks_of,
)
from lowmem_icl.report.figures.maps import Grid, MapScale, head_maps, shape_of
from lowmem_icl.report.figures.names import shown_name
from lowmem_icl.report.patches import patch_records

DIRECTIONS = {"restore": "restored", "break": "broken"}
FFN = "FFN"
WIDE, NARROW = 0.9, 0.38
"""In inches: panels, and those of figures that would else have more than MOST_ROWS."""
MOST_ROWS = 14
BEFORE_FFNS = 1.5
"""In points: what parts heads from FFNs."""


def patch_heads(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw what every unit's value restores and breaks: two maps per task and shot count, FFNs in a column of
    their own.
    """
    metrics = [f"{direction}_gold_logprob" for direction in DIRECTIONS]
    patches = _of_tasks(asked.of(patch_records(results).filter(pl.col("metric").is_in(metrics))))
    if patches.is_empty():
        return None
    is_last = pl.col("procedure") == "last"
    patches = patches.filter(is_last) if (patches["procedure"] == "last").any() else patches
    shape = shape_of(record)
    named = {
        f"{shown_name(task)}, {name}": (task, f"{direction}_gold_logprob")
        for task in tasks_of(patches)
        for direction, name in DIRECTIONS.items()
    }
    shots = shots_of(patches)
    size = PanelSize(_narrowest(asked, len(named), len(shots)), shape[0] / (shape[1] + 1), 0.3, 1.9)
    panels = task_panels(asked, list(named), shots, size, together=len(DIRECTIONS))
    scale, image = MapScale(patches["value"].to_numpy()), None
    by_map = patches.partition_by("task", "metric", "shots", as_dict=True)
    for name, n_shots, axis in panels:
        units = by_map.get((*named[name], n_shots), patches.clear())
        image = scale.draw(axis, grid_with_ffns(units, shape))
        _mark_ffns(axis, shape[1], panels.width)
        few_ticks(axis, "y", panels.height, integer=True, bounds=True)
    axis_labels(panels.figure, "head, and FFN", "layer")
    assert image is not None
    scale.bar(panels.figure, image, "gold log-probability, patched − unpatched, nats")
    return panels.figure


def function_vectors(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw the function-vector scores of heads."""
    scores = patch_records(results).filter(pl.col("metric") == "function_vector")
    return head_maps(_of_tasks(asked.of(scores)), record, asked, "probability added by the head's mean")


def _of_tasks(records: pl.DataFrame) -> pl.DataFrame:
    """Return the records of tasks, or where there are none those of prompts that were given, which have no
    shot count and so no title.
    """
    of_tasks = records.filter(pl.col("shots").is_not_null())
    return of_tasks if len(of_tasks) else records.with_columns(pl.col("shots").fill_null(0))


def grid_with_ffns(units: pl.DataFrame, shape: tuple[int, int]) -> Grid:
    """Return the values of units [L, H + 1], FFNs in the last column; NaN where there is none."""
    layers, heads = shape
    grid = np.full((layers, heads + 1), np.nan)
    column = units["head"].fill_null(heads)
    grid[units["layer"].to_numpy(), column.to_numpy()] = units["value"].to_numpy()
    return grid


def _narrowest(asked: Asked, names: int, shots: int) -> float:
    """Return how narrow a panel may be, so that the maps of all tasks fit on a page."""
    across = max(1, int((asked.width - SIDE) / (shots * WIDE)))
    return WIDE if names <= across * MOST_ROWS else NARROW


def _mark_ffns(axis: Axes, heads: int, width: float) -> None:
    """Part the column of FFNs from the heads' and name it."""
    axis.axvline(heads - 0.5, color="white", linewidth=BEFORE_FFNS)
    middle = [heads // 2] if width > 1.2 and heads > 3 else []
    marks = [0, *middle, heads]
    axis.set_xticks(marks, [*map(str, marks[:-1]), FFN])
    keep_inside(axis)
