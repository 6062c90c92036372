"""What `lowmem-icl evaluate` prints: every task clean and under every mask, and what each mask costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_icl.cli.tables import MEANING
from lowmem_icl.report.numbers import with_right_labels
from lowmem_icl.tables.schema import ACCURACIES, read_table


def show_evaluation(folder: Path, console: Console) -> None:
    """Print accuracies clean and under every mask, with 95 % intervals, and the paired drops."""
    results = read_table(folder / "results.parquet", "results")
    records = results.filter((pl.col("experiment") == "evaluate") & with_right_labels())
    accuracies = records.filter(pl.col("metric").is_in(ACCURACIES))
    drops = {_key(row): row for row in records.filter(pl.col("metric") == "acc_drop").to_dicts()}
    table = Table(
        title=Text("accuracy, and what each mask costs, with 95 % intervals", style="table.title"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("mask", overflow="fold")
    for name in ("accuracy", "drop"):
        table.add_column(name, justify="right", no_wrap=True)
    for (task, shots), members in accuracies.group_by("task", "shots", maintain_order=True):
        chance = members["chance"][0]
        said = "" if chance is None else f"chance {chance:.3f}"
        table.add_row(Text(f"{task}, {shots} shots"), said, "")
        for row in members.to_dicts():
            drop = drops.get(_key(row))
            table.add_row(
                Text(f"  {row['mask']}"),
                _with_bounds(row, ""),
                "" if drop is None else _with_bounds(drop, "+"),
            )
    console.print(table)
    console.print(Text("drop: clean accuracy minus accuracy under the mask, on the same documents"))
    for line in (MEANING, f"tables and report.html in {folder}"):
        console.print(Text(line), soft_wrap=True)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["shots"], row["mask"]


def _with_bounds(row: Mapping[str, Any], sign: str) -> str:
    bounds = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['value']:{sign}.3f}{bounds}"
