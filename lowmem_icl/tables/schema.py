"""The three tables of a run folder: their columns, types and files.

results.parquet has one row a measured number. Columns that do not apply to a number are null: `kind, layer, head`
outside single units; `mask` outside masks ("clean" for the clean run); `other_*` outside comparisons of rankings;
`k` outside top-k measures and curves (percent of the heads removed); `stderr, low, high` where a number has no interval; `chance` where it has no chance value.
`low, high` bound 95 %. Task `aggregate` is the mean over tasks; its `split` is null where the tasks' splits differ.
"""

import json
from pathlib import Path

import polars as pl

from lowmem_icl.errors import InputError
from lowmem_icl.system.files import atomic_path

SCHEMA_VERSION = "1"

RESULTS: dict[str, pl.DataType] = {
    "experiment": pl.String(),
    "task": pl.String(),
    "shots": pl.Int32(),
    "split": pl.String(),
    "protocol": pl.String(),
    "demonstrations": pl.String(),
    "model": pl.String(),
    "weights": pl.String(),
    "method": pl.String(),
    "mask": pl.String(),
    "kind": pl.String(),
    "layer": pl.Int32(),
    "head": pl.Int32(),
    "heads_removed": pl.Int32(),
    "ffns_removed": pl.Int32(),
    "k": pl.Int32(),
    "other_task": pl.String(),
    "other_shots": pl.Int32(),
    "other_method": pl.String(),
    "metric": pl.String(),
    "value": pl.Float64(),
    "stderr": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "chance": pl.Float64(),
    "exact": pl.Boolean(),
    "documents": pl.Int32(),
    "seed": pl.Int64(),
}
EFFECTS: dict[str, pl.DataType] = {
    "experiment": pl.String(),
    "task": pl.String(),
    "shots": pl.Int32(),
    "split": pl.String(),
    "document": pl.Int32(),
    "mask": pl.String(),
    "kind": pl.String(),
    "layer": pl.Int32(),
    "head": pl.Int32(),
    "metric": pl.String(),
    "value": pl.Float32(),
}
ANSWERS: dict[str, pl.DataType] = {
    "task": pl.String(),
    "shots": pl.Int32(),
    "split": pl.String(),
    "mask": pl.String(),
    "document": pl.Int32(),
    "option": pl.Int32(),
    "tokens": pl.Int32(),
    "logprob": pl.Float64(),
    "gold": pl.Boolean(),
    "context_tokens": pl.Int32(),
    "truncated": pl.Boolean(),
}
TABLES = {"results": RESULTS, "effects": EFFECTS, "answers": ANSWERS}


def write_table(frame: pl.DataFrame, table: str, path: Path) -> None:
    """Write a table with its name and schema version in the file's metadata."""
    assert frame.schema == pl.Schema(TABLES[table]), f"the {table} table has another schema"
    with atomic_path(path) as beside:
        frame.write_parquet(
            beside, metadata={"lowmem_icl": json.dumps({"table": table, "schema_version": SCHEMA_VERSION})}
        )


def read_table(path: Path, table: str) -> pl.DataFrame:
    """Read a table; raise InputError naming the file where it is another table or version."""
    try:
        # Opened here: given a path, polars would take brackets and question marks in it for a pattern.
        with path.open("rb") as opened:
            stated = json.loads(pl.read_parquet_metadata(opened).get("lowmem_icl", "{}"))
            opened.seek(0)
            frame = pl.read_parquet(opened)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path}: cannot be read as a {table} table ({error})") from error
    expected = {"table": table, "schema_version": SCHEMA_VERSION}
    if stated != expected or frame.schema != pl.Schema(TABLES[table]):
        raise InputError(
            f"{path}: expected the {table} table of schema version {SCHEMA_VERSION}, got {stated}"
        )
    return frame
