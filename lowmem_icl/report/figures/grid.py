"""Figure: accuracy with heads and FFNs removed together."""

import matplotlib
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from lowmem_icl.report.figures.layout import Asked, Record, axis_labels, new_figure, shots_of, shots_text
from lowmem_icl.report.figures.matrices import thinned, value_size, write_values
from lowmem_icl.report.figures.style import PALE
from lowmem_icl.report.numbers import mean_over_tasks
from lowmem_icl.report.points import curve_points
from lowmem_icl.tables.schema import ACCURACIES

COLOURS = matplotlib.colormaps["cividis"].with_extremes(bad=PALE)


def prune_grid(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw accuracy by heads (up) and FFNs (across) removed together, a panel per shot count.

    Of the task asked for, or of the mean over tasks.
    """
    points = curve_points(results, record["model"]).filter(
        (pl.col("procedure") == "curve-combined") & pl.col("metric").is_in(ACCURACIES)
    )
    points = mean_over_tasks(points) if asked.task is None else asked.of(points)
    if points.is_empty():
        return None
    shots = shots_of(points)
    heads, ffns = (sorted(set(points[name])) for name in ("heads_removed", "ffns_removed"))
    across = max(1, min(len(shots), int((asked.width - 0.5) / max(1.0, 0.2 * len(ffns)))))
    down = -(-len(shots) // across)
    width = (asked.width - 0.6) / across - 0.1
    height = min(2.2, max(0.8, 0.2 * len(heads)))
    figure = new_figure(asked.width, down * (height + 0.2) + 0.5)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    size = value_size(np.array([0.5]), width / len(ffns), height / len(heads))
    for place, (axis, n_shots) in enumerate(zip(axes, shots, strict=False)):
        grid = np.full((len(heads), len(ffns)), np.nan)
        for point in points.filter(pl.col("shots") == n_shots).iter_rows(named=True):
            grid[heads.index(point["heads_removed"]), ffns.index(point["ffns_removed"])] = point["value"]
        image = axis.imshow(
            grid, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="none"
        )
        if size is not None:
            write_values(axis, grid, image, size)
        axis.set_title(shots_text(n_shots))
        axis.set_xticks(*thinned([str(count) for count in ffns], width, 0.26))
        axis.set_yticks(*thinned([str(count) for count in heads], height, 0.1))
        axis.tick_params(labelbottom=place + across >= len(shots), labelleft=place % across == 0)
    for axis in axes[len(shots) :]:
        axis.remove()
    axis_labels(figure, "FFNs removed", "heads removed")
    return figure
