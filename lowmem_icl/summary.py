"""What a finished run says on the terminal, and how far an unfinished one is."""

import json
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from lowmem_icl.errors import InputError
from lowmem_icl.results import read_table

TOP_UNITS = 5
CLAIMED_Q = 0.05
UNIT_KEYS = ["shots", "kind", "layer", "head"]


def run_record(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder's run.json; raise InputError where there is none."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no run (run.json cannot be read); give a run folder") from error
    if not isinstance(record, dict) or record.get("format") != "lowmem-icl-run/1":
        raise InputError(f"{folder / 'run.json'}: expected a run of format lowmem-icl-run/1")
    return record


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


def show_summary(folder: Path, console: Console) -> None:
    """Print a run's main numbers: accuracies, greedy masks, top units, where the rest is."""
    record, results = run_record(folder), read_table(folder / "results.parquet", "results")
    _print_accuracy(results, record, console)
    rows = pruned(results).filter(pl.col("method") == "greedy")
    if len(rows):
        layers, heads = record["model"]["layers"], record["model"]["heads"]
        others = pruned(results).filter(pl.col("method") != "greedy")
        table = Table(title="greedy pruning: accuracy left, beside masks of equal size", title_justify="left")
        for column in ("task", "shots", "heads removed", "FFNs removed", "greedy", "gradient", "random"):
            table.add_column(column, justify="left" if column == "task" else "right")
        for row in rows.iter_rows(named=True):
            beside = {
                other["method"]: f"{other['value']:.3f}"
                for other in others.iter_rows(named=True)
                if (other["task"], other["shots"]) == (row["task"], row["shots"])
            }
            table.add_row(
                row["task"],
                str(row["shots"]),
                f"{row['heads_removed']}/{layers * heads}",
                f"{row['ffns_removed']}/{layers}",
                f"{row['value']:.3f}",
                beside.get("gradient", ""),
                beside.get("random", ""),
            )
        console.print(table)
    for (shots,), units in top_units(results).group_by("shots", maintain_order=True):
        named = ", ".join(
            f"{unit_name(unit['kind'], unit['layer'], unit['head'])} {unit['value']:.2f}{claim_mark(unit)}"
            for unit in units.iter_rows(named=True)
        )
        console.print(
            f"costliest units alone at {shots} shots (nats of gold log-probability; * where q ≤ {CLAIMED_Q}): {named}"
        )
    scored = ", ".join(
        f"{unit_name('head', row['layer'], row['head'])} {row['value']:.2f}"
        for row in induction_heads(results).iter_rows(named=True)
    )
    if scored:
        console.print(f"heads by prefix matching (1: all attention goes where it should): {scored}")
    seconds = sum(stage["seconds"] for stage in record["stages"].values())
    console.print(
        f"{seconds:.0f} s; tables, masks and report.html in {folder}", highlight=False, soft_wrap=True
    )


def _print_accuracy(results: pl.DataFrame, record: dict[str, Any], console: Console) -> None:
    rows = accuracy(results)
    if not len(rows):
        return
    shots = sorted(set(rows["shots"]))
    table = Table(
        title=f"{record['model']['id']} in {record['model']['weights']}: accuracy by demonstrations",
        title_justify="left",
    )
    for column in ("task", "chance", *(f"{count}-shot" for count in shots)):
        table.add_column(column, justify="left" if column == "task" else "right")
    for (task,), of_task in rows.group_by("task", maintain_order=True):
        at = {row["shots"]: row for row in of_task.iter_rows(named=True)}
        chance = of_task["chance"][0]
        table.add_row(
            str(task),
            "" if chance is None else f"{chance:.3f}",
            *(
                f"{at[count]['value']:.3f} ± {at[count]['stderr']:.3f}" if count in at else ""
                for count in shots
            ),
        )
    console.print(table)


def show_evaluation(folder: Path, console: Console) -> None:
    """Print accuracies clean and under every mask."""
    results = read_table(folder / "results.parquet", "results")
    rows = results.filter((pl.col("experiment") == "evaluate") & pl.col("metric").is_in(["acc", "em"]))
    masks = list(dict.fromkeys(rows["mask"]))
    table = Table("task", "shots", *masks)
    for (task, shots), members in rows.group_by("task", "shots", maintain_order=True):
        at = dict(zip(members["mask"], members["value"], strict=True))
        table.add_row(str(task), str(shots), *(f"{at[mask]:.3f}" if mask in at else "" for mask in masks))
    console.print(table)
    console.print(f"tables in {folder}", highlight=False, soft_wrap=True)


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


def show_status(state: dict[str, Any], console: Console) -> None:
    """Print what `status_of` returns."""
    for name in ("folder", "state", "started", "parts"):
        console.print(f"{name}: {state[name]}", highlight=False, soft_wrap=True)
    for name in state["experiments"]:
        done = state["finished"].get(name)
        console.print(f"  {name}: " + ("not finished" if done is None else f"finished in {done:.1f} s"))
    if state["state"] != "finished":
        console.print(f"left as planned: {state['seconds_left_planned']:.0f} s")
    for unit in state["best_units"]:
        console.print(
            f"  {unit['shots']} shots: {unit_name(unit['kind'], unit['layer'], unit['head'])} {unit['value']:.3f} nats"
        )
    for warning in state["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True)
