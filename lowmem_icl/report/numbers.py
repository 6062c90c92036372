"""The main numbers of a run, for the page and the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.tables.schema import ACCURACIES

TOP_UNITS = 5
INDUCTION_SCORE = 0.3
"""From this prefix-matching score on a head counts as an induction head."""
SIGNIFICANT_Q = 0.05
STAR = (
    "*: more documents are hurt than helped without the unit, or the reverse, at a false discovery rate of "
    f"{100 * SIGNIFICANT_Q:.0f} % (exact sign test)"
)
"""What a star claims; it stands wherever stars do."""
PICKED = "single values are picked and measured on the same documents, so likely too large"
CLAIM = ("documents_hurt", "documents_helped", "q_value")
UNIT_KEYS = ("shots", "kind", "layer", "head")


def mean_over_tasks(records: pl.DataFrame) -> pl.DataFrame:
    """Return the records of the mean over tasks, those of task `aggregate`.

    Where there are none, those of the only task in domain, or of the only task; and else no records: a mean
    that is not in the table cannot be shown.
    """
    means = records.filter(pl.col("task") == AGGREGATE)
    if len(means):
        return means
    tasks = records["task"].drop_nulls().unique().to_list()
    counted = [task for task in tasks if in_domain(task)] or tasks
    return records.filter(pl.col("task") == counted[0]) if len(counted) == 1 else records.clear()


def subject(records: pl.DataFrame) -> str:
    """Return what records from `mean_over_tasks` are about: "mean over tasks", or a task's name."""
    named = [task for task in records["task"].unique() if task != AGGREGATE]
    return str(named[0]) if named else "mean over tasks"


def clean_accuracy(results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of the clean run's accuracy on the evaluation split, with right labels."""
    return clean_evaluation(results).filter(with_right_labels() & pl.col("metric").is_in(ACCURACIES))


def clean_evaluation(results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of the clean run on the evaluation split, with whatever labels."""
    return results.filter((pl.col("experiment") == "evaluate") & (pl.col("mask") == "clean"))


def with_right_labels() -> pl.Expr:
    """Select records whose demonstrations show their own answers, and those without demonstrations."""
    return pl.col("labels").fill_null("right") == "right"


def accuracy(results: pl.DataFrame) -> pl.DataFrame:
    """Return clean accuracy by task and shots, with chance and the accuracy of the best constant answer."""
    majority = (
        clean_evaluation(results)
        .filter(pl.col("metric") == "majority")
        .select("task", "shots", pl.col("value").alias("majority"))
    )
    columns = ("task", "shots", "metric", "value", "stderr", "low", "high", "chance", "documents")
    return (
        clean_accuracy(results)
        .select(columns)
        .join(majority, on=["task", "shots"], how="left", maintain_order="left")
    )


def greedy_accuracy(results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of accuracy under greedy masks and others of equal size, on their own tasks."""
    return results.filter(
        (pl.col("experiment") == "prune")
        & (pl.col("procedure") == "greedy")
        & (pl.col("mask_task") == pl.col("task"))
        & pl.col("metric").is_in(ACCURACIES)
    )


def pruned(results: pl.DataFrame) -> pl.DataFrame:
    """Return, for each greedy search, what its masks removed and the accuracy they leave."""
    return (
        greedy_accuracy(results)
        .select("task", "shots", "method", "mask", "heads_removed", "ffns_removed", "value", "low", "high")
        .sort("task", "shots", "method")
    )


def unit_drops(results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of gold log-probability lost with each unit alone, exact or estimated."""
    return results.filter((pl.col("experiment") == "ablate") & (pl.col("metric") == "gold_logprob_drop"))


def compared_drops(results: pl.DataFrame) -> pl.DataFrame:
    """Return attribution (`value`) and the exact drop (`exact`) of every task's units that have both."""
    keys = ["task", "shots", "kind", "layer", "head"]
    tasks = results.filter(pl.col("task") != AGGREGATE)
    estimates = tasks.filter(pl.col("metric") == "attribution").select(*keys, "value")
    exact = unit_drops(tasks).filter(pl.col("exact")).select(*keys, pl.col("value").alias("exact"))
    return estimates.join(exact, on=keys, nulls_equal=True)


def top_units(results: pl.DataFrame, n: int = TOP_UNITS) -> pl.DataFrame:
    """Return the n units per shot count that cost most when removed alone, mean over tasks.

    `value` is the drop of gold log-probability in nats, measured on the documents that the units are picked
    by. Null where unknown: `documents_hurt` and `documents_helped`, how many lose and gain without the unit,
    over all tasks; `q_value`, Benjamini and Hochberg's over all units, of their being as many.
    """
    keys = ["task", *UNIT_KEYS]
    units = mean_over_tasks(unit_drops(results))
    for name in CLAIM:
        column = results.filter(pl.col("metric") == name).select(*keys, pl.col("value").alias(name))
        units = units.join(column, on=keys, how="left", nulls_equal=True)
    return (
        units.select(*UNIT_KEYS, "value", *CLAIM)
        .sort(["shots", "value", "layer", "head"], descending=[False, True, False, False])
        .group_by("shots", maintain_order=True)
        .head(n)
    )


def held_out_tops(results: pl.DataFrame, n: int = TOP_UNITS) -> pl.DataFrame:
    """Return what the n units per shot count that cost most when removed alone cost on average, mean over
    tasks, on documents that did not pick them; no record where that is unknown.
    """
    tops = results.filter(
        (pl.col("metric") == "top_drop") & pl.col("kind").is_null() & (pl.col("count") == n)
    )
    return mean_over_tasks(tops).select("shots", "count", "value", "low", "high").sort("shots")


def held_out_text(units: Sequence[Mapping[str, Any]], tops: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean of the costliest units at a shot count, with what it is on documents that did not pick
    them, from the records of `top_units` and `held_out_tops`.
    """
    mean = f"mean {sum(unit['value'] for unit in units) / len(units):.2f}"
    for top in tops:
        if (top["shots"], top["count"]) == (units[0]["shots"], len(units)):
            bounds = "" if top["low"] is None else f" [{top['low']:.2f}, {top['high']:.2f}]"
            return f"{mean}, on documents that did not pick the units {top['value']:.2f}{bounds}"
    return mean


def induction_heads(results: pl.DataFrame, n: int = TOP_UNITS) -> pl.DataFrame:
    """Return the n heads with the highest prefix-matching scores."""
    return (
        results.filter((pl.col("experiment") == "induction") & (pl.col("metric") == "prefix_matching"))
        .select("layer", "head", "value", "stderr")
        .sort("value", "layer", "head", descending=[True, False, False])
        .head(n)
    )


def induction_head_count(results: pl.DataFrame) -> int:
    """Return how many heads reach the prefix-matching score of an induction head; 0 where none was scored."""
    scored = results.filter((pl.col("experiment") == "induction") & (pl.col("metric") == "prefix_matching"))
    return int((scored["value"] >= INDUCTION_SCORE).sum())


def unit_name(kind: str, layer: int, head: int | None) -> str:
    """Return a unit's name as masks print it."""
    return f"L{layer}F" if kind == "ffn" else f"L{layer}H{head}"


def significance_mark(unit: Mapping[str, Any]) -> str:
    """Return a star for a unit of `top_units` whose q-value is at most SIGNIFICANT_Q."""
    return "*" if unit["q_value"] is not None and unit["q_value"] <= SIGNIFICANT_Q else ""


def total_seconds(record: Mapping[str, Any]) -> float:
    """Return how long a run's stages took together."""
    return float(round(sum(stage["seconds"] for stage in record["stages"].values()), 1))
