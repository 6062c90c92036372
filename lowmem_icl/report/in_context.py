"""The page's section on the in-context effect: how much more units matter once there are demonstrations."""

import polars as pl

from lowmem_icl.report.figures import head_maps, page_figure
from lowmem_icl.report.numbers import mean_over_tasks, unit_name
from lowmem_icl.report.section import Record, Section, interval_text, number_text

COLUMNS = ("unit", "shots", "nats more than without demonstrations", "95 %")
TOP_UNITS = 5
TEXT = (
    "A unit's drop with demonstrations minus its drop without, on the same documents. Red heads matter more "
    "once there is something to learn from (in-context heads); those near 0 serve the language in general, "
    "with or without demonstrations."
)


def in_context_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return maps and the largest in-context effects; None where there are none."""
    effects = results.filter(pl.col("metric") == "icl_effect")
    if effects.is_empty():
        return None
    shape = (record["model"]["layers"], record["model"]["heads"])
    return Section(
        "In-context effect",
        TEXT,
        page_figure(
            "in-context", "Each panel has its own scale and compares its shot count with none.",
            head_maps, effects, "icl_effect", shape, "in-context effect, nats",
        ),
        COLUMNS,
        in_context_rows(effects),
    )  # fmt: skip


def in_context_rows(effects: pl.DataFrame) -> list[list[str]]:
    """Return formatted rows of COLUMNS: the units with the largest effects per shot count, mean over tasks.

    Under screening tasks may have no unit in common: then there is no mean, and no row.
    """
    top = (
        mean_over_tasks(effects)
        .sort(["shots", "value"], descending=[False, True])
        .group_by("shots", maintain_order=True)
        .head(TOP_UNITS)
    )
    return [
        [
            unit_name(row["kind"], row["layer"], row["head"]),
            str(row["shots"]),
            number_text(row["value"]),
            interval_text(row["low"], row["high"]),
        ]
        for row in top.iter_rows(named=True)
    ]
