"""Draw the README's figure from a run's tables: what each head is worth, and what masks of equal size leave.

    python scripts/draw_readme_figure.py RUN_FOLDER docs/demo.svg [--task recall]

Left: the drop of the gold log-probability when one head is removed alone, at the largest number of
demonstrations; heads that the greedy mask of the task keeps are framed. Right: accuracy of every task, clean
and under the greedy mask, the gradient ranking's mask and a random mask of the same size.
"""

from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import polars as pl
import typer
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lowmem_icl.errors import LowmemIclError
from lowmem_icl.masks.files import read_mask
from lowmem_icl.report.figures import COLOURS, STYLE, new_figure
from lowmem_icl.system.files import atomic_path
from lowmem_icl.tables.schema import ACCURACIES, read_table

# Label and colour of every group of bars.
METHODS = {
    "clean": ("whole model", "#999999"),
    "greedy": ("greedy mask", COLOURS[0]),
    "gradient": ("gradient ranking's mask", COLOURS[1]),
    "random": ("random mask", COLOURS[5]),
}
FRAME_COLOUR = COLOURS[5]


def head_drops(results: pl.DataFrame, task: str, shots: int) -> NDArray[np.float64]:
    """Return the drop of the gold log-probability without each head, [L, H] in nats."""
    heads = results.filter(
        (pl.col("experiment") == "ablate")
        & (pl.col("procedure") == "single")
        & (pl.col("metric") == "gold_logprob_drop")
        & (pl.col("kind") == "head")
        & (pl.col("task") == task)
        & (pl.col("shots") == shots)
    )
    if heads.is_empty():
        raise typer.BadParameter(f"the run has no ablations of task {task}; give another --task")
    layer, head = heads["layer"].to_numpy(), heads["head"].to_numpy()
    drops = np.full((layer.max() + 1, head.max() + 1), np.nan)
    drops[layer, head] = heads["value"].to_numpy()
    return drops


def accuracies(results: pl.DataFrame, shots: int) -> pl.DataFrame:
    """Return accuracies with bounds and chance by task and method: clean, and under each task's own masks."""
    right = pl.col("labels").fill_null("right") == "right"
    clean = (pl.col("experiment") == "evaluate") & (pl.col("mask") == "clean") & right
    pruned = (pl.col("experiment") == "prune") & (pl.col("procedure") == "greedy")
    own = pl.col("mask_task") == pl.col("task")
    return (
        results.filter((clean | (pruned & own)) & pl.col("metric").is_in(ACCURACIES))
        .filter((pl.col("shots") == shots) & (pl.col("task") != "aggregate"))
        .with_columns(pl.when(clean).then(pl.lit("clean")).otherwise(pl.col("method")).alias("method"))
    )


def draw_heads(axis: Axes, drops: NDArray[np.float64], removed: frozenset[tuple[int, int]]) -> None:
    """Draw the drops [L, H] as a map, layer 0 at the bottom, heads that are not removed in frames."""
    # The square root lets heads that cost a tenth of the largest be seen.
    norm = PowerNorm(0.5, vmin=0, vmax=drops.max())
    image = axis.imshow(drops.clip(min=0), cmap="Blues", norm=norm, origin="lower", aspect="equal")
    layers, heads = drops.shape
    for layer in range(layers):
        for head in range(heads):
            drop = drops[layer, head]
            if drop >= 0.1:
                colour = "white" if drop > drops.max() / 3 else "black"
                axis.text(head, layer, f"{drop:.1f}", ha="center", va="center", color=colour, fontsize=8)
            if (layer, head) not in removed:
                corner = (head - 0.46, layer - 0.46)
                axis.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, color=FRAME_COLOUR, linewidth=2))
    axis.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#DDDDDD", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    axis.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    axis.figure.colorbar(image, ax=axis, shrink=0.6, label="nats lost", ticks=MaxNLocator(integer=True))


def draw_masks(axis: Axes, measured: pl.DataFrame) -> None:
    """Draw the accuracies of all tasks as bars with 95 % intervals, chance dotted."""
    tasks = list(dict.fromkeys(measured["task"]))
    names = dict(zip(tasks, tasks, strict=True))
    for number, (method, (label, colour)) in enumerate(METHODS.items()):
        for record in measured.filter(pl.col("method") == method).iter_rows(named=True):
            index, value = tasks.index(record["task"]), record["value"]
            centre = index + (number - 1.5) * 0.2
            axis.bar(centre, value, 0.19, color=colour, label=label if index == 0 else None)
            bounds = [[max(0.0, value - record["low"])], [max(0.0, record["high"] - value)]]
            axis.errorbar(centre, value, bounds, fmt="none", ecolor="black", elinewidth=0.8)
            if record["chance"] is not None:
                axis.hlines(
                    record["chance"], index - 0.45, index + 0.45, color="black", linestyle=":", linewidth=1
                )
            if method == "greedy":
                removed = f"−{record['heads_removed']} heads\n−{record['ffns_removed']} FFNs"
                names[record["task"]] = f"{record['task']}\n{removed}"
    axis.set(xticks=range(len(tasks)), xticklabels=names.values())
    axis.set(ylabel="accuracy", ylim=(0, 1.25), yticks=[0, 0.5, 1])
    axis.legend(ncols=2, loc="upper center", frameon=False, fontsize=8)


def draw(folder: Path, task: str) -> Figure:
    """Return the figure of a run folder; raises InputError where it holds no readable tables."""
    results = read_table(folder / "results.parquet", "results")
    shots = results.filter(pl.col("experiment") == "ablate")["shots"].max()
    assert isinstance(shots, int), "a run without ablations has no such figure"
    measured = accuracies(results, shots)
    mask = measured.filter((pl.col("task") == task) & (pl.col("method") == "greedy"))["mask"]
    removed = read_mask(folder / "masks" / f"{mask[0]}.json").mask.heads
    drops = head_drops(results, task, shots)
    figure, axes = new_figure(9.0, 2.9, columns=2)
    draw_heads(axes[0, 0], drops, removed)
    kept = f"framed: the {drops.size - len(removed)} heads that the greedy mask keeps"
    axes[0, 0].set_title(f"{task}, {shots} demonstrations: each head removed alone;\n{kept}", fontsize=9)
    draw_masks(axes[0, 1], measured)
    axes[0, 1].set_title(f"{shots} demonstrations: accuracy under masks of equal size", fontsize=9)
    return figure


def main(
    folder: Annotated[Path, typer.Argument(help="Run folder of a finished `lowmem-icl run`.")],
    figure: Annotated[Path, typer.Argument(help="SVG file to write.")],
    task: Annotated[str, typer.Option(help="Task whose heads are shown.")] = "recall",
) -> None:
    """Draw the README's figure from a run folder."""
    try:
        # Without a date and with a fixed salt, the same numbers give the same file.
        with matplotlib.rc_context(STYLE), atomic_path(figure) as temporary:
            draw(folder, task).savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
    except LowmemIclError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
