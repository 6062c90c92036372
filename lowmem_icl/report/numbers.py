"""What a finished run says on the terminal, and how far an unfinished one is."""

from pathlib import Path
from typing import Any

import polars as pl

from lowmem_icl.session.folder import run_record
from lowmem_icl.tables.schema import read_table

TOP_UNITS = 5
CLAIMED_Q = 0.05
UNIT_KEYS = ["shots", "kind", "layer", "head"]


def accuracy(results: pl.DataFrame) -> pl.DataFrame:
    """Return the clean run's accuracy by task and shots, with chance and the accuracy of the best constant answer."""
    clean = results.filter((pl.col("experiment") == "evaluate") & (pl.col("mask") == "clean"))
    majority = clean.filter(pl.col("metric") == "majority").select(
        "task", "shots", pl.col("value").alias("majority")
    )
    columns = ("task", "shots", "metric", "value", "stderr", "low", "high", "chance", "documents")
    return (
        clean.filter(pl.col("metric").is_in(["acc", "em"]))
        .select(columns)
        .join(majority, on=["task", "shots"], how="left", maintain_order="left")
    )


def pruned(results: pl.DataFrame) -> pl.DataFrame:
    """Return, for each search, what its masks removed and the accuracy they leave; curves are left out."""
    return (
        results.filter((pl.col("experiment") == "prune") & pl.col("metric").is_in(["acc", "em"]))
        .filter(pl.col("k").is_null())
        .filter((pl.col("task") == "aggregate") | ~pl.col("mask").str.contains("-aggregate-", literal=True))
        .select("task", "shots", "method", "mask", "heads_removed", "ffns_removed", "value", "low", "high")
        .sort("task", "shots", "method")
    )


def top_units(results: pl.DataFrame, count: int = TOP_UNITS) -> pl.DataFrame:
    """Return the units whose removal alone costs most gold log-probability, mean over tasks, by shots.

    `q_value`: of the mean, Benjamini and Hochberg's over all units; null where it is not known.
    """
    drops = results.filter((pl.col("experiment") == "ablate") & (pl.col("metric") == "gold_logprob_drop"))
    of_mean = pl.lit(True) if drops["task"].n_unique() == 1 else pl.col("task") == "aggregate"
    claims = results.filter((pl.col("metric") == "q_value") & of_mean).select(
        *UNIT_KEYS, pl.col("value").alias("q_value")
    )
    return (
        drops.join(claims, on=UNIT_KEYS, how="left", nulls_equal=True)
        .group_by(UNIT_KEYS)
        .agg(pl.col("value").mean(), pl.col("q_value").first())
        .sort(["shots", "value", "layer", "head"], descending=[False, True, False, False])
        .group_by("shots", maintain_order=True)
        .head(count)
    )


def induction_heads(results: pl.DataFrame, count: int = TOP_UNITS) -> pl.DataFrame:
    """Return the heads with the highest prefix-matching scores."""
    return (
        results.filter((pl.col("experiment") == "induction") & (pl.col("metric") == "prefix_matching"))
        .select("layer", "head", "value", "stderr")
        .sort("value", "layer", "head", descending=[True, False, False])
        .head(count)
    )


def unit_name(kind: str, layer: int, head: int | None) -> str:
    """Return a unit's name as masks print it."""
    return f"L{layer}F" if kind == "ffn" else f"L{layer}H{head}"


def claim_mark(unit: dict[str, Any]) -> str:
    """Return a star for a unit of `top_units` whose drop can be claimed among all units."""
    return "*" if unit["q_value"] is not None and unit["q_value"] <= CLAIMED_Q else ""


def summary(folder: Path) -> dict[str, Any]:
    """Return the main numbers of a finished run as plain values."""
    record, results = run_record(folder), read_table(folder / "results.parquet", "results")
    return {
        "folder": str(folder),
        "model": record["model"]["id"],
        "weights": record["model"]["weights"],
        "accuracy": accuracy(results).to_dicts(),
        "pruned": pruned(results).to_dicts(),
        "top_units": top_units(results).to_dicts(),
        "induction_heads": induction_heads(results).to_dicts(),
        "warnings": record["warnings"],
        "seconds": round(sum(stage["seconds"] for stage in record["stages"].values()), 1),
    }


def status_of(folder: Path) -> dict[str, Any]:
    """Return a run's state, finished stages, parts and planned time left."""
    record = run_record(folder)
    stages = record.get("stages", {})
    planned = {stage["experiment"]: stage["seconds"] for stage in record["plan"]["stages"]}
    return {
        "folder": str(folder),
        "state": record["state"],
        "started": record["started"],
        "experiments": record["options"]["experiments"],
        "finished": {name: stage["seconds"] for name, stage in stages.items()},
        "parts": len(list((folder / "parts").glob("*.npz"))),
        "seconds_left_planned": round(sum(time for name, time in planned.items() if name not in stages), 1),
        "best_units": top_units(read_table(folder / "results.parquet", "results")).to_dicts()
        if (folder / "results.parquet").is_file()
        else [],
        "warnings": record["warnings"],
    }
