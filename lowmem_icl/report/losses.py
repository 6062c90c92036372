"""What greedy masks lose of the objective on the evaluation split, and whether that keeps the tolerance."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

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


def greedy_losses(masks: pl.DataFrame) -> dict[SearchMask, Loss]:
    """Return the losses of the masks of searches on their own tasks, from masks.parquet."""
    judged = masks.filter(
        (pl.col("procedure") == "greedy")
        & (pl.col("mask_task") == pl.col("task"))
        & pl.col("loss").is_not_null()
    )
    return {
        SearchMask(mask["task"], mask["shots"], mask["method"]): Loss(
            mask["loss"], mask["loss_low"], mask["loss_high"],
            AT_CHANCE if mask["at_chance"] else mask["verdict"],
        )
        for mask in judged.iter_rows(named=True)
    }  # fmt: skip


def searches_without_certificate(record: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Return the tasks and shot counts whose searches were tested and have no certified mask."""
    tested = record.get("certificates", [])
    return {(search["task"], search["shots"]) for search in tested if not search["certified_units"]}
