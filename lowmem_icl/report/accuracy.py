"""The page's section on the clean model's accuracy."""

import polars as pl
from matplotlib.figure import Figure

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.on_page import COLOURS, error_bars, legend_label, new_figure, page_figure
from lowmem_icl.report.numbers import accuracy, clean_accuracy
from lowmem_icl.report.section import Record, Section, interval_text, number_text

COLUMNS = ("task", "shots", "metric", "value", "95 %", "chance", "majority", "documents")
MARKERS = "os^Dv<>ph*X8d+"


def accuracy_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return every task's clean accuracy at every shot count; None where nothing was evaluated."""
    table = accuracy(results)
    if table.is_empty():
        return None
    return Section(
        "Accuracy",
        figures=page_figure(
            "accuracy", "Clean accuracy of every task; dotted: chance.", accuracy_by_shots, results
        ),
        columns=COLUMNS,
        rows=[
            [
                row["task"], str(row["shots"]), row["metric"], number_text(row["value"]),
                interval_text(row["low"], row["high"]), number_text(row["chance"]),
                number_text(row["majority"]), str(row["documents"]),
            ]
            for row in table.iter_rows(named=True)
        ],
    )  # fmt: skip


def accuracy_by_shots(results: pl.DataFrame) -> Figure | None:
    """Draw each task's clean accuracy against the number of demonstrations, chance dotted."""
    records = clean_accuracy(results).filter(pl.col("task") != AGGREGATE)
    if records.is_empty():
        return None
    figure, axes = new_figure(6.5, 3.6)
    axis = axes[0, 0]
    shots = sorted(set(records["shots"]))
    for number, ((task,), task_records) in enumerate(records.group_by("task", maintain_order=True)):
        task_records = task_records.sort("shots")
        x = [shots.index(n_shots) for n_shots in task_records["shots"]]
        colour = COLOURS[number % len(COLOURS)]
        axis.errorbar(
            x, task_records["value"], yerr=error_bars(task_records), color=colour, capsize=2,
            marker=MARKERS[number % len(MARKERS)], label=legend_label(str(task)),
        )  # fmt: skip
        if task_records["chance"].null_count() == 0:
            axis.plot(x, task_records["chance"], ":", color=colour, linewidth=0.8)
    axis.set(xlabel="demonstrations", ylabel="accuracy", ylim=(0, 1.03))
    axis.set_xticks(range(len(shots)), [str(n_shots) for n_shots in shots])
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure
