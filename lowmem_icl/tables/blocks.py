"""The one way from numbers to a table: blocks of columns, stamped with what all of them share."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Unit
from lowmem_icl.tables.schema import TABLES, empty_frame

Values = NDArray[np.float64]

Block = Mapping[str, Any]
"""Some columns of a table by name; a single value stands for a whole column of it, and a block of single
values alone is one record. Columns that are left out are null or come from the stamp.
"""


NO_STAMP: Block = MappingProxyType({})


def frame(table: str, blocks: Iterable[Block], stamp: Block = NO_STAMP) -> pl.DataFrame:
    """Return a table of blocks in their order; `stamp` gives the columns that a block leaves out.

    An unknown column is our own defect and raises.
    """
    schema = TABLES[table]
    frames = []
    for are_records, run in itertools.groupby(blocks, _is_record):
        if are_records:
            frames.append(_from_records(schema, list(run), stamp))
        else:
            frames += [_from_columns(schema, block, stamp) for block in run]
    whole = pl.concat(frames) if frames else empty_frame(table)
    return _with_derived(whole) if table == "results" else whole


def unit_blocks(units: Sequence[Unit], by_unit: Mapping[str, Values], /, **same: Any) -> list[Block]:
    """Return blocks of results about units removed alone, one per kind, from columns [U] and what all records
    share.
    """
    blocks: list[Block] = []
    for kind in ("head", "ffn"):
        indices = [index for index, unit in enumerate(units) if unit.kind == kind]
        if not indices:
            continue
        block: dict[str, Any] = {
            "kind": kind,
            "layer": np.array([units[index].layer for index in indices]),
            "heads_removed": int(kind == "head"),
            "ffns_removed": int(kind == "ffn"),
        }
        if kind == "head":
            block["head"] = np.array([units[index].head for index in indices])
        blocks.append(block | {name: column[indices] for name, column in by_unit.items()} | same)
    return blocks


def _is_record(block: Block) -> bool:
    return all(isinstance(value, (str, int, float, type(None))) for value in block.values())


def _from_records(schema: Mapping[str, pl.DataType], records: Sequence[Block], stamp: Block) -> pl.DataFrame:
    unknown = set().union(*records) - schema.keys()
    assert not unknown, f"unknown columns {unknown}"
    columns = {name: [record.get(name, stamp.get(name)) for record in records] for name in schema}
    return pl.DataFrame(columns, schema=schema, strict=False)


def _from_columns(schema: Mapping[str, pl.DataType], block: Block, stamp: Block) -> pl.DataFrame:
    unknown = block.keys() - schema.keys()
    assert not unknown, f"unknown columns {unknown}"
    whole = {
        name: pl.Series(name, values, strict=False)
        for name, values in block.items()
        if not isinstance(values, (str, int, float, type(None)))
    }
    single = {name: block.get(name, stamp.get(name)) for name in schema if name not in whole}
    columns = pl.DataFrame(list(whole.values())).with_columns(
        pl.lit(value, dtype=schema[name]).alias(name) for name, value in single.items()
    )
    return columns.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def _with_derived(results: pl.DataFrame) -> pl.DataFrame:
    """Return results with the columns that follow from others: whose labels were shown, the right ones unless
    a record says otherwise; how units were removed, where any was. A number without an interval has none that
    is NaN.
    """
    removed = pl.col("heads_removed").fill_null(0) + pl.col("ffns_removed").fill_null(0)
    # Prompts that were given have no shot count, and show what their records say.
    shown = pl.when(pl.col("shots") > 0).then(pl.col("labels").fill_null("right"))
    return results.with_columns(
        pl.col("stderr", "low", "high").fill_nan(None),
        labels=shown.when(pl.col("shots").is_null()).then(pl.col("labels")),
        ablation=pl.when(removed > 0).then(pl.col("ablation").fill_null("zero")),
    )
