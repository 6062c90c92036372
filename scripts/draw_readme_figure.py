"""Draw the README's figure from a run's tables: what each head is worth, and what masks of equal size leave.

    python scripts/draw_readme_figure.py RUN_FOLDER docs/demo.svg [--task recall]

Left: the drop of the gold log-probability when one head is removed alone, at the largest number of
demonstrations; heads that the greedy mask of the task keeps are framed. Right: accuracy of every task, clean
and under the greedy mask, the gradient ranking's mask and a random mask of the same size.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lowmem_icl.errors import LowmemIclError
from lowmem_icl.masks.files import read_mask
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.files import encoded
from lowmem_icl.report.figures.layout import PAGE_WIDTH, key_above, new_figure, shots_text, tasks_of
from lowmem_icl.report.figures.maps import Grid, MapScale, unit_grid
from lowmem_icl.report.figures.masks import draw_masks, mask_key
from lowmem_icl.report.figures.rows import TaskRows
from lowmem_icl.report.figures.style import BLACK, SMALL, figure_style, text_colour
from lowmem_icl.report.numbers import clean_accuracy, greedy_accuracy, unit_drops
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tables.schema import read_table

METHODS = ("greedy", "gradient", "random")
CAPTION = "What each head is worth, and what masks of equal size leave"
HEIGHT = 2.0
"""In inches, without the key."""
ON_SCREEN = 1.35
"""How much larger than on paper the figure is shown."""


def head_drops(results: pl.DataFrame, task: str, shots: int) -> Grid:
    """Return the drop of the gold log-probability without each head, [L, H] in nats."""
    heads = unit_drops(results).filter(
        (pl.col("kind") == "head") & (pl.col("task") == task) & (pl.col("shots") == shots)
    )
    if heads.is_empty():
        raise typer.BadParameter(f"the run has no ablations of task {task}; give another --task")
    layers, n_heads = (int(heads[name].to_numpy().max()) + 1 for name in ("layer", "head"))
    return unit_grid(heads, (layers, n_heads))


def draw_heads(axis: Axes, drops: Grid, removed: frozenset[tuple[int, int]]) -> None:
    """Draw the drops [L, H] as a map, layer 0 at the bottom, heads that are not removed in frames."""
    image = MapScale(drops).draw(axis, drops)
    for (layer, head), drop in np.ndenumerate(drops):
        if abs(drop) >= 0.05:
            red, green, blue, _ = image.to_rgba(np.array([drop]))[0].tolist()
            text = f"{drop:.1f}".replace("-", "−")
            colour = text_colour((red, green, blue))
            axis.text(head, layer, text, ha="center", va="center", fontsize=SMALL, color=colour)
        if (layer, head) not in removed:
            axis.add_patch(
                Rectangle((head - 0.45, layer - 0.45), 0.9, 0.9, fill=False, color=BLACK, linewidth=1.5)
            )
    axis.set(xlabel="head", ylabel="layer", xticks=range(drops.shape[1]), yticks=range(drops.shape[0]))


def draw(folder: Path, task: str) -> Figure:
    """Return the figure of a run folder; raises InputError where it holds no readable tables.

    To be called, and its figure saved, in `figure_style`.
    """
    results = read_table(folder / "results.parquet", "results")
    shots = results.filter(pl.col("experiment") == "ablate")["shots"].max()
    assert isinstance(shots, int), "a run without ablations has no such figure"
    at_most = (pl.col("shots") == shots) & (pl.col("task") != AGGREGATE)
    masks = greedy_accuracy(results).filter(at_most & pl.col("method").is_in(METHODS))
    own = masks.filter((pl.col("task") == task) & (pl.col("method") == "greedy"))["mask"]
    removed = read_mask(folder / "masks" / f"{own[0]}.json").mask.heads
    drops = head_drops(results, task, shots)
    figure = new_figure(PAGE_WIDTH, HEIGHT)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    draw_heads(left, drops, removed)
    kept = f"framed: the {drops.size - len(removed)} heads that the greedy mask keeps"
    left.set_title(f"{task}, {shots_text(shots)}: nats lost without a head;\n{kept}")
    rows = TaskRows(tasks_of(masks), len(METHODS))
    rows.set_up(right, 2.5)
    draw_masks(rows, right, masks, clean_accuracy(results).filter(at_most), METHODS)
    names = []
    for name in rows.tasks:
        mask = masks.filter((pl.col("task") == name) & (pl.col("method") == "greedy")).row(0, named=True)
        names.append(f"{name}\n−{mask['heads_removed']} heads, −{mask['ffns_removed']} FFNs")
    right.set_yticks(range(len(names)), names)
    right.set_xlabel("accuracy")
    right.set_title(f"{shots_text(shots)}: accuracy under masks of equal size")
    key_above(figure, mask_key(METHODS))
    return figure


def main(
    folder: Annotated[Path, typer.Argument(help="Run folder of a finished `lowmem-icl run`.")],
    figure: Annotated[Path, typer.Argument(help="SVG file to write.")],
    task: Annotated[str, typer.Option(help="Task whose heads are shown.")] = "recall",
) -> None:
    """Draw the README's figure from a run folder."""
    try:
        with figure_style():
            drawn = draw(folder, task)
            text = encoded(drawn, "svg", CAPTION).decode()
    except LowmemIclError as error:
        raise typer.BadParameter(str(error)) from error
    for name, inches in zip(("width", "height"), drawn.get_size_inches(), strict=True):
        text = text.replace(f'{name}="{72 * inches:g}pt"', f'{name}="{72 * inches * ON_SCREEN:g}pt"', 1)
    write_text_atomic(figure, text)


if __name__ == "__main__":
    typer.run(main)
