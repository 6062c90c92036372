"""Packed rows as flat arrays, to be kept in a file, and back; outlines from their sizes alone."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.rows import PackedRows, Row, stem_of

Arrays = Mapping[str, NDArray[Any]]

_TOKEN_FIELDS = ("tokens", "positions", "ends", "owners")
_ANSWER_FIELDS = ("read_at", "targets", "options")


def arrays_of_rows(packed: PackedRows) -> dict[str, NDArray[Any]]:
    """Return rows as arrays, tokens and answers end to end; `stem` is the number of a row's stem or -1."""
    stems = list(dict.fromkeys(row.stem for row in packed.rows if row.stem is not None))
    numbers = {stem: number for number, stem in enumerate(stems)}
    stem_of_row = [-1 if row.stem is None else numbers[row.stem] for row in packed.rows]
    arrays: dict[str, NDArray[Any]] = {
        "option_count": np.array([packed.option_count]),
        "row_tokens": np.array([len(row) for row in packed.rows], dtype=np.int64),
        "row_reads": np.array([len(row.reads) for row in packed.rows], dtype=np.int64),
        "row_answers": np.array([len(row.options) for row in packed.rows], dtype=np.int64),
        "stem": np.array(stem_of_row, dtype=np.int64),
        "stem_tokens": np.array([len(stem) for stem in stems], dtype=np.int64),
        "stems": _joined([stem.tokens for stem in stems]),
    }
    for name in (*_TOKEN_FIELDS, *_ANSWER_FIELDS):
        arrays[name] = _joined([getattr(row, name) for row in packed.rows])
    return arrays


def rows_of_arrays(arrays: Arrays) -> PackedRows:
    """Return rows from `arrays_of_rows`; raise ValueError for arrays that do not belong together."""
    stems = [stem_of(tokens.tolist()) for tokens in _split(arrays, "stems", "stem_tokens")]
    tokens, positions, ends, owners = (_split(arrays, name, "row_tokens") for name in _TOKEN_FIELDS)
    read_at, targets, options = (_split(arrays, name, "row_answers") for name in _ANSWER_FIELDS)
    row_stems = [None if number < 0 else stems[number] for number in arrays["stem"].tolist()]
    columns = (tokens, positions, ends, owners, read_at, targets, options, row_stems)
    rows = tuple(Row(*fields) for fields in zip(*columns, strict=True))
    return PackedRows(rows, int(arrays["option_count"][0]))


def outline_of_arrays(arrays: Arrays) -> PackedRows:
    """Return rows of the same sizes and no content, as `rows.outline` does; reads the sizes alone."""
    stems = [outlined_row(tokens, 0, None) for tokens in arrays["stem_tokens"].tolist()]
    sizes = (arrays[name].tolist() for name in ("row_tokens", "row_reads", "stem"))
    rows = tuple(
        outlined_row(tokens, reads, None if stem < 0 else stems[stem])
        for tokens, reads, stem in zip(*sizes, strict=True)
    )
    return PackedRows(rows, int(arrays["option_count"][0]))


def outlined_row(tokens: int, reads: int, stem: Row | None) -> Row:
    """Return a row of so many tokens, of which so many are read, without content."""
    column, answers = _nothing(tokens), _numbers(reads)
    row = Row(column, column, column, column, answers, answers, answers, stem)
    # Known already; a plan has a hundred thousand rows.
    vars(row)["reads"] = answers
    return row


@lru_cache(maxsize=4096)
def _nothing(count: int) -> NDArray[np.int64]:
    return np.broadcast_to(np.int64(0), count)


@lru_cache(maxsize=4096)
def _numbers(count: int) -> NDArray[np.int64]:
    numbers = np.arange(count)
    numbers.flags.writeable = False
    return numbers


def _joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int32]:
    return np.concatenate([*arrays, np.zeros(0, dtype=np.int64)]).astype(np.int32)


def _split(arrays: Arrays, name: str, lengths: str) -> list[NDArray[np.int64]]:
    ends = np.cumsum(arrays[lengths])
    values = arrays[name].astype(np.int64)
    if len(values) != (int(ends[-1]) if len(ends) else 0):
        raise ValueError(f"{name}: expected {ends[-1:]} numbers, got {len(values)}")
    return np.split(values, ends[:-1]) if len(ends) else []
