"""Figures from the results table; each returns a matplotlib figure, or None where its numbers are missing."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lowmem_icl.statistics.agreement import spearman

# Okabe and Ito's colours, told apart by all kinds of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
STYLE = {
    "svg.hashsalt": "lowmem-icl",
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "figure.facecolor": "white",
}
ACCURACY = ("acc", "em")


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element, the same for the same numbers."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, NDArray[np.object_]]:
    """Return a figure in our style and its axes, [rows, columns]; sizes in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def accuracy_by_shots(results: pl.DataFrame) -> Figure | None:
    """Draw each task's clean accuracy against the number of demonstrations, chance dotted."""
    rows = results.filter(
        (pl.col("experiment") == "evaluate") & (pl.col("mask") == "clean") & pl.col("metric").is_in(ACCURACY)
    ).filter(pl.col("task") != "aggregate")
    if rows.is_empty():
        return None
    figure, axes = new_figure(6.5, 3.6)
    axis = axes[0, 0]
    shots = sorted(set(rows["shots"]))
    for number, ((task,), of_task) in enumerate(rows.group_by("task", maintain_order=True)):
        of_task = of_task.sort("shots")
        places = [shots.index(count) for count in of_task["shots"]]
        colour = COLOURS[number % len(COLOURS)]
        value = of_task["value"].to_numpy()
        error = np.nan_to_num(1.96 * of_task["stderr"].to_numpy())
        marker = "os^Dv<>ph*X8d+"[number % 14]
        axis.errorbar(places, value, yerr=error, marker=marker, color=colour, capsize=2, label=str(task))
        if of_task["chance"].null_count() == 0:
            axis.plot(places, of_task["chance"], ":", color=colour, linewidth=0.8)
    axis.set(xlabel="demonstrations", ylabel="accuracy", ylim=(0, 1.03))
    axis.set_xticks(range(len(shots)), [str(count) for count in shots])
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def unit_grid(rows: pl.DataFrame, layers: int, heads: int) -> NDArray[np.float64]:
    """Return head values as an array [L, H], NaN where there is none."""
    grid = np.full((layers, heads), np.nan)
    of_heads = rows.filter(pl.col("kind") == "head")
    grid[of_heads["layer"].to_numpy(), of_heads["head"].to_numpy()] = of_heads["value"].to_numpy()
    return grid


