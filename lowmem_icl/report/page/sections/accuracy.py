"""The page's section on the clean model's accuracy."""

import polars as pl

from lowmem_icl.report.numbers import accuracy
from lowmem_icl.report.page.plots.accuracy import accuracy_plot, shots_plot
from lowmem_icl.report.page.section import Section, Table, interval_text, number_text
from lowmem_icl.report.run_tables import RunTables

COLUMNS = ("task", "shots", "metric", "value", "95 %", "chance", "majority", "documents")
TEXT = (
    "Of the clean model, on the evaluation split. Where the interval holds chance or the best constant "
    "answer, the model shows nothing that could be lost: such settings have no part in findings. Documents "
    "that share a prompt or a passage count as one, so an interval can be wider than the number of documents "
    "suggests."
)


def accuracy_section(run: RunTables) -> Section | None:
    """Return every task's clean accuracy at every shot count; None where nothing was evaluated."""
    table = accuracy(run.results)
    if table.is_empty():
        return None
    at_chance = pl.Series(
        "at_chance", [setting in run.at_chance for setting in table.select("task", "shots").iter_rows()]
    )
    plots = [accuracy_plot(table.with_columns(at_chance)), shots_plot(table)]
    rows = [
        [
            row["task"], str(row["shots"]), row["metric"], number_text(row["value"]),
            interval_text(row["low"], row["high"]), number_text(row["chance"]),
            number_text(row["majority"]), str(row["documents"]),
        ]
        for row in table.iter_rows(named=True)
    ]  # fmt: skip
    return Section(
        "accuracy",
        "Accuracy",
        TEXT,
        [plot for plot in plots if plot is not None],
        Table(COLUMNS, rows),
    )
