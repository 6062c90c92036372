"""The page's section on greedy pruning: what the searches removed, compared with masks of equal size."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.report.figures.on_page import COLOURS, error_bars, new_figure, page_figure, task_order
from lowmem_icl.report.losses import Loss, SearchMask, greedy_losses, searches_without_certificate
from lowmem_icl.report.numbers import clean_accuracy, greedy_accuracy, pruned
from lowmem_icl.report.section import Record, Section, interval_text, number_text

COLUMNS = (
    "task", "shots", "method", "heads removed", "FFNs removed", "accuracy", "95 %", "loss", "95 %",
    "tolerance",
)  # fmt: skip
METHODS = ("greedy", "certified", "gradient", "random")
BAR_DISTANCE = 0.21


def greedy_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return what greedy masks removed and the accuracy they leave; None where nothing was searched."""
    table = pruned(results)
    if table.is_empty():
        return None
    options = record["options"]
    losses = greedy_losses(results, record)
    return Section(
        "Greedy pruning",
        f"Greedy layerwise masks that may lose {options['tolerance']:g} of {options['objective']} on the "
        "documents that they are searched on, compared with the lowest units by gradient and a random "
        "draw of equal size. Certified: the largest mask on a search's path that is shown, with 95 % "
        "confidence, to keep the tolerance, on training documents that the search did not see. All are "
        f"judged on the evaluation split; loss: of {options['objective']} there, paired with the clean "
        "model. The tolerance holds where the whole interval of the loss is within it, fails where none "
        "of it is."
        + replacement_note(record.get("greedy", []))
        + certificate_note(record),
        page_figure(
            "pruning", "Line: the clean model. Above: heads (H) and FFNs (F) removed.", pruning_bars, results
        ),
        COLUMNS,
        [
            [
                row["task"], str(row["shots"]), row["method"], str(row["heads_removed"]),
                str(row["ffns_removed"]), number_text(row["value"]), interval_text(row["low"], row["high"]),
                *_loss_cells(losses.get(SearchMask(row["task"], row["shots"], row["method"]))),
            ]
            for row in table.iter_rows(named=True)
        ],
    )  # fmt: skip


def _loss_cells(loss: Loss | None) -> tuple[str, str, str]:
    if loss is None:
        return "", "", ""
    return number_text(loss.value), interval_text(loss.low, loss.high), loss.verdict


def certificate_note(record: Record) -> str:
    """Return for which of the searches that were tested nothing is certified."""
    empty = [f"{task} at {shots}" for task, shots in sorted(searches_without_certificate(record))]
    return f" No mask is certified for {', '.join(empty)} shots." if empty else ""


def replacement_note(losses: Sequence[Mapping[str, Any]]) -> str:
    """Return for which searches the gradient ranking's mask of equal size was better and is returned instead.

    losses: what run.json says of the greedy searches and of the masks compared with them.
    """
    by_search = {(loss["task"], loss["shots"], loss["method"]): loss["check_loss"] for loss in losses}
    replaced = [
        f"{task} at {shots}"
        for (task, shots, method), lost in by_search.items()
        if method == "greedy" and by_search.get((task, shots, "gradient"), lost) < lost
    ]
    if not replaced:
        return ""
    return (
        " The gradient ranking's mask of equal size lost less on the checking half, and is returned "
        f"instead, for {', '.join(replaced)} shots."
    )


def pruning_bars(results: pl.DataFrame) -> Figure | None:
    """Draw accuracy under greedy masks and others of equal size, with a line for the clean model."""
    records = greedy_accuracy(results)
    if records.is_empty():
        return None
    clean = clean_accuracy(results)
    shots, tasks = sorted(set(records["shots"])), task_order(records["task"])
    figure, axes = new_figure(7, 2.3 * len(shots), len(shots), 1)
    for row, n_shots in enumerate(shots):
        axis = axes[row, 0]
        _draw_bars(axis, records.filter(pl.col("shots") == n_shots), tasks)
        for line in clean.filter(pl.col("shots") == n_shots).iter_rows(named=True):
            if line["task"] in tasks:
                x = tasks.index(line["task"])
                axis.hlines(line["value"], x - 0.42, x + 0.42, colors="black", linewidth=1)
        axis.set(ylim=(0, 1.13), ylabel="accuracy")
        axis.set_title(f"{n_shots} shots", fontsize=9)
        axis.set_xticks(range(len(tasks)), tasks, fontsize=8, rotation=30 if len(tasks) > 6 else 0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncols=4)
    return figure


def _draw_bars(axis: Axes, records: pl.DataFrame, tasks: Sequence[str]) -> None:
    """Draw a bar per task and method; above them, what the greedy mask removed."""
    for number, method in enumerate(METHODS):
        bars = records.filter(pl.col("method") == method)
        x = [tasks.index(task) + (number - (len(METHODS) - 1) / 2) * BAR_DISTANCE for task in bars["task"]]
        axis.bar(
            x, bars["value"], 0.19, yerr=error_bars(bars), capsize=2,
            color=COLOURS[number], label=method,
        )  # fmt: skip
    for mask in records.filter(pl.col("method") == METHODS[0]).iter_rows(named=True):
        text = f"{mask['heads_removed']}H {mask['ffns_removed']}F"
        axis.text(tasks.index(mask["task"]), 1.03, text, ha="center", fontsize=7)
