"""What a finished run says on the terminal, and how far an unfinished one is."""

from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from lowmem_icl.report.numbers import (
    CLAIMED_Q,
    accuracy,
    claim_mark,
    induction_heads,
    pruned,
    top_units,
    unit_name,
)
from lowmem_icl.session.folder import run_record
from lowmem_icl.tables.schema import read_table


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
