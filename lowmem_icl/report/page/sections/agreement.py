"""The page's section on how far rankings of heads agree between tasks and shot counts, and could agree."""

import polars as pl

from lowmem_icl.protocols import AGGREGATE, OUT_OF_DOMAIN_TASKS
from lowmem_icl.report.page.plots.matrices import matrix_plot
from lowmem_icl.report.page.section import Section, Table, number_text
from lowmem_icl.report.run_tables import RunTables

COLUMNS = (
    "method", "shots", "against", "pairs", "Spearman, mean", "variance", "ceiling", "Kendall",
    "top 30 % in common", "Spearman of index vectors",
)  # fmt: skip
COMMON_PERCENT = 30
CAPTION = (
    "Gradient scores at the chosen shot count; tasks whose rankings agree stand side by side. 1: the same "
    "order of heads; 0: unrelated. Ceiling: the most that rankings as noisy as these "
    "could agree, mean over pairs."
)
TEXT = "Spearman's rank correlation of head scores between tasks, and between shot counts of a task."
CEILING_NOTE = (
    " Ceiling: √(a·b) of the rankings' split-half reliabilities a and b, mean over pairs; two tasks' "
    "rankings from this many documents could not agree better even if their heads did the same. A task at "
    "two shot counts is measured on the same documents, whose noise both rankings share, so it may exceed "
    "the ceiling."
)
ORDER_NOTE = (
    " The last column is what the paper's code computed in place of Spearman: it correlates lists of head "
    "indices sorted by importance, so it asks whether the same index stands at the same rank of both lists, "
    "not whether heads rank alike; for exchangeable heads it is near 0 even where Spearman is 0.99."
)
PAIR = ("task", "shots", "method", "other_task", "other_shots", "other_method")


def agreement_section(run: RunTables) -> Section | None:
    """Return the agreement of rankings; None where none were compared."""
    overlap = run.results.filter(pl.col("experiment") == "overlap")
    if overlap.is_empty():
        return None
    return Section(
        "agreement",
        "Agreement between tasks",
        agreement_note(overlap),
        [matrix_plot("agreement", len(run.tasks), CAPTION, ("agreement-heads",))],
        Table(COLUMNS, agreement_rows(overlap)),
    )


def agreement_note(overlap: pl.DataFrame) -> str:
    """Return the sentences above the table."""
    metrics = set(overlap["metric"])
    ceiling = CEILING_NOTE if "split_half" in metrics else ""
    return TEXT + ceiling + (ORDER_NOTE if "spearman_of_order" in metrics else "")


def agreement_rows(overlap: pl.DataFrame) -> list[list[str]]:
    """Return formatted rows of COLUMNS: means over pairs of rankings by the same method.

    The pairs are tasks against other tasks, and tasks against themselves at other shot counts. Tasks that are
    out of domain have no part in these means.
    """
    measures = ("ceiling", "kendall", "top_overlap", "spearman_of_order")
    means = (
        compared_pairs(overlap)
        .group_by("method", "shots", "other_shots")
        .agg(
            pl.len().alias("pairs"),
            pl.col("spearman").mean(),
            pl.col("spearman").var().alias("variance"),
            pl.col(measures).mean(),
        )
        .sort("method", "shots", "other_shots")
    )
    return [
        [
            row["method"],
            str(row["shots"]),
            "other tasks" if row["shots"] == row["other_shots"] else f"itself at {row['other_shots']} shots",
            str(row["pairs"]),
            *(number_text(row[name]) for name in ("spearman", "variance", *measures)),
        ]
        for row in means.iter_rows(named=True)
    ]


def compared_pairs(overlap: pl.DataFrame) -> pl.DataFrame:
    """Return measures and ceiling of each pair of rankings by one method, of tasks in domain."""
    left_out = (AGGREGATE, *OUT_OF_DOMAIN_TASKS)
    records = overlap.filter(
        (pl.col("method") == pl.col("other_method"))
        & ~pl.col("task").is_in(left_out)
        & ~pl.col("other_task").is_in(left_out)
        & (pl.col("percent").is_null() | (pl.col("percent") == COMMON_PERCENT))
    )
    pairs = _measure(records, "spearman")
    for name in ("kendall", "top_overlap", "spearman_of_order"):
        pairs = pairs.join(_measure(records, name), on=PAIR, how="left")
    reliability = overlap.filter(pl.col("metric") == "split_half").select(
        *PAIR[:3], pl.col("value").clip(lower_bound=0).alias("reliability")
    )
    for side in (PAIR[:3], PAIR[3:]):
        named = dict(zip((*PAIR[:3], "reliability"), (*side, f"{side[0]}_reliability"), strict=True))
        pairs = pairs.join(reliability.rename(named), on=side, how="left")
    return pairs.with_columns(ceiling=(pl.col("task_reliability") * pl.col("other_task_reliability")).sqrt())


def _measure(records: pl.DataFrame, name: str) -> pl.DataFrame:
    return records.filter(pl.col("metric") == name).select(*PAIR, pl.col("value").alias(name))