def head_maps(results: pl.DataFrame, metric: str, layers: int, heads: int, label: str) -> Figure | None:
    """Draw one map of heads by task (down) and shots (across) of a metric, each in its own colours."""
    rows = results.filter((pl.col("metric") == metric) & (pl.col("kind") == "head"))
    if rows.is_empty():
        return None
    tasks, shots = list(dict.fromkeys(rows["task"])), sorted(set(rows["shots"]))
    height = max(1.0, min(2.4, 0.22 * layers + 0.5))
    figure, axes = new_figure(
        min(10, 2.7 * len(shots) + 0.6), height * len(tasks) + 0.3, len(tasks), len(shots)
    )
    signed = bool((rows["value"] < 0).any())
    for down, task in enumerate(tasks):
        for across, count in enumerate(shots):
            axis = axes[down, across]
            grid = unit_grid(
                rows.filter((pl.col("task") == task) & (pl.col("shots") == count)), layers, heads
            )
            largest = float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 1.0
            image = axis.imshow(
                grid,
                origin="lower",
                aspect="auto",
                cmap="RdBu_r" if signed else "viridis",
                vmin=-largest if signed else 0,
                vmax=largest or 1.0,
            )
            figure.colorbar(image, ax=axis, fraction=0.05)
            axis.set_title(f"{task}, {count} shots", fontsize=8)
            axis.set_yticks(range(0, layers, max(1, layers // 4)))
            if across == 0:
                axis.set_ylabel("layer")
            if down == len(tasks) - 1:
                axis.set_xlabel("head")
    figure.suptitle(label, fontsize=9)
    return figure


def ffn_bars(results: pl.DataFrame) -> Figure | None:
    """Draw what removing each FFN alone costs in gold log-probability, mean over tasks, by shots."""
    rows = results.filter(
        (pl.col("experiment") == "ablate")
        & (pl.col("kind") == "ffn")
        & (pl.col("metric") == "gold_logprob_drop")
    )
    if rows.is_empty():
        return None
    figure, axes = new_figure(6.5, 2.8)
    axis = axes[0, 0]
    shots = sorted(set(rows["shots"]))
    for number, count in enumerate(shots):
        mean = (
            rows.filter(pl.col("shots") == count).group_by("layer").agg(pl.col("value").mean()).sort("layer")
        )
        width = 0.8 / len(shots)
        places = mean["layer"].to_numpy() + (number - (len(shots) - 1) / 2) * width
        axis.bar(places, mean["value"], width, color=COLOURS[number % len(COLOURS)], label=f"{count} shots")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="layer", ylabel="drop, nats")
    axis.legend(frameon=False, fontsize=8)
    return figure


def estimate_against_exact(results: pl.DataFrame) -> Figure | None:
    """Draw each unit's attribution against its exact drop of gold log-probability, a panel a shot count."""
    keys = ["task", "shots", "kind", "layer", "head"]
    estimate = results.filter((pl.col("metric") == "attribution") & (pl.col("task") != "aggregate"))
    exact = results.filter(pl.col("metric") == "gold_logprob_drop")
    both = estimate.select(*keys, "value").join(
        exact.select(*keys, pl.col("value").alias("exact")), on=keys, nulls_equal=True
    )
    if both.is_empty():
        return None
    shots = sorted(set(both["shots"]))
    figure, axes = new_figure(3 * len(shots), 3, 1, len(shots))
    for place, count in enumerate(shots):
        axis, rows = axes[0, place], both.filter(pl.col("shots") == count)
        for kind, colour in (("head", COLOURS[0]), ("ffn", COLOURS[5])):
            of_kind = rows.filter(pl.col("kind") == kind)
            axis.scatter(of_kind["value"], of_kind["exact"], s=8, color=colour, alpha=0.6, label=kind)
        axis.axline((0, 0), slope=1, color="grey", linewidth=0.6)
        rank = spearman(rows["value"].to_numpy(), rows["exact"].to_numpy())
        axis.set_title(f"{count} shots, Spearman {rank:.2f}", fontsize=9)
        axis.set(xlabel="estimate, nats", ylabel="exact drop, nats" if place == 0 else "")
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_yscale("symlog", linthresh=0.01)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def pruning_bars(results: pl.DataFrame) -> Figure | None:
    """Draw accuracy left by greedy masks and by gradient and random masks of equal size, clean as a line."""
    of_masks = results.filter(
        (pl.col("experiment") == "prune") & pl.col("metric").is_in(ACCURACY) & pl.col("k").is_null()
    )
    of_masks = of_masks.filter(
        ~pl.col("mask").str.contains("-aggregate-", literal=True) | (pl.col("task") == "aggregate")
    )
    if of_masks.is_empty():
        return None
    clean = results.filter(
        (pl.col("experiment") == "evaluate") & (pl.col("mask") == "clean") & pl.col("metric").is_in(ACCURACY)
    )
    shots = sorted(set(of_masks["shots"]))
    tasks = sorted(set(of_masks["task"]))
    figure, axes = new_figure(7, 2.3 * len(shots), len(shots), 1)
    for place, count in enumerate(shots):
        axis = axes[place, 0]
        for number, method in enumerate(("greedy", "gradient", "random")):
            rows = of_masks.filter((pl.col("shots") == count) & (pl.col("method") == method))
            at = {row["task"]: row for row in rows.iter_rows(named=True)}
            shown = [task for task in tasks if task in at]
            value = [at[task]["value"] for task in shown]
            error = np.nan_to_num([1.96 * at[task]["stderr"] for task in shown])
            axis.bar(
                [tasks.index(task) + (number - 1) * 0.27 for task in shown],
                value, 0.25, yerr=error, capsize=2, color=COLOURS[number], label=method,
            )  # fmt: skip
            if method == "greedy":
                for task in shown:
                    text = f"{at[task]['heads_removed']}H {at[task]['ffns_removed']}F"
                    axis.text(tasks.index(task), 1.03, text, ha="center", fontsize=7)
        for row in clean.filter(pl.col("shots") == count).iter_rows(named=True):
            if row["task"] in tasks:
                x = tasks.index(row["task"])
                axis.hlines(row["value"], x - 0.42, x + 0.42, colors="black", linewidth=1)
        axis.set(ylim=(0, 1.13), ylabel="accuracy")
        axis.set_title(f"{count} shots", fontsize=9)
        axis.set_xticks(range(len(tasks)), tasks, fontsize=8, rotation=30 if len(tasks) > 6 else 0)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=3, loc="lower right")
    return figure


def overlap_matrix(results: pl.DataFrame, method: str = "gradient") -> Figure | None:
    """Draw rank correlations of heads between tasks, a panel a shot count."""
    rows = results.filter(
        (pl.col("metric") == "spearman")
        & (pl.col("method") == method)
        & (pl.col("other_method") == method)
        & (pl.col("shots") == pl.col("other_shots"))
    )
    if rows.is_empty():
        return None
    shots = sorted(set(rows["shots"]))
    names: Sequence[str] = sorted({*rows["task"], *rows["other_task"]})
    side = max(2.6, 0.42 * len(names) + 1)
    figure, axes = new_figure(side * len(shots), side, 1, len(shots))
    for place, count in enumerate(shots):
        grid = np.eye(len(names))
        for row in rows.filter(pl.col("shots") == count).iter_rows(named=True):
            one, other = names.index(row["task"]), names.index(row["other_task"])
            grid[one, other] = grid[other, one] = row["value"]
        axis = axes[0, place]
        axis.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1)
        for (down, across), value in np.ndenumerate(grid):
            axis.text(across, down, f"{value:.2f}", ha="center", va="center", fontsize=6)
        axis.set_title(f"{count} shots", fontsize=9)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names if place == 0 else [""] * len(names), fontsize=7)
    return figure
