"""What the page says about pruning curves: figures of the levels, a table of the knees."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.report.figures import ACCURACY, COLOURS, new_figure

SHOWN = {
    ("gradient", False): ("own ranking", COLOURS[0], "-"),
    ("gradient", True): ("ranking of all tasks", COLOURS[1], "-"),
    ("ablation", False): ("own ranking", COLOURS[0], "-"),
    ("ablation", True): ("ranking of all tasks", COLOURS[1], "-"),
    ("rescored", False): ("scored again at every level", COLOURS[2], "-"),
    ("icl_effect", False): ("by in-context effect", COLOURS[4], "-"),
    ("gradient-highest", False): ("most alike task's ranking", COLOURS[5], "--"),
    ("gradient-lowest", False): ("least alike task's ranking", COLOURS[3], "--"),
}


def curve_rows(results: pl.DataFrame) -> pl.DataFrame:
    """Return the points of pruning curves: rows of the prune experiment at a percentage."""
    return results.filter((pl.col("experiment") == "prune") & pl.col("k").is_not_null())


def pruning_curves(results: pl.DataFrame, kind: str) -> Figure | None:
    """Draw accuracy against the percentage of heads or FFNs removed, a panel a task (down) and shot count (across).

    Grey: the random control with its band; dotted: chance.
    """
    rows = curve_rows(results).filter((pl.col("kind") == kind) & pl.col("metric").is_in(ACCURACY))
    if rows.is_empty():
        return None
    tasks, shots = list(dict.fromkeys(rows["task"])), sorted(set(rows["shots"]))
    figure, axes = new_figure(2.6 * len(shots) + 1, 1.9 * len(tasks) + 0.6, len(tasks), len(shots))
    for down, task in enumerate(tasks):
        for across, count in enumerate(shots):
            axis = axes[down, across]
            here = rows.filter((pl.col("task") == task) & (pl.col("shots") == count))
            _draw_panel(axis, here, count)
            axis.set_title(f"{task}, {count} shots", fontsize=8)
            axis.set(ylim=(0, 1.03), xlim=(-2, 92))
            if down == len(tasks) - 1:
                axis.set_xlabel(f"% of {kind}s removed" if kind == "head" else "% of FFNs removed")
    # Not every panel has every curve.
    drawn = {
        label: handle
        for axis in axes.ravel().tolist()
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _draw_panel(axis: Axes, here: pl.DataFrame, count: int) -> None:
    drawn = here.filter((pl.col("method") == "random") & pl.col("seed").is_null()).sort("k")
    if len(drawn):
        axis.fill_between(drawn["k"], drawn["low"], drawn["high"], color="0.85", linewidth=0)
        axis.plot(drawn["k"], drawn["value"], color="0.6", label="random draws")
    for (method, shared), (label, colour, line) in SHOWN.items():
        is_shared = (pl.col("other_task") == "aggregate").fill_null(value=False)
        of_curve = here.filter(
            (pl.col("method") == method)
            & (is_shared == shared)
            & (pl.col("other_shots").is_null() | (pl.col("other_shots") == count))
        ).sort("k")
        if len(of_curve):
            error = np.nan_to_num(1.96 * of_curve["stderr"].to_numpy())
            axis.errorbar(
                of_curve["k"], of_curve["value"], yerr=error, color=colour, linestyle=line, label=label,
                linewidth=1.1, elinewidth=0.6,
            )  # fmt: skip
    chance = here["chance"].drop_nulls()
    if len(chance):
        axis.axhline(chance[0], color="black", linestyle=":", linewidth=0.7)


def combined_grid(results: pl.DataFrame) -> Figure | None:
    """Draw mean accuracy over tasks by heads (down) and FFNs (across) removed together, a panel a shot count."""
    rows = curve_rows(results).filter((pl.col("method") == "combined") & pl.col("metric").is_in(ACCURACY))
    if "aggregate" in rows["task"]:
        rows = rows.filter(pl.col("task") == "aggregate")
    if rows.is_empty():
        return None
    rows = rows.group_by("shots", "heads_removed", "ffns_removed").agg(pl.col("value").mean())
    shots = sorted(set(rows["shots"]))
    heads, ffns = (sorted(set(rows[name])) for name in ("heads_removed", "ffns_removed"))
    figure, axes = new_figure(0.62 * len(ffns) * len(shots) + 1.5, 0.4 * len(heads) + 1, 1, len(shots))
    for across, count in enumerate(shots):
        axis = axes[0, across]
        grid = np.full((len(heads), len(ffns)), np.nan)
        for row in rows.filter(pl.col("shots") == count).iter_rows(named=True):
            grid[heads.index(row["heads_removed"]), ffns.index(row["ffns_removed"])] = row["value"]
        axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (down, at), value in np.ndenumerate(grid):
            colour = "white" if value < 0.6 else "black"
            axis.text(at, down, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(ffns)), [str(number) for number in ffns])
        axis.set_yticks(range(len(heads)), [str(number) for number in heads])
        axis.set(xlabel="FFNs removed", ylabel="heads removed" if across == 0 else "")
        axis.set_title(f"{count} shots", fontsize=9)
    return figure


def knee_table(results: pl.DataFrame) -> list[list[str]]:
    """Return rows of task, shots, what is removed, ranking, knee and what it costs on evaluation documents."""
    keys = ["task", "shots", "method", "kind", "other_task"]
    rows = curve_rows(results)
    chosen = rows.filter(pl.col("metric") == "knee").select(*keys, "k")
    cost = rows.filter(pl.col("metric") == "knee_acc_drop").select(*keys, "value", "low", "high")
    both = chosen.join(cost, on=keys, how="left", nulls_equal=True, maintain_order="left")
    return [
        [
            row["task"],
            str(row["shots"]),
            "heads" if row["kind"] == "head" else "FFNs",
            "of all tasks" if row["other_task"] == "aggregate" else "own",
            f"{row['k']} %",
            ""
            if row["value"] is None
            else f"{100 * row['value']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})",
        ]
        for row in both.iter_rows(named=True)
    ]


KNEE_COLUMNS = ("task", "shots", "removed", "ranking", "knee", "drop of accuracy there, points")


def replaced_note(checked: Sequence[Mapping[str, Any]]) -> str:
    """Say for which searches the gradient ranking's mask of equal size was better and is returned instead.

    checked: what run.json says of the greedy searches and of the masks beside them.
    """
    lost = {(one["task"], one["shots"], one["method"]): one["check_loss"] for one in checked}
    better = [
        f"{task} at {shots}"
        for (task, shots, method), loss in lost.items()
        if method == "greedy" and lost.get((task, shots, "gradient"), loss) < loss
    ]
    if not better:
        return ""
    return (
        " The gradient ranking's mask of equal size lost less on the checking half, and is returned instead, for "
        f"{', '.join(better)} shots."
    )
