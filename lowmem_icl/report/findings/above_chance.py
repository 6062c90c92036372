"""What findings may be about: settings where the clean model does better than guessing."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import polars as pl

from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.guessing import clean_records, settings_at_chance
from lowmem_icl.tables.schema import ACCURACIES

Setting = tuple[str, int]


@dataclass(frozen=True)
class Settings:
    """The tasks at the shot counts of a run, without means over tasks, and which are at chance, means too.

    `known`: where the clean accuracy, or a mask file, says whether it is at chance; elsewhere nobody knows.
    `credible`: where demonstrations credibly raise the clean accuracy: its interval lies above that without.
    """

    every: tuple[Setting, ...]
    at_chance: frozenset[Setting]
    known: frozenset[Setting]
    credible: frozenset[Setting]

    @property
    def above(self) -> tuple[Setting, ...]:
        """Return the settings that findings may be about."""
        return tuple(setting for setting in self.every if setting not in self.at_chance)


def settings_of(results: pl.DataFrame, masks: pl.DataFrame) -> Settings:
    """Return the settings of a run: by its clean accuracies and, where there are none, by what mask files
    say.
    """
    tasks = pl.col("task").is_not_null() & pl.col("shots").is_not_null() & (pl.col("task") != AGGREGATE)
    every = results.filter(tasks).select("task", "shots").unique(maintain_order=True).rows()
    clean = clean_records(results)
    judged = clean.filter(pl.col("metric").is_in(ACCURACIES)).select("task", "shots").rows()
    told = masks.filter(pl.col("at_chance").is_not_null()).select("task", "shots", "at_chance").rows()
    return Settings(
        tuple(every),
        settings_at_chance(clean).union((task, shots) for task, shots, at_chance in told if at_chance),
        frozenset(judged).union((task, shots) for task, shots, _ in told),
        _taught(clean),
    )


def _taught(clean: pl.DataFrame) -> frozenset[Setting]:
    accuracy = clean.filter(pl.col("metric").is_in(ACCURACIES))
    without = {row["task"]: row["high"] for row in accuracy.iter_rows(named=True) if row["shots"] == 0}
    return frozenset(
        (row["task"], row["shots"])
        for row in accuracy.iter_rows(named=True)
        if row["shots"] and None not in (row["low"], high := without.get(row["task"])) and row["low"] > high
    )


def mean_above_chance(
    records: pl.DataFrame, at_chance: AbstractSet[Setting]
) -> tuple[pl.DataFrame, list[str]]:
    """Return the records of the mean over those tasks that are not at chance, and which these are.

    records: of results.parquet, at one shot count, with those of the mean over all tasks. Of a single task
    they are its own; tasks out of domain count only where there is no other.
    """
    own = records.filter(pl.col("task") != AGGREGATE)
    left = [
        task
        for task, shots in own.select("task", "shots").unique(maintain_order=True).rows()
        if (task, shots) not in at_chance
    ]
    counted = [task for task in left if in_domain(task)] or left
    members = own.filter(pl.col("task").is_in(counted))
    return (over_tasks(members) if len(counted) > 1 else members), counted
