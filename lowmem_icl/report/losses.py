"""What greedy masks lose of the objective on the evaluation split, and whether that keeps the tolerance."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from lowmem_icl.statistics.certificate import verdict
from lowmem_icl.tables.guessing import clean_records, settings_at_chance

AT_CHANCE = "at chance"


class SearchMask(NamedTuple):
    """Which mask of which search: a task, a shot count and the method that made the mask."""

    task: str
    shots: int
    method: str


class Loss(NamedTuple):
    """A paired loss with the bounds of its 95 % interval, None where there is none, and its verdict.

    AT_CHANCE stands in a verdict's place where the clean model is no better than guessing.
    """

    value: float
    low: float | None
    high: float | None
    verdict: str


def greedy_losses(results: pl.DataFrame, record: Mapping[str, Any]) -> dict[SearchMask, Loss]:
    """Return the losses of the masks of searches on their own tasks; record: the run's run.json."""
    options = record["options"]
    at_chance = settings_at_chance(clean_records(results))
    drops = results.filter(
        (pl.col("experiment") == "prune")
        & (pl.col("procedure") == "greedy")
        & (pl.col("mask_task") == pl.col("task"))
        & (pl.col("metric") == f"{options['objective']}_drop")
    )
    return {
        SearchMask(drop["task"], drop["shots"], drop["method"]): Loss(
            drop["value"], drop["low"], drop["high"],
            AT_CHANCE if (drop["task"], drop["shots"]) in at_chance
            else verdict(drop["low"], drop["high"], options["tolerance"]),
        )
        for drop in drops.iter_rows(named=True)
    }  # fmt: skip


def searches_without_certificate(record: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Return the tasks and shot counts whose searches were tested and have no certified mask."""
    tested = record.get("certificates", [])
    return {(search["task"], search["shots"]) for search in tested if not search["certified_units"]}
