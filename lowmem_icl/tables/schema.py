"""The tables of a run folder: their columns, types and files.

Three are measured; `units` and `masks` are made of these again at any time, for people and other programs.

results.parquet has one record per measured number. A column that does not apply to a number is null:
`procedure` where an experiment has only one; `kind, layer, head` outside single units; `mask` outside masks
("clean" for the clean run); `mask_task, mask_shots`, the task and shot count whose ranking or search made the
mask, for masks made from none; `labels` without demonstrations and `ablation` where nothing is removed;
`percent` outside curves and shares of all units; `count` outside measures over the top units; `other_*`
outside comparisons of rankings; `stderr, low, high` where a number has no interval; `chance` where it has no
chance value. `low, high` bound 95 %. Task `aggregate` is the mean over tasks; its `split`, `mask` and
`mask_task` are null where the tasks' differ.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from lowmem_icl.errors import InputError
from lowmem_icl.system.files import atomic_path

SCHEMA_VERSION = "2"
DIGEST_MARK = b'"digest": "'
NO_DIGEST = b"0" * 64

RESULTS: dict[str, pl.DataType] = {
    "experiment": pl.String(),
    "procedure": pl.String(),
    "task": pl.String(),
    "shots": pl.Int32(),
    "split": pl.String(),
    "protocol": pl.String(),
    "demonstrations": pl.String(),
    "labels": pl.String(),
    "ablation": pl.String(),
    "model": pl.String(),
    "weights": pl.String(),
    "method": pl.String(),
    "mask": pl.String(),
    "mask_task": pl.String(),
    "mask_shots": pl.Int32(),
    "kind": pl.String(),
    "layer": pl.Int32(),
    "head": pl.Int32(),
    "heads_removed": pl.Int32(),
    "ffns_removed": pl.Int32(),
    "percent": pl.Int32(),
    "count": pl.Int32(),
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
UNIT_METRICS = {
    "drop": "gold_logprob_drop",
    "acc_drop": "acc_drop",
    "gold_prob_drop": "gold_prob_drop",
    "margin_drop": "margin_drop",
    "icl_effect": "icl_effect",
    "label_effect": "label_effect",
}
"""Columns of units.parquet and the metrics of ablations in results.parquet that they hold."""
PATCH_METRICS = {
    "restore": "restore_gold_logprob",
    "break": "break_gold_logprob",
    "restore_normalised": "restore_normalised",
    "function_vector": "function_vector",
}
"""Likewise of patches: at the last token, or at all tokens where only these are patched."""
UNIT_COLUMNS = UNIT_METRICS | PATCH_METRICS
UNTESTED = ("restore_normalised", "function_vector")
"""Those without q-values."""


def unit_columns(column: str) -> dict[str, str]:
    """Return the columns of units.parquet that hold a metric's bounds and q-value, by what they hold."""
    prefix = "" if column == "drop" else f"{column}_"
    names = ("low", "high") if column in UNTESTED else ("low", "high", "q_value")
    return {name: f"{prefix}{name}" for name in names}


def _with_bounds(columns: Iterable[str]) -> dict[str, pl.DataType]:
    names = ((column, *unit_columns(column).values()) for column in columns)
    return {name: pl.Float64() for group in names for name in group}


UNITS: dict[str, pl.DataType] = {
    "task": pl.String(),
    "shots": pl.Int32(),
    "unit": pl.String(),
    "kind": pl.String(),
    "layer": pl.Int32(),
    "head": pl.Int32(),
    "drop": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "exact": pl.Boolean(),
    "q_value": pl.Float64(),
    "documents_hurt": pl.Int32(),
    "documents_helped": pl.Int32(),
    **_with_bounds(list(UNIT_METRICS)[1:]),
    "gradient": pl.Float64(),
    "attribution": pl.Float64(),
    **_with_bounds(PATCH_METRICS),
    "prefix_matching": pl.Float64(),
    "copying": pl.Float64(),
    "previous_token": pl.Float64(),
    "rank": pl.Int32(),
    "kept": pl.Boolean(),
    "documents": pl.Int32(),
}
MASKS: dict[str, pl.DataType] = {
    "mask": pl.String(),
    "method": pl.String(),
    "ablation": pl.String(),
    "mask_task": pl.String(),
    "mask_shots": pl.Int32(),
    "same_as": pl.String(),
    "experiment": pl.String(),
    "procedure": pl.String(),
    "task": pl.String(),
    "shots": pl.Int32(),
    "split": pl.String(),
    "heads_removed": pl.Int32(),
    "ffns_removed": pl.Int32(),
    "removed": pl.List(pl.String()),
    "kept": pl.List(pl.String()),
    "metric": pl.String(),
    "value": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "clean": pl.Float64(),
    "clean_low": pl.Float64(),
    "clean_high": pl.Float64(),
    "chance": pl.Float64(),
    "majority": pl.Float64(),
    "objective": pl.String(),
    "loss": pl.Float64(),
    "loss_low": pl.Float64(),
    "loss_high": pl.Float64(),
    "verdict": pl.String(),
    "at_chance": pl.Boolean(),
    "documents": pl.Int32(),
}
NEVER_NULL = ("experiment", "metric", "value")
"""Columns of results.parquet."""
LARGEST = {
    **dict.fromkeys(("shots", "mask_shots", "other_shots"), 10_000),
    **dict.fromkeys(("layer", "head"), 10_000),
    **dict.fromkeys(("heads_removed", "ffns_removed", "count"), 1_000_000),
    "percent": 100,
    "documents": 100_000_000,
}
"""Its counts, and what they stay below by far."""
LARGEST_FLOAT = 1e300
"""A few such numbers have no sum."""
ACCURACIES = ("acc", "em")
"""The metrics of results.parquet that are a task's accuracy."""
TABLES = {"results": RESULTS, "effects": EFFECTS, "answers": ANSWERS}
"""Those that stages measure."""
DERIVED_TABLES = {"units": UNITS, "masks": MASKS}
"""Those that are made of results.parquet and the masks."""
_SCHEMAS = TABLES | DERIVED_TABLES


