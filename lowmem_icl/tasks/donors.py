"""Which document's values stand in place of another's, token by token, and rows for that.

Axis letters: N documents, T tokens of a row.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.errors import InputError
from lowmem_icl.rows import Row, stem_of
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.row_layout import OptionPath, RowLayout

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowAlone:
    """A row with options of one document and of no other; `document`: its number.

    context_tokens [T]: how many tokens the context has that each token is of, or continues.
    """

    row: Row
    document: int
    context_tokens: Integers


@dataclass(frozen=True, eq=False)
class DonorPath:
    """A document with its right answer, as a row of its own; `context_tokens` of it are the context."""

    row: Row
    context_tokens: int


def donors_among(pool: TaskRows, seed: int) -> list[int]:
    """Return, by document, the number of the one that gives it its values, [N].

    The documents stand in a circle, those of a cluster side by side, in an order that the seed draws. Each
    takes from the one that is as many places further as the largest cluster has documents: so each gives
    once, none to itself, and none to its cluster unless that is more than half of all. Raises InputError for
    a single document.
    """
    count, clusters = len(pool.documents), pool.clusters
    if count < 2:
        raise InputError(
            f"--ablation resample: task {pool.task} has {count} document of split {pool.split} at "
            f"{pool.shots} shots, expected two at least, which give each other their values; raise the limit "
            "or choose another ablation"
        )
    places = sorted(
        range(count),
        key=lambda number: (_drawn(pool, seed, clusters[number]), document_order(pool, seed, number)),
    )
    largest = max(Counter(clusters).values())
    step = largest if largest < count else 1
    taken = dict(zip(places, places[step:] + places[:step], strict=True))
    return [taken[number] for number in range(count)]


def donor_from(pool: TaskRows, seed: int, document: Document) -> int:
    """Return the number of the one that gives its values to a document that is not of the pool."""
    return int(_drawn(pool, seed, f"{document.member}:{document.index}"), 16) % len(pool.documents)


def document_order(pool: TaskRows, seed: int, number: int) -> str:
    """Return by what a document's place within its cluster is told."""
    document = pool.documents[number]
    return _drawn(pool, seed, f"{document.member}:{document.index}")


def _drawn(pool: TaskRows, seed: int, name: str) -> str:
    return hashlib.sha256(repr((seed, pool.task, name)).encode()).hexdigest()


def rows_alone(packed: PackedTask, *, gold_only: bool = False) -> list[RowAlone]:
    """Return rows that hold one document each; what options share has one place counted from the end.

    Options whose contexts differ in length have a row each, since a token that they share would have two
    places. With `gold_only` a document has one row, in which every gold option is a path of its own.
    """
    rows: list[RowAlone] = []
    for owner, (document, first) in enumerate(zip(packed.task.documents, packed.first_option, strict=True)):
        by_length: dict[int, list[OptionPath]] = {}
        gold: list[tuple[int, list[OptionPath]]] = []
        for number, is_gold in enumerate(document.gold, start=int(first)):
            option = packed.options[number]
            path = OptionPath(number, owner, option.path, option.continuation)
            by_length.setdefault(option.context_tokens, []).append(path)
            if is_gold:
                gold.append((option.context_tokens, [path]))
        together = [gold] if gold_only else [[group] for group in by_length.items()]
        rows += [_row(owner, groups) for groups in together if groups]
    return rows


def _row(owner: int, groups: Sequence[tuple[int, Sequence[OptionPath]]]) -> RowAlone:
    layout, contexts = RowLayout(), []
    for context_tokens, paths in groups:
        before = len(layout.tokens)
        layout.grow(paths, 0)
        contexts += [context_tokens] * (len(layout.tokens) - before)
    return RowAlone(layout.row(None), owner, np.array(contexts, dtype=np.int64))


def donor_path(packed: PackedTask, number: int) -> DonorPath:
    """Return a document with the first of its right answers."""
    answer = int(packed.first_option[number]) + packed.task.documents[number].gold.index(True)
    option = packed.options[answer]
    return DonorPath(stem_of(option.path), option.context_tokens)


def aligned(alone: RowAlone, donor: DonorPath) -> Integers:
    """Return, of every token of a row, the donor's token at the same place counted from the context's end,
    [T]; where the donor ends on either side, its first or last token.
    """
    places = alone.row.positions + (donor.context_tokens - alone.context_tokens)
    return np.clip(places, 0, len(donor.row) - 1)
