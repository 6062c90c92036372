"""What the page says about rankings: how far they agree, how far they could, and which heads work in context."""

import polars as pl

from lowmem_icl.report.numbers import unit_name

AGREEMENT_COLUMNS = (
    "method", "shots", "against", "pairs", "Spearman, mean", "variance", "ceiling", "Kendall",
    "top 30 % in common", "of index vectors",
)  # fmt: skip
IN_CONTEXT_COLUMNS = ("unit", "shots", "nats more than without demonstrations", "95 %")
COMMON_PERCENT = 30
TOP_IN_CONTEXT = 5

ORDER_NOTE = (
    " The last column is what the paper's code computed in place of Spearman: it correlates lists of head numbers sorted by "
    "importance, so it asks whether the same number stands at the same place of both lists, not whether heads rank alike; for "
    "heads that could change numbers it is near 0 even where Spearman is 0.99."
)
IN_CONTEXT_NOTE = (
    "A unit's drop with demonstrations minus its drop without, on the same documents: red heads matter more once there is "
    "something to learn from (in-context heads), those near 0 serve the language in general, with or without demonstrations."
)


def agreement_note(results: pl.DataFrame) -> str:
    """Return the sentences above the table of agreement."""
    note = "Spearman's rank correlation of head scores between tasks, and between shot counts of a task."
    if len(results.filter(pl.col("metric") == "split_half")):
        note += (
            " Ceiling: √(a·b) of the rankings' split-half reliabilities a and b, mean over pairs; two tasks' rankings from so "
            "many documents could not agree further if their heads did the same. A task at two shot counts is measured on "
            "the same documents and shares their noise, so it may agree beyond it."
        )
    return note + (ORDER_NOTE if len(results.filter(pl.col("metric") == "spearman_of_order")) else "")


def agreement_table(results: pl.DataFrame) -> list[list[str]]:
    """Return formatted rows of AGREEMENT_COLUMNS: tasks against tasks, and tasks against themselves at other shot counts."""
    pairs = ["task", "shots", "method", "other_task", "other_shots", "other_method"]
    of_pairs = results.filter(
        (pl.col("experiment") == "overlap")
        & (pl.col("method") == pl.col("other_method"))
        & (pl.col("task") != "aggregate")
        & (pl.col("other_task") != "aggregate")
    )

    def metric(name: str) -> pl.DataFrame:
        chosen = of_pairs.filter(
            (pl.col("metric") == name) & (pl.col("k").is_null() | (pl.col("k") == COMMON_PERCENT))
        )
        return chosen.select(*pairs, pl.col("value").alias(name))

    reliability = results.filter(pl.col("metric") == "split_half").select(
        "task", "shots", "method", pl.col("value").clip(lower_bound=0)
    )
    table = metric("spearman")
    for name in ("kendall", "top_overlap", "spearman_of_order"):
        table = table.join(metric(name), on=pairs, how="left")
    for prefix in ("", "other_"):
        named = reliability.rename(
            {name: prefix + name for name in ("task", "shots", "method")} | {"value": f"{prefix}reliability"}
        )
        table = table.join(named, on=[f"{prefix}{name}" for name in ("task", "shots", "method")], how="left")
    grouped = (
        table.with_columns(ceiling=(pl.col("reliability") * pl.col("other_reliability")).sqrt())
        .group_by("method", "shots", "other_shots")
        .agg(
            pl.len().alias("pairs"),
            pl.col("spearman").mean(),
            pl.col("spearman").var().alias("variance"),
            pl.col("ceiling", "kendall", "top_overlap", "spearman_of_order").mean(),
        )
        .sort("method", "shots", "other_shots")
    )
    return [
        [
            row["method"],
            str(row["shots"]),
            "other tasks" if row["shots"] == row["other_shots"] else f"itself at {row['other_shots']} shots",
            str(row["pairs"]),
            *(
                _number(row[name])
                for name in (
                    "spearman", "variance", "ceiling", "kendall", "top_overlap", "spearman_of_order"
                )
            ),
        ]
        for row in grouped.iter_rows(named=True)
    ]  # fmt: skip


def in_context_table(results: pl.DataFrame) -> list[list[str]]:
    """Return formatted rows of IN_CONTEXT_COLUMNS: the units of the largest effects, mean over tasks where there are several."""
    effects = results.filter(pl.col("metric") == "icl_effect")
    over_tasks = effects.filter(pl.col("task") == "aggregate")
    effects = over_tasks if len(over_tasks) else effects
    if effects["task"].n_unique() > 1:
        # Under screening tasks may have no unit in common: then there is no mean.
        return []
    top = (
        effects.sort(["shots", "value"], descending=[False, True])
        .group_by("shots", maintain_order=True)
        .head(TOP_IN_CONTEXT)
    )
    return [
        [
            unit_name(row["kind"], row["layer"], row["head"]),
            str(row["shots"]),
            _number(row["value"]),
            f"{_number(row['low'])} to {_number(row['high'])}",
        ]
        for row in top.iter_rows(named=True)
    ]


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"
