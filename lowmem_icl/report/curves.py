"""The page's section on pruning curves: accuracy at each level, heads and FFNs together, and the knees."""

import itertools

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.on_page import COLOURS, error_bars, new_figure, page_figure, task_order
from lowmem_icl.report.numbers import mean_over_tasks, subject
from lowmem_icl.report.section import Record, Section
from lowmem_icl.tables.schema import ACCURACIES

TEXT = (
    "By one ranking of the intact model, more and more of the least important units are removed; judged on "
    "the first evaluation documents. A knee is the last level before the first that credibly costs more than "
    "one point of accuracy: the whole 95 % interval of its drop on training documents is above. Up to the "
    "certain knee every level credibly costs at most one point. The last level that truly does lies between "
    "the two; more training documents bring them together. What the knee costs is measured on evaluation "
    "documents. The grey band holds the next random mask in 95 % of cases."
)
KNEE_COLUMNS = (
    "task",
    "shots",
    "removed",
    "ranking",
    "knee",
    "certain knee",
    "accuracy drop at the knee, points",
)
# Drawn in the panels of heads or FFNs: by method, and whether the ranking is that of all tasks.
CURVES = {
    ("gradient", False): ("own ranking", COLOURS[0], "-"),
    ("gradient", True): ("ranking of all tasks", COLOURS[1], "-"),
    ("ablation", False): ("own ranking", COLOURS[0], "-"),
    ("ablation", True): ("ranking of all tasks", COLOURS[1], "-"),
    ("rescored", False): ("scored again at every level", COLOURS[2], "-"),
    ("icl_effect", False): ("by in-context effect", COLOURS[4], "-"),
    ("gradient-highest", False): ("most similar task's ranking", COLOURS[5], "--"),
    ("gradient-lowest", False): ("least similar task's ranking", COLOURS[3], "--"),
}
# Curves of another shot count's ranking are in the table alone; the grid has a figure of its own.
UNDRAWN = ("cross-shot", "curve-combined")


def curves_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return the pruning curves and their knees; None where there are none."""
    points = curve_points(results)
    if points.is_empty():
        return None
    grid = combined_points(points)
    return Section(
        "Pruning curves",
        TEXT,
        (
            *page_figure(
                "heads", "The least important heads go first; bars: 95 % intervals; dotted: chance.",
                pruning_curves, points, "head",
            ),
            *page_figure("ffn-curves", "The same for FFNs.", pruning_curves, points, "ffn"),
            *page_figure(
                "grid", f"Accuracy with heads and FFNs removed together, {subject(grid)}.",
                combined_grid, grid,
            ),
        ),
        KNEE_COLUMNS,
        knee_rows(points),
    )  # fmt: skip


def curve_points(results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of pruning curves: those of the prune experiment at a percentage."""
    return results.filter((pl.col("experiment") == "prune") & pl.col("percent").is_not_null())


