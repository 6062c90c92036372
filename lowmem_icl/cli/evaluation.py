"""What `lowmem-icl evaluate` prints: every task clean and under every mask, and what each mask costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
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
        title=Text("accuracy and what each mask costs, with 95 % intervals", style="table.title"),
        title_justify="left",
    )
    for name in ("task", "shots", "chance", "mask"):
        table.add_column(name, justify="left" if name in ("task", "mask") else "right", overflow="fold")
    for name in ("accuracy", "drop"):
        table.add_column(name, justify="right", no_wrap=True)
    for (task, shots), members in accuracies.group_by("task", "shots", maintain_order=True):
        for number, row in enumerate(members.to_dicts()):
            chance = "" if row["chance"] is None else f"{row['chance']:.3f}"
            first = (Text(str(task)), str(shots), chance) if not number else ("", "", "")
            drop = drops.get(_key(row))
            last = number == len(members) - 1
            table.add_row(
                *first,
                Text(str(row["mask"])),
                _with_bounds(row, ""),
                "" if drop is None else _with_bounds(drop, "+"),
                end_section=last and len(members) > 1,
            )
    console.print(table)
    for line in (
        "drop: accuracy of the clean run minus accuracy under the mask, on the same documents",
        MEANING,
        f"tables and report.html in {folder}",
    ):
        console.print(Text(line), soft_wrap=True)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["shots"], row["mask"]


def _with_bounds(row: Mapping[str, Any], sign: str) -> str:
    bounds = "" if row["low"] is None else f" [{row['low']:{sign}.2f}, {row['high']:{sign}.2f}]"
    return f"{row['value']:{sign}.3f}{bounds}"
