"""Packed rows of tokens: plain arrays between the tasks, which make them, and the engine, which runs them.

A row is a forest of tokens in depth-first order. A token's position is its depth, and it sees only its
ancestors and itself, so options can share their context and several documents can lie in one row without
seeing each other. What many documents begin with (shared demonstrations, a passage) is a row of its own,
their stem: it goes through a layer once, and all tokens of the rows that grow from it see all of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Row:
    """One packed sequence of T tokens with A answers to read off it.

    tokens, positions: [T]; `ends` [T]: token j is an ancestor of i (or i itself) exactly when j <= i <
    ends[j]. Answer a is the log-probability of token `targets[a]` after the token at index `read_at[a]`; it
    counts towards option `options[a]` (a number that whoever makes the rows chooses, unique over all rows of
    a task). `owners` [T]: the document each token belongs to where a row shares none between documents, else
    the first that used it. `stem`: the row whose tokens stand before all of these, or None; a stem has no
    answers and no stem.
    """

    tokens: Integers
    positions: Integers
    ends: Integers
    owners: Integers
    read_at: Integers
    targets: Integers
    options: Integers
    stem: "Row | None" = None

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def reads(self) -> Integers:
        """The indices of the tokens after which answers are read, ascending, each once: [R]."""
        return np.unique(self.read_at)

    @cached_property
    def answered(self) -> Integers:
        """The options that are read off this row, ascending, each once: [O]."""
        return np.unique(self.options)

    @cached_property
    def residual_digest(self) -> str:
        """SHA-256 over what a residual of this row depends on: tokens, positions, ends and the stem's."""
        arrays = (self.tokens, self.positions, self.ends)
        return _sha256(arrays, "" if self.stem is None else self.stem.residual_digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that the row's scores depend on: the above, and its answers."""
        arrays = (self.tokens, self.positions, self.ends, self.read_at, self.targets, self.options)
        return _sha256(arrays, "" if self.stem is None else self.stem.digest)


def _sha256(arrays: Sequence[Integers], suffix: str) -> str:
    summed = hashlib.sha256()
    for array in arrays:
        summed.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array).tobytes())
    summed.update(suffix.encode())
    return summed.hexdigest()


def stem_of(tokens: Sequence[int]) -> Row:
    """Return a stem: a plain row in which every token sees all before it."""
    length, nothing = len(tokens), np.zeros(0, dtype=np.int64)
    return Row(
        tokens=np.array(tokens, dtype=np.int64),
        positions=np.arange(length),
        ends=np.full(length, length),
        owners=np.zeros(length, dtype=np.int64),
        read_at=nothing,
        targets=nothing,
        options=nothing,
    )


def outline(row: Row, stems: dict[Row, Row]) -> Row:
    """Return a row of the same sizes and no content, for planning; `stems` keeps the outlines of stems."""
    stem = None if row.stem is None else stems.setdefault(row.stem, outline(row.stem, stems))
    column, answers = np.broadcast_to(np.int64(0), len(row)), np.arange(len(row.reads))
    return Row(column, column, column, column, answers, answers, answers, stem)


def with_stems(rows: Sequence[Row]) -> list[Row]:
    """Return rows with every stem put once, before the first row that grows from it."""
    result: list[Row] = []
    seen: set[Row] = set()
    for row in rows:
        if row.stem is not None and row.stem not in seen:
            seen.add(row.stem)
            result.append(row.stem)
        result.append(row)
    return result


@dataclass(frozen=True, eq=False)
class PackedRows:
    """All rows of one task at one shot count; `option_count` options are read off them.

    Rows that grow from one stem stand together.
    """

    rows: tuple[Row, ...]
    option_count: int

    @cached_property
    def sizes(self) -> Integers:
        """Tokens and reads of every row, [N, 2], without their stems."""
        return np.array([(len(row), len(row.reads)) for row in self.rows], dtype=np.int64).reshape(-1, 2)

    @cached_property
    def has_stems(self) -> bool:
        """Whether any row grows from a stem."""
        return any(row.stem is not None for row in self.rows)

    @cached_property
    def token_count(self) -> int:
        """Tokens of all rows, every stem counted once."""
        return sum(len(row) for row in with_stems(self.rows))