def pruning_curves(points: pl.DataFrame, kind: str) -> Figure | None:
    """Draw accuracy against the percentage of heads or FFNs removed.

    A panel per task (down) and shot count (across). Grey: the random control with its band; dotted: chance.
    """
    records = points.filter(
        (pl.col("kind") == kind) & pl.col("metric").is_in(ACCURACIES) & ~pl.col("procedure").is_in(UNDRAWN)
    )
    if records.is_empty():
        return None
    tasks, shots = task_order(records["task"]), sorted(set(records["shots"]))
    figure, axes = new_figure(2.6 * len(shots) + 1, 1.9 * len(tasks) + 0.6, len(tasks), len(shots))
    for (row, task), (column, n_shots) in itertools.product(enumerate(tasks), enumerate(shots)):
        axis = axes[row, column]
        _draw_panel(axis, records.filter((pl.col("task") == task) & (pl.col("shots") == n_shots)))
        axis.set_title(f"{task}, {n_shots} shots", fontsize=8)
        axis.set(ylim=(0, 1.03), xlim=(-2, 92))
        if row == len(tasks) - 1:
            axis.set_xlabel(f"% of {'heads' if kind == 'head' else 'FFNs'} removed")
    # Not every panel has every curve.
    handles = {
        label: handle
        for axis in axes.ravel().tolist()
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _draw_panel(axis: Axes, panel: pl.DataFrame) -> None:
    # Single draws have a mask, their mean has none.
    control = panel.filter((pl.col("method") == "random") & pl.col("mask").is_null()).sort("percent")
    if len(control):
        x = control["percent"]
        axis.fill_between(x, control["low"], control["high"], color="0.85", linewidth=0)
        axis.plot(x, control["value"], color="0.6", label="random draws")
    is_shared = (pl.col("other_task") == AGGREGATE).fill_null(value=False)
    for (method, shared), (label, colour, line) in CURVES.items():
        curve = panel.filter((pl.col("method") == method) & (is_shared == shared)).sort("percent")
        if len(curve):
            axis.errorbar(
                curve["percent"], curve["value"], yerr=error_bars(curve), color=colour,
                linestyle=line, label=label, linewidth=1.1, elinewidth=0.6,
            )  # fmt: skip
    chance = panel["chance"].drop_nulls()
    if len(chance):
        axis.axhline(chance[0], color="black", linestyle=":", linewidth=0.7)


def combined_points(points: pl.DataFrame) -> pl.DataFrame:
    """Return the records of accuracy with heads and FFNs removed together, mean over tasks."""
    return mean_over_tasks(
        points.filter((pl.col("procedure") == "curve-combined") & pl.col("metric").is_in(ACCURACIES))
    )


def combined_grid(points: pl.DataFrame) -> Figure | None:
    """Draw accuracy by heads (down) and FFNs (across) removed together, a panel per shot count."""
    if points.is_empty():
        return None
    shots = sorted(set(points["shots"]))
    heads, ffns = (sorted(set(points[name])) for name in ("heads_removed", "ffns_removed"))
    figure, axes = new_figure(0.62 * len(ffns) * len(shots) + 1.5, 0.4 * len(heads) + 1, 1, len(shots))
    for column, n_shots in enumerate(shots):
        axis = axes[0, column]
        grid = np.full((len(heads), len(ffns)), np.nan)
        for point in points.filter(pl.col("shots") == n_shots).iter_rows(named=True):
            grid[heads.index(point["heads_removed"]), ffns.index(point["ffns_removed"])] = point["value"]
        axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            colour = "white" if value < 0.6 else "black"
            text = f"{value:.2f}" if np.isfinite(value) else ""
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(ffns)), [str(count) for count in ffns])
        axis.set_yticks(range(len(heads)), [str(count) for count in heads])
        axis.set(xlabel="FFNs removed", ylabel="heads removed" if column == 0 else "")
        axis.set_title(f"{n_shots} shots", fontsize=9)
    return figure


def knee_rows(points: pl.DataFrame) -> list[list[str]]:
    """Return formatted rows of KNEE_COLUMNS: every curve's knee and what it costs on evaluation documents."""
    keys = ["task", "shots", "procedure", "method", "kind", "other_task", "other_shots"]
    knees = points.filter(pl.col("metric") == "knee").select(*keys, "percent")
    certain = points.filter(pl.col("metric") == "knee_certain").select(
        *keys, pl.col("value").alias("certain")
    )
    costs = points.filter(pl.col("metric") == "knee_acc_drop").select(*keys, "value", "low", "high")
    both = knees.join(certain, on=keys, how="left", nulls_equal=True, maintain_order="left").join(
        costs, on=keys, how="left", nulls_equal=True, maintain_order="left"
    )
    return [
        [
            row["task"],
            str(row["shots"]),
            "heads" if row["kind"] == "head" else "FFNs",
            "of all tasks" if row["other_task"] == AGGREGATE else "own",
            f"{row['percent']} %",
            "" if row["certain"] is None else f"{row['certain']:g} %",
            _points_text(row["value"], row["low"], row["high"]),
        ]
        for row in both.iter_rows(named=True)
    ]


def _points_text(value: float | None, low: float | None, high: float | None) -> str:
    """Return a drop of accuracy in points, with its interval where there is one."""
    if value is None:
        return ""
    interval = "" if low is None or high is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * value:+.1f}{interval}"
