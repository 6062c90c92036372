"""A finished or unfinished run as the page reads it: its record, tables and greedy masks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from lowmem_icl.masks.files import read_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.numbers import clean_evaluation, with_right_labels
from lowmem_icl.session.folder import run_record
from lowmem_icl.tables.guessing import settings_at_chance
from lowmem_icl.tables.schema import read_table

Setting = tuple[str, int]
"""A task, or the mean over tasks, at a shot count."""


@dataclass(frozen=True, eq=False)
class RunTables:
    """What a run folder holds: `results`, its record (run.json), and its mask files as `masks` by name."""

    folder: Path
    record: Mapping[str, Any]
    results: pl.DataFrame
    masks: Mapping[str, Mask]

    @cached_property
    def tasks(self) -> list[str]:
        """The run's tasks in their order, and after them their mean where the tables hold one."""
        own = list(dict.fromkeys(task["task"] for task in self.record["tasks"]))
        return [*own, AGGREGATE] if (self.results["task"] == AGGREGATE).any() else own

    @cached_property
    def shots(self) -> list[int]:
        """The numbers of demonstrations, ascending."""
        return sorted(self.record["shots"])

    @cached_property
    def at_chance(self) -> frozenset[Setting]:
        """Where the clean model is no better than guessing."""
        return settings_at_chance(clean_evaluation(self.results).filter(with_right_labels()))

    @cached_property
    def greedy_names(self) -> dict[Setting, str]:
        """The names of the greedy masks that are in the folder, by what they were searched for."""
        searched = self.results.filter(
            (pl.col("experiment") == "prune")
            & (pl.col("procedure") == "greedy")
            & (pl.col("method") == "greedy")
            & (pl.col("mask_task") == pl.col("task"))
        )
        found = searched.select("task", "shots", "mask").unique(maintain_order=True)
        return {(task, shots): mask for task, shots, mask in found.iter_rows() if mask in self.masks}

    @property
    def greedy_masks(self) -> dict[Setting, Mask]:
        """The greedy masks by what they were searched for."""
        return {setting: self.masks[name] for setting, name in self.greedy_names.items()}

    def n_units(self, kind: str) -> int:
        """Return how many heads or FFNs the model has."""
        model = self.record["model"]
        return int(model["layers"] * (model["heads"] if kind == "head" else 1))


def read_run(folder: Path) -> RunTables:
    """Read a run folder; raise InputError naming a folder that holds no run or a file that cannot be read."""
    record, results = run_record(folder), read_table(folder / "results.parquet", "results")
    names = results.filter(pl.col("procedure") == "greedy")["mask"].drop_nulls().unique()
    paths = {name: folder / "masks" / f"{name}.json" for name in names}
    masks = {name: read_mask(path).mask for name, path in paths.items() if path.is_file()}
    return RunTables(folder, record, results, masks)
