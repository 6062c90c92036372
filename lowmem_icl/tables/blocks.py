"""The three tables of a run folder: their columns, types and files.

results.parquet has one row a measured number. Columns that do not apply to a number are null: `kind, layer, head`
outside single units; `mask` outside masks ("clean" for the clean run); `other_*` outside comparisons of rankings;
`k` outside top-k measures and curves (percent of the heads removed); `stderr, low, high` where a number has no interval; `chance` where it has no chance value.
`low, high` bound 95 %. Task `aggregate` is the mean over tasks; its `split` is null where the tasks' splits differ.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from lowmem_icl.tables.schema import TABLES


def rows_frame(
    table: str, rows: Iterable[Mapping[str, Any]], constants: Mapping[str, Any] = {}
) -> pl.DataFrame:
    """Return a table from rows that leave out what is null; `constants` fill their columns in every row.

    An unknown column or a value of another type is our own defect and raises.
    """
    schema = TABLES[table]
    columns: dict[str, list[Any]] = {name: [] for name in schema}
    for row in rows:
        unknown = row.keys() - schema.keys()
        assert not unknown, f"unknown columns {unknown}"
        for name, column in columns.items():
            column.append(row.get(name, constants.get(name)))
    return pl.DataFrame(columns, schema=schema, strict=table != "effects")


def columns_frame(
    table: str, blocks: Sequence[Mapping[str, Any]], constants: Mapping[str, Any] = {}
) -> pl.DataFrame:
    """Return a table from blocks of whole columns; one value stands for a column of it.

    Columns that a block leaves out are null or constant.
    """
    schema = TABLES[table]
    frames = []
    for block in blocks:
        whole = {
            name: pl.Series(name, values, strict=False)
            for name, values in block.items()
            if not isinstance(values, (str, int, float, type(None)))
        }
        single = {name: block.get(name, constants.get(name)) for name in schema if name not in whole}
        frame = pl.DataFrame(list(whole.values())).with_columns(
            pl.lit(value, dtype=schema[name]).alias(name) for name, value in single.items()
        )
        frames.append(frame.select(pl.col(name).cast(dtype) for name, dtype in schema.items()))
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)
