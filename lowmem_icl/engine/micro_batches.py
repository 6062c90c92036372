"""Micro-batches: rows and their variants together through a layer, as many tokens as are worth multiplying at once.

Axis letters: V variants, T tokens of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.rows import Row

MICRO_BATCH_TOKENS = 1280

Slots = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Piece:
    """Some variants of the row at `place` of a block; `slots` [V]: which of the row's residuals they are."""

    place: int
    slots: Slots

    @property
    def index(self) -> slice | Slots:
        """The slots as an index: a slice, which copies nothing, where they stand side by side."""
        first, count = int(self.slots[0]), len(self.slots)
        return slice(first, first + count) if int(self.slots[-1]) - first == count - 1 else self.slots


def micro_batches(
    work: Iterable[tuple[int, Slots]], lengths: Sequence[int], most_tokens: int
) -> Iterator[list[Piece]]:
    """Deal variants of rows over micro-batches, in order; `lengths` are the tokens of the rows by place.

    A micro-batch has at most `most_tokens`, or a single variant that is longer. Slots of a row must ascend.
    """
    batch: list[Piece] = []
    room = most_tokens
    for place, slots in work:
        length, first = max(1, lengths[place]), 0
        while first < len(slots):
            if batch and room < length:
                yield batch
                batch, room = [], most_tokens
            taken = min(len(slots) - first, max(1, room // length))
            batch.append(Piece(place, slots[first : first + taken]))
            room -= taken * length
            first += taken
    if batch:
        yield batch


@dataclass(frozen=True)
class RowGroup:
    """Places of a block whose rows go through a layer one after the other: those of one stem, or a few plain ones."""

    stem: int | None
    places: tuple[int, ...]


def row_groups(rows: Sequence[Row], most_tokens: int) -> list[RowGroup]:
    """Deal a block's rows, every stem before those that grow from it, over groups.

    Plain rows go together up to about `most_tokens`, so that the clean z of a group stays small; rows of one stem
    all go together, since they need its keys and values.
    """
    groups: list[RowGroup] = []
    plain: list[int] = []
    stems = {row.stem for row in rows} - {None}
    place_of = {row: place for place, row in enumerate(rows) if row in stems}
    grown: dict[int, list[int]] = {place: [] for place in place_of.values()}
    room = most_tokens
    for place, row in enumerate(rows):
        if row in place_of:
            continue
        if row.stem is not None:
            grown[place_of[row.stem]].append(place)
            continue
        if plain and room < len(row):
            groups.append(RowGroup(None, tuple(plain)))
            plain, room = [], most_tokens
        plain.append(place)
        room -= len(row)
    if plain:
        groups.append(RowGroup(None, tuple(plain)))
    return groups + [RowGroup(stem, tuple(places)) for stem, places in grown.items()]
