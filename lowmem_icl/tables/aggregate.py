"""Means over tasks: the one place where records of the task `aggregate` are made of the tasks' own."""

import numpy as np
import polars as pl

from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.statistics.intervals import Intervals, mean_of_intervals
from lowmem_icl.tables.schema import RESULTS

# What may differ between the tasks that a mean is of.
MEASURED = ("value", "stderr", "low", "high", "chance", "documents")
# What the mean keeps where all tasks agree, and else leaves null.
SHARED = ("split", "mask", "mask_task")
KEYS = tuple(name for name in RESULTS if name not in ("task", "exact", *MEASURED, *SHARED))


def over_tasks(results: pl.DataFrame) -> pl.DataFrame:
    """Return the means over tasks of results, one record per number that all tasks have.

    Tasks that are out of domain are left out; where fewer than two are left there is no mean. Numbers belong
    together that agree in all else: what a task's own ranking, or that of a task chosen for it, removes is
    one thing, whatever it is called. A task's own metric (em for ReCoRD) counts as its accuracy. Standard
    error and bounds are those of a mean of independent tasks (see `mean_of_intervals`); documents are added
    up; it is exact where all are.
    """
    tasks = [
        task for task in results["task"].unique(maintain_order=True) if task is not None and in_domain(task)
    ]
    if len(tasks) < 2:
        return results.clear()
    own = (pl.col("mask_task") == pl.col("task")) | (pl.col("procedure") == "transfer")
    unlike = pl.col("other_task").eq(pl.col("task")) | pl.col("procedure").eq("transfer")
    members = (
        results.filter(pl.col("task").is_in(tasks))
        .with_columns(
            metric=pl.col("metric").replace("em", "acc"),
            other_task=pl.when(unlike.fill_null(value=False)).then(None).otherwise(pl.col("other_task")),
            named=pl.when(own.fill_null(value=False)).then(None).otherwise(pl.col("mask")),
        )
        # Where there are few units, neighbouring levels remove the same and count once.
        .unique(["task", "named", *KEYS], keep="last", maintain_order=True)
    )
    groups = (
        members.group_by("named", *KEYS, maintain_order=True)
        .agg(
            *MEASURED, *(_if_agreed(name) for name in SHARED), pl.col("exact").all(), pl.len().alias("tasks")
        )
        .filter(pl.col("tasks") == len(tasks))
    )
    return _means(groups, len(tasks)).select(pl.col(name).cast(dtype) for name, dtype in RESULTS.items())


def _if_agreed(name: str) -> pl.Expr:
    return pl.when(pl.col(name).n_unique() == 1).then(pl.col(name).first()).otherwise(None).alias(name)


def _means(groups: pl.DataFrame, n_tasks: int) -> pl.DataFrame:
    """Return the groups with lists of what was measured, a value per task, turned into their means."""
    if groups.is_empty():
        return groups.with_columns(
            pl.lit(AGGREGATE).alias("task"), *(pl.lit(None).alias(name) for name in MEASURED)
        )

    def task_values(name: str) -> np.ndarray:
        return np.array(groups[name].to_list(), dtype=np.float64).reshape(-1, n_tasks)

    def known(name: str) -> pl.Series:
        return groups.select(pl.col(name).list.eval(pl.element().is_not_null()).list.all())[name]

    value = task_values("value").mean(1)
    _, stderr, low, high = mean_of_intervals(
        Intervals(*(task_values(name) for name in ("value", "stderr", "low", "high")))
    )
    with_chance = known("chance")
    return groups.with_columns(
        pl.lit(AGGREGATE).alias("task"),
        pl.Series("value", value),
        *(
            pl.Series(name, column).fill_nan(None)
            for name, column in (("stderr", stderr), ("low", low), ("high", high))
        ),
        pl.when(with_chance)
        .then(pl.Series("chance", task_values("chance").mean(1)))
        .otherwise(None)
        .alias("chance"),
        pl.col("documents").list.sum(),
    )
