"""The page's section on the masks that `evaluate --mask` was given: accuracies, paired with clean ones."""

import polars as pl

from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.report.numbers import with_right_labels
from lowmem_icl.report.page.section import Section, Table, interval_text, number_text
from lowmem_icl.report.run_tables import RunTables
from lowmem_icl.tables.schema import ACCURACIES

COLUMNS = (
    "task",
    "shots",
    "mask",
    "removed",
    "accuracy",
    "95 %",
    "chance",
    "clean",
    "drop",
    "95 %",
    "documents",
)
TEXT = "The evaluation documents under each mask; drop: clean minus masked, paired by document."


def given_masks_section(run: RunTables) -> Section | None:
    """Return accuracies under the masks that were given; None in runs without."""
    records = run.results.filter(
        (pl.col("experiment") == "evaluate") & with_right_labels() & pl.col("mask").is_not_null()
    )
    accuracies = records.filter(pl.col("metric").is_in(ACCURACIES))
    under = accuracies.filter(pl.col("mask") != CLEAN)
    if under.is_empty():
        return None
    keys = ["task", "shots", "mask"]
    clean = accuracies.filter(pl.col("mask") == CLEAN).select("task", "shots", pl.col("value").alias("clean"))
    drops = records.filter(pl.col("metric") == "acc_drop").select(
        *keys,
        pl.col("value").alias("drop"),
        pl.col("low").alias("drop_low"),
        pl.col("high").alias("drop_high"),
    )
    both = under.join(clean, on=["task", "shots"], how="left", maintain_order="left").join(
        drops, on=keys, how="left", maintain_order="left"
    )
    rows = [
        [
            row["task"], str(row["shots"]), row["mask"], f"{row['heads_removed']}H {row['ffns_removed']}F",
            number_text(row["value"]), interval_text(row["low"], row["high"]), number_text(row["chance"]),
            number_text(row["clean"]), number_text(row["drop"]),
            interval_text(row["drop_low"], row["drop_high"]), str(row["documents"]),
        ]
        for row in both.iter_rows(named=True)
    ]  # fmt: skip
    return Section("given-masks", "Masks given", TEXT, table=Table(COLUMNS, rows))
