"""A run's tables of units and masks, made of results.parquet and the mask files, for runs of any age."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from lowmem_icl.masks.files import MaskFile, read_mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.session.folder import run_record
from lowmem_icl.tables.mask_table import Judging, mask_table
from lowmem_icl.tables.schema import read_table
from lowmem_icl.tables.unit_table import unit_table


@dataclass(frozen=True, eq=False)
class RunTables:
    """What a run's folder holds, as far as pages and sentences are made of it; record: its run.json."""

    results: pl.DataFrame
    units: pl.DataFrame
    masks: pl.DataFrame
    record: Mapping[str, Any]


def run_tables(folder: Path) -> RunTables:
    """Return the tables of a run's folder, units and masks made anew.

    Raises InputError naming the folder where it holds no run, or a table or mask that cannot be read.
    """
    record, results = run_record(folder), read_table(folder / "results.parquet", "results")
    masks = mask_table(results, _mask_files(folder, results), judging_of(record))
    return RunTables(results, unit_table(results, masks), masks, record)


def judging_of(record: Mapping[str, Any]) -> Judging:
    """Return what a run judges masks by."""
    model, options = record["model"], record["options"]
    return Judging(model["layers"], model["heads"], options["objective"], options["tolerance"])


def _mask_files(folder: Path, results: pl.DataFrame) -> dict[str, MaskFile]:
    """Return the mask files that a table names, by their names, as far as they are there."""
    names = results["mask"].drop_nulls().unique(maintain_order=True).to_list()
    paths = {name: folder / "masks" / f"{name}.json" for name in names if name != CLEAN}
    return {name: read_mask(path) for name, path in paths.items() if path.is_file()}
