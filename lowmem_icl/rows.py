"""Packed rows of tokens: plain arrays between the tasks, which make them, and the engine, which runs them.

A row is a forest of tokens in depth-first order. A token's position is its depth, and it sees its ancestors and
itself only, so options can share their context and several documents can lie in one row without seeing each other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Row:
    """One packed sequence of T tokens with A answers to read off it.

    tokens, positions: [T]; `ends` [T]: token j is an ancestor of i (or i itself) exactly when j <= i < ends[j].
    Answer a is the log-probability of token `targets[a]` read at place `read_at[a]`; it counts to option
    `options[a]` (a number the maker of the rows chose, unique over all rows of a task). `owners` [T]: the
    document each token belongs to where a row shares none between documents, else the first that used it. Tokens that
    only fill a row up see themselves alone and are never read.
    """

    tokens: Integers
    positions: Integers
    ends: Integers
    owners: Integers
    read_at: Integers
    targets: Integers
    options: Integers

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that the row's results depend on."""
        summed = hashlib.sha256()
        for array in (self.tokens, self.positions, self.ends, self.read_at, self.targets, self.options):
            summed.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array).tobytes())
        return summed.hexdigest()


@dataclass(frozen=True, eq=False)
class PackedRows:
    """All rows of one task at one shot count; `option_count` options are read off them."""

    rows: tuple[Row, ...]
    option_count: int

    @property
    def token_count(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)


def longest(rows: Sequence[Row]) -> int:
    """Return the length of the longest row, in tokens."""
    return max((len(row) for row in rows), default=0)
