"""What commands print of a run in tables; names and paths are printed as they are, never as markup."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_icl.report.losses import AT_CHANCE, SearchMask, greedy_losses, searches_without_certificate
from lowmem_icl.report.numbers import (
    PICKED,
    STAR,
    accuracy,
    held_out_text,
    held_out_tops,
    induction_heads,
    pruned,
    significance_mark,
    top_units,
    total_seconds,
    unit_name,
)
from lowmem_icl.session.folder import run_record
from lowmem_icl.tables.schema import read_table

MEANING = "what each number means, and when there is none: docs/numbers.md"
COMPARED_METHODS = ("gradient", "random")
VERDICTS = {"cannot tell": "?", AT_CHANCE: "chance"}
"""Of whether a tolerance is kept, as the table of searches has room for."""


def show_summary(folder: Path, console: Console) -> None:
    """Print a run's main numbers: accuracies, greedy masks, top units, where the rest is."""
    record, results = run_record(folder), read_table(folder / "results.parquet", "results")
    _print_accuracy(results, record, console)
    _print_greedy(results, record, console)
    _print_costliest(results, console)
    scored = ", ".join(
        f"{unit_name('head', row['layer'], row['head'])} {row['value']:.2f}"
        for row in induction_heads(results).iter_rows(named=True)
    )
    if scored:
        console.print(f"heads by prefix matching (1: all attention goes where it should): {scored}")
    _print_line(console, MEANING)
    _print_line(console, f"{total_seconds(record):.0f} s; tables, masks and report.html in {folder}")


def _print_costliest(results: pl.DataFrame, console: Console) -> None:
    costliest, held_out = top_units(results), held_out_tops(results).to_dicts()
    for (shots,), members in costliest.group_by("shots", maintain_order=True):
        units = members.to_dicts()
        named = ", ".join(
            f"{unit_name(unit['kind'], unit['layer'], unit['head'])} "
            f"{unit['value']:.2f}{significance_mark(unit)}"
            for unit in units
        )
        console.print(
            f"costliest units alone at {shots} shots, nats of gold log-probability: {named}; "
            f"{held_out_text(units, held_out)}"
        )
    if len(costliest):
        console.print(f"{PICKED}; {STAR}")


def _print_accuracy(results: pl.DataFrame, record: Mapping[str, Any], console: Console) -> None:
    records = accuracy(results)
    if records.is_empty():
        return
    shots = sorted(set(records["shots"]))
    model = record["model"]
    table = _table(
        f"{model['id']} in {model['weights']}: accuracy by demonstrations, with 95 % intervals",
        ("task", "chance", *(f"{n_shots}-shot" for n_shots in shots)),
    )
    for (task,), task_records in records.group_by("task", maintain_order=True):
        by_shots = {row["shots"]: row for row in task_records.iter_rows(named=True)}
        chance = task_records["chance"][0]
        table.add_row(
            Text(str(task)),
            "" if chance is None else f"{chance:.3f}",
            *(_accuracy_text(by_shots.get(n_shots)) for n_shots in shots),
        )
    console.print(table)


def _accuracy_text(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    bounds = "" if row["low"] is None else f" {row['low']:.2f}–{row['high']:.2f}"
    return f"{row['value']:.3f}{bounds}"


def _print_greedy(results: pl.DataFrame, record: Mapping[str, Any], console: Console) -> None:
    masks = pruned(results)
    searched = masks.filter(pl.col("method") == "greedy")
    if searched.is_empty():
        return
    losses = greedy_losses(results, record)
    cells = {
        (row["task"], row["shots"], row["method"]): f"{row['heads_removed']}H {row['ffns_removed']}F"
        if row["method"] == "certified"
        else f"{row['value']:.3f}"
        for row in masks.iter_rows(named=True)
    }
    cells |= {(*search, "certified"): "none" for search in searches_without_certificate(record)}
    table = _table(
        "greedy pruning: heads (H) and FFNs (F) removed, how many of these are certified, accuracy compared "
        f"with masks of equal size; kept: whether the tolerance of {record['options']['tolerance']:g} is "
        "(?: the documents cannot tell; chance: there is nothing to keep)",
        ("task", "shots", "removed", "certified", "kept", "greedy", *COMPARED_METHODS),
    )
    for row in searched.iter_rows(named=True):
        search = (row["task"], row["shots"])
        loss = losses.get(SearchMask(*search, "greedy"))
        table.add_row(
            Text(row["task"]),
            str(row["shots"]),
            f"{row['heads_removed']}H {row['ffns_removed']}F",
            cells.get((*search, "certified"), ""),
            "" if loss is None else VERDICTS.get(loss.verdict, loss.verdict),
            *(cells.get((*search, method), "") for method in ("greedy", *COMPARED_METHODS)),
        )
    console.print(table)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _print_line(console: Console, line: str) -> None:
    """Print a line that may hold names or paths: unstyled, and broken by the terminal alone."""
    console.print(Text(line), soft_wrap=True)
