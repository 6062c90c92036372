"""The page's section on the gradient scores of heads."""

import polars as pl

from lowmem_icl.report.figures.on_page import head_maps, page_figure
from lowmem_icl.report.section import Record, Section

TEXT = (
    "The paper's gradient score of every head: to first order, how much the loss of the gold continuation "
    "would change, summed in absolute value over tokens."
)


def importance_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return maps of the gradient scores; None where there are none."""
    importance = results.filter(pl.col("experiment") == "importance")
    if importance.is_empty():
        return None
    shape = (record["model"]["layers"], record["model"]["heads"])
    return Section(
        "Importance",
        TEXT,
        page_figure(
            "importance", "Each panel has its own scale; layer 0 is at the bottom.",
            head_maps, importance, "gradient", shape, "gradient importance",
        ),
    )  # fmt: skip
