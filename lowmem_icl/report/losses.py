"""What greedy masks lose of the objective on the evaluation split, and whether that keeps the tolerance."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from lowmem_icl.statistics.certificate import verdict


class SearchMask(NamedTuple):
    """Which mask of which search: a task, a shot count and the method that made the mask."""

    task: str
    shots: int
    method: str


class Loss(NamedTuple):
    """A paired loss with the bounds of its 95 % interval, None where there is none, and its verdict."""

    value: float
    low: float | None
    high: float | None
    verdict: str


def greedy_losses(results: pl.DataFrame, record: Mapping[str, Any]) -> dict[SearchMask, Loss]:
    """Return the losses of the masks of searches on their own tasks; record: the run's run.json."""
    options = record["options"]
    drops = results.filter(
        (pl.col("experiment") == "prune")
        & (pl.col("procedure") == "greedy")
        & (pl.col("mask_task") == pl.col("task"))
        & (pl.col("metric") == f"{options['objective']}_drop")
    )
    return {
        SearchMask(drop["task"], drop["shots"], drop["method"]): Loss(
            drop["value"], drop["low"], drop["high"], verdict(drop["low"], drop["high"], options["tolerance"])
        )
        for drop in drops.iter_rows(named=True)
    }


def searches_without_certificate(record: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Return the tasks and shot counts whose searches were tested and have no certified mask."""
    tested = record.get("certificates", [])
    return {(search["task"], search["shots"]) for search in tested if not search["certified_units"]}
