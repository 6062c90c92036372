"""Micro-batches: rows and their variants through a layer together, as many tokens as pay off.

Axis letters: V variants, T tokens of a row, N tokens of a micro-batch, D width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.rows import Row

MICRO_BATCH_TOKENS = 1280

Slots = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Piece:
    """Some variants of the row at `index` of a block; `slots` [V]: which of the row's residuals they are."""

    index: int
    slots: Slots

    @property
    def selection(self) -> slice | Slots:
        """What selects the slots: a slice, which copies nothing, where they stand side by side."""
        first, count = int(self.slots[0]), len(self.slots)
        return slice(first, first + count) if int(self.slots[-1]) - first == count - 1 else self.slots


def micro_batches(
    work: Iterable[tuple[int, Slots]], lengths: Sequence[int], most_tokens: int
) -> Iterator[list[Piece]]:
    """Deal variants of rows over micro-batches, in order; `work`: indices of rows and slots of each.

    A micro-batch has at most `most_tokens`, or a single variant that is longer; `lengths` are the tokens of
    all rows. Slots of a row must ascend.
    """
    batch: list[Piece] = []
    room = most_tokens
    for index, slots in work:
        length, first = max(1, lengths[index]), 0
        while first < len(slots):
            if batch and room < length:
                yield batch
                batch, room = [], most_tokens
            taken = min(len(slots) - first, max(1, room // length))
            batch.append(Piece(index, slots[first : first + taken]))
            room -= taken * length
            first += taken
    if batch:
        yield batch


def flattened(parts: Sequence[Tensor]) -> Tensor:
    """Return states of pieces, [V, T, D] each, as those of a micro-batch, [N, D]."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def row_batches(rows: Sequence[Row], most_tokens: int) -> Iterator[list[int]]:
    """Deal rows under one mask each over micro-batches: yields the indices of the rows that go together."""
    slot = np.zeros(1, dtype=np.int64)
    work = ((index, slot) for index in range(len(rows)))
    for pieces in micro_batches(work, [len(row) for row in rows], most_tokens):
        yield [piece.index for piece in pieces]


@dataclass(frozen=True)
class RowGroup:
    """Rows of a block, by index, that go through a layer in turn: those of one stem, or a few plain ones."""

    stem: int | None
    members: tuple[int, ...]


def row_groups(rows: Sequence[Row], most_tokens: int) -> list[RowGroup]:
    """Deal a block's rows, every stem before those that grow from it, over groups.

    Plain rows go together up to about `most_tokens`, so that the clean z of a group stays small; rows of one
    stem all go together, since they need its keys and values.
    """
    groups: list[RowGroup] = []
    plain: list[int] = []
    stems = {row.stem for row in rows} - {None}
    index_of = {row: index for index, row in enumerate(rows) if row in stems}
    grown: dict[int, list[int]] = {index: [] for index in index_of.values()}
    room = most_tokens
    for index, row in enumerate(rows):
        if row in index_of:
            continue
        if row.stem is not None:
            grown[index_of[row.stem]].append(index)
            continue
        if plain and room < len(row):
            groups.append(RowGroup(None, tuple(plain)))
            plain, room = [], most_tokens
        plain.append(index)
        room -= len(row)
    if plain:
        groups.append(RowGroup(None, tuple(plain)))
    return groups + [RowGroup(stem, tuple(members)) for stem, members in grown.items()]