def empty_frame(table: str) -> pl.DataFrame:
    """Return a table without records."""
    return pl.DataFrame(schema=_SCHEMAS[table])


def write_table(frame: pl.DataFrame, table: str, path: Path) -> None:
    """Write a table with its name, schema version and a digest of the whole file in the file's metadata."""
    assert frame.schema == pl.Schema(_SCHEMAS[table]), f"the {table} table has another schema"
    stated = {"table": table, "schema_version": SCHEMA_VERSION, "digest": NO_DIGEST.decode()}
    written = io.BytesIO()
    frame.write_parquet(written, metadata={"lowmem_icl": json.dumps(stated)})
    # Patched in place: a table of a long run is large, and no copy of it is made.
    with written.getbuffer() as content:
        at = _digest_at(content)
        content[at : at + len(NO_DIGEST)] = _digest_without(content, at)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)


def _digest_at(content: memoryview) -> int:
    """Return where the digest of a table's file stands in it; raise ValueError where it stands nowhere."""
    ends = [found.end() for found in re.finditer(DIGEST_MARK, content)]
    if not ends or len(content) < ends[-1] + len(NO_DIGEST):
        raise ValueError("it is cut")
    return ends[-1]


def _digest_without(content: memoryview, at: int) -> bytes:
    """Return the hexadecimal SHA-256 of a file's bytes, zeros being where it stands itself."""
    summed = hashlib.sha256(content[:at])
    summed.update(NO_DIGEST)
    summed.update(content[at + len(NO_DIGEST) :])
    return summed.hexdigest().encode()


def _check_digest(content: bytes) -> None:
    """Raise ValueError where a file is not what was written; those of earlier versions have no digest."""
    if DIGEST_MARK in content:
        view = memoryview(content)
        at = _digest_at(view)
        if view[at : at + len(NO_DIGEST)] != _digest_without(view, at):
            raise ValueError("its digest does not match: it is damaged or was changed")


def read_table(path: Path, table: str) -> pl.DataFrame:
    """Read a table; raise InputError naming the file where it is another table or version, or damaged."""
    try:
        # Through the file's bytes: polars would take a path with brackets or question marks for a pattern.
        content = path.read_bytes()
        # Before anything is read: polars does not survive every flipped bit.
        _check_digest(content)
        stated = json.loads(pl.read_parquet_metadata(io.BytesIO(content)).get("lowmem_icl", "{}"))
        frame = pl.read_parquet(io.BytesIO(content))
    except (OSError, ValueError, RecursionError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"{path}: cannot be read as a {table} table ({error}); run the same command again, which writes "
            "it anew from the folder's parts"
        ) from error
    stated = stated if isinstance(stated, dict) else {"stated": stated}
    version = stated.get("schema_version")
    if version != SCHEMA_VERSION and stated.get("table") == table:
        raise InputError(
            f"{path}: this version reads tables of schema version {SCHEMA_VERSION}, this table has "
            f"{version}; run the same command with another --out, or read it with the version that wrote it"
        )
    expected = {"table": table, "schema_version": SCHEMA_VERSION}
    told = {name: value for name, value in stated.items() if name != "digest"}
    if told != expected or frame.schema != pl.Schema(_SCHEMAS[table]):
        raise InputError(f"{path}: expected the {table} table of schema version {SCHEMA_VERSION}, got {told}")
    if table == "results" and (odd := _odd_cells(frame)):
        raise InputError(
            f"{path}: {odd}, which no run writes; run the same command again, which writes it anew from the "
            "folder's parts"
        )
    return frame


def _odd_cells(results: pl.DataFrame) -> str:
    """Return which column of results has values that none of ours has, and that no page can be made of; empty
    where none has.
    """
    for name in NEVER_NULL:
        if results[name].null_count():
            return f"column '{name}' has gaps"
    under_a_mask = results.filter(pl.col("mask").is_not_null() & (pl.col("mask") != "clean"))
    of_documents = results.filter(pl.col("experiment").is_in(["evaluate", "importance", "ablate", "prune"]))
    for records, names in (
        (under_a_mask, ("heads_removed", "ffns_removed")),
        (of_documents, ("task", "shots")),
        (results.filter(pl.col("experiment") == "evaluate"), ("documents",)),
    ):
        for name in names:
            if records[name].null_count():
                return f"column '{name}' has gaps"
    for name, most in LARGEST.items():
        values = results[name].drop_nulls()
        if len(values) and not ((values >= 0) & (values <= most)).all():
            return f"column '{name}' has values outside 0 to {most:,}"
    for name in ("value", "stderr", "low", "high", "chance"):
        values = results[name].drop_nulls()
        if (values.filter(values.is_finite()).abs() > LARGEST_FLOAT).any():
            return f"column '{name}' has values beyond {LARGEST_FLOAT:g}"
    return ""
