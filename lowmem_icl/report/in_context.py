"""The page's sections on differences of drops: by demonstrations, and by labels in these."""

import polars as pl

from lowmem_icl.report.figures.on_page import head_maps, page_figure
from lowmem_icl.report.numbers import mean_over_tasks, unit_name
from lowmem_icl.report.section import Record, Section, interval_text, number_text

COLUMNS = ("unit", "shots", "nats more than without demonstrations", "95 %")
LABEL_COLUMNS = ("unit", "shots", "nats more than with shuffled labels", "95 %")
TOP_UNITS = 5
TEXT = (
    "A unit's drop with demonstrations minus its drop without, on the same documents. Red heads matter more "
    "once there is something to learn from (in-context heads); those near 0 serve the language in general, "
    "with or without demonstrations."
)
LABEL_TEXT = (
    "A unit's drop with right labels in the demonstrations minus its drop with shuffled ones, on the same "
    "documents. Red heads matter more where labels are there to learn from; those near 0 serve what "
    "demonstrations give whatever their labels: format, topic, the options."
)
PICKED = (
    "The units of the table are picked by these very values, on the documents that measure them, so the "
    "largest are likely too large."
)


def in_context_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return maps and the largest in-context effects; None where there are none."""
    effects = results.filter(pl.col("metric") == "icl_effect")
    if effects.is_empty():
        return None
    shape = (record["model"]["layers"], record["model"]["heads"])
    return Section(
        "In-context effect",
        f"{TEXT} {PICKED}",
        page_figure(
            "in-context", "Each panel has its own scale and compares its shot count with none.",
            head_maps, effects, "icl_effect", shape, "in-context effect, nats",
        ),
        COLUMNS,
        difference_rows(effects),
    )  # fmt: skip


def label_drops_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return maps and the units whose drops are most about labels; None where that was not measured."""
    effects = results.filter((pl.col("experiment") == "ablate") & (pl.col("metric") == "label_effect"))
    if effects.is_empty():
        return None
    shape = (record["model"]["layers"], record["model"]["heads"])
    return Section(
        "What the labels give to each unit",
        f"{LABEL_TEXT} {PICKED}",
        page_figure(
            "label-drops", "Each panel has its own scale and compares right labels with shuffled ones.",
            head_maps, effects, "label_effect", shape, "label effect, nats",
        ),
        LABEL_COLUMNS,
        difference_rows(effects),
    )  # fmt: skip


def difference_rows(effects: pl.DataFrame) -> list[list[str]]:
    """Return formatted rows: the units with the largest effects per shot count, mean over tasks.

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
