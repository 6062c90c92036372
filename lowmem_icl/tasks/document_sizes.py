"""Documents by their sizes alone, for plans: a few are tokenised, all others count as those of their length.

A document's length is the characters of its row and of the rows shown before it. Between the documents that
are tokenised, from the shortest to the longest, sizes are interpolated by it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.rows import PackedRows, Row
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.packing import PackingLimits, Tokenise, first_options, tokenised
from lowmem_icl.tasks.row_arrays import outlined_row
from lowmem_icl.tasks.row_layout import (
    SHORTEST_STEM_TOKENS,
    OptionPath,
    RowLayout,
    plan_rows,
    shared_length,
)
from lowmem_icl.tasks.unread import (
    DocumentSize,
    UnreadOptions,
    characters,
    read_document,
    size_of,
    unread,
    with_options,
)

TOKENISED = 12
"""How many documents of a task at a shot count are tokenised, from short to long, besides the longest."""
LONGEST = 2
PAIRS = 8
"""Of how many groups two documents are compared, to learn what they begin with in common."""
OTHERS_COMPARED = 3
"""With how many others of its group a document is compared by its row."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SizeModel:
    """From lengths to sizes, for one task at one shot count.

    lengths: [K] ascending, of the documents that were tokenised; sizes: [K, 4], the first fields of
    DocumentSize; common, stems: [P], of pairs of documents, characters that their rows have in common,
    ascending, and tokens that they begin with in common; merged: how many tokens a document shares with the
    one before it in its row.
    """

    lengths: Floats
    sizes: Floats
    common: Floats
    stems: Floats
    merged: float

    def of(self, lengths: Sequence[int], common: Sequence[int]) -> list[DocumentSize]:
        """Return the sizes of documents by their lengths and the characters that their groups have in
        common.
        """
        columns = [np.interp(lengths, self.lengths, column) for column in self.sizes.T]
        stems = np.interp(common, self.common, self.stems) if len(self.common) else np.zeros(len(lengths))
        merged = np.full(len(lengths), self.merged)
        rows = np.round(np.column_stack([*columns, stems, merged])).astype(np.int64).tolist()
        return [DocumentSize(*row) for row in rows]


def fitted(rows: TaskRows, tokenise: Tokenise, limits: PackingLimits) -> SizeModel:
    """Learn sizes of documents from the texts of some: of evenly spaced lengths, the longest among them.

    rows: unread documents of a task at a shot count, of whatever split.
    """
    different = {unread(document).identity: document for document in rows.documents}
    ordered = sorted(different.values(), key=lambda document: unread(document).length)
    edges = np.linspace(0, len(ordered), TOKENISED + 1)
    spaced = ((edges[1:] + edges[:-1]) / 2).astype(int).tolist()
    chosen = sorted({0, *spaced, *range(max(0, len(ordered) - LONGEST), len(ordered))})
    paths = _paths(rows, [ordered[number] for number in chosen], tokenise, limits)
    sizes = np.array([_first_sizes(of_document) for of_document in paths], dtype=np.float64)
    lengths = np.array([unread(ordered[number]).length for number in chosen], dtype=np.float64)
    # Documents of one length count as their mean.
    distinct, numbers = np.unique(lengths, return_inverse=True)
    sums = np.zeros((len(distinct), sizes.shape[1]))
    np.add.at(sums, numbers, sizes)
    in_rows = plan_rows([[_plain(of_document)] for of_document in paths], limits.row_tokens, shared=True)
    saved, joined = sizes[:, 0].sum() - sum(map(len, in_rows)), len(paths) - len(in_rows)
    return SizeModel(
        distinct,
        sums / np.bincount(numbers)[:, None],
        *_stems_of_pairs(rows, tokenise, limits),
        saved / joined if joined else 0.0,
    )


def with_sizes(rows: TaskRows, model: SizeModel) -> TaskRows:
    """Return a task's unread documents with their sizes."""
    common = _common_characters(rows.documents)
    options = [unread(document) for document in rows.documents]
    sizes = model.of([of.length for of in options], [common[_group(document)] for document in rows.documents])
    sized = (
        with_options(document, UnreadOptions(of.identity, of.length, of.request, size), document.gold)
        for document, of, size in zip(rows.documents, options, sizes, strict=True)
    )
    return replace(rows, documents=tuple(sized))


def estimated_rows(documents: Sequence[Document], row_tokens: int, *, gold_only: bool = False) -> PackedRows:
    """Return outlines of the rows that documents of known sizes are about to be packed into; see
    `packing.packed`, whose order and bounds these are.
    """
    rows: list[Row] = []
    plain: list[int] = []
    sizes = [size_of(document) for document in documents]
    if gold_only:
        gold = [DocumentSize(size.gold_tokens, size.gold_reads, 0, 0) for size in sizes]
        return PackedRows(tuple(_filled(gold, row_tokens, None)), len(documents))
    groups: dict[Hashable, list[int]] = {}
    for number, document in enumerate(documents):
        groups.setdefault(_group(document), []).append(number)
    for members in groups.values():
        of_group = [sizes[number] for number in members]
        stem = min(min(size.stem, size.tokens - size.reads) for size in of_group)
        grown = sum(size.tokens - stem for size in of_group)
        if len(members) > 1 and stem >= SHORTEST_STEM_TOKENS and stem + grown > row_tokens:
            rows += _filled(
                [replace(size, tokens=size.tokens - stem, merged=0) for size in of_group],
                row_tokens,
                outlined_row(stem, 0, None),
            )
        else:
            plain += members
    rows += _filled([sizes[number] for number in sorted(plain)], row_tokens, None)
    return PackedRows(tuple(rows), len(documents))


def _filled(sizes: Sequence[DocumentSize], row_tokens: int, stem: Row | None) -> list[Row]:
    """Deal documents over rows of about so many tokens, in order; a longer document has a row of its own."""
    rows: list[list[DocumentSize]] = []
    held = row_tokens
    for size in sizes:
        if held + size.tokens > row_tokens:
            rows.append([])
            held = 0
        rows[-1].append(size)
        held += size.tokens
    return [
        outlined_row(
            max(1, sum(size.tokens for size in members) - sum(size.merged for size in members[1:])),
            sum(size.reads for size in members),
            stem,
        )
        for members in rows
    ]


def _paths(
    rows: TaskRows, documents: Sequence[Document], tokenise: Tokenise, limits: PackingLimits
) -> list[list[tuple[OptionPath, bool]]]:
    """Return the options of documents as paths, by document, and which are right."""
    read = [read_document(document) for document in documents]
    options = tokenised(replace(rows, documents=tuple(read)), tokenise, limits)
    paths = []
    for owner, (document, first) in enumerate(zip(read, first_options(read), strict=True)):
        of_document = []
        for number, is_gold in enumerate(document.gold, start=int(first)):
            option = options[number]
            of_document.append((OptionPath(number, owner, option.path, option.continuation), is_gold))
        paths.append(of_document)
    return paths


def _plain(paths: Sequence[tuple[OptionPath, bool]]) -> list[OptionPath]:
    return [path for path, _ in paths]


def _first_sizes(paths: Sequence[tuple[OptionPath, bool]]) -> tuple[int, int, int, int]:
    """Return a document's tokens and reads, of all options and of the gold ones."""
    layout = RowLayout()
    layout.grow(_plain(paths), 0)
    row = layout.row(None)
    gold = [path for path, is_gold in paths if is_gold]
    return (
        len(row),
        len(row.reads),
        sum(len(path.tokens) for path in gold),
        sum(len(path.continuation) for path in gold),
    )


def _group(document: Document) -> Hashable:
    """Return what is the same for documents that may begin alike, as in packing."""
    request = unread(document).request
    from_train = request is not None and request.key.from_train
    return from_train, document.member, document.demonstrations or document.cluster


def _grouped(documents: Sequence[Document]) -> dict[Hashable, list[Document]]:
    groups: dict[Hashable, list[Document]] = {}
    for document in documents:
        groups.setdefault(_group(document), []).append(document)
    return groups


def _common_characters(documents: Sequence[Document]) -> dict[Hashable, int]:
    """Return how many characters the rows in the prompts of every group have in common; 0 for one alone."""
    return {
        group: min((_common(members[0], other) for other in members[1 : 1 + OTHERS_COMPARED]), default=0)
        for group, members in _grouped(documents).items()
    }


def _common(left: Document, right: Document) -> int:
    shown = unread(left).length - characters(left.row) if left.demonstrations else 0
    same = (characters(value) for name, value in left.row.items() if right.row.get(name) == value)
    return shown + sum(same)


def _stems_of_pairs(rows: TaskRows, tokenise: Tokenise, limits: PackingLimits) -> tuple[Floats, Floats]:
    """Return what pairs of documents of some groups have in common, [P] each: characters of their rows, from
    few to many, and the tokens they begin with.
    """
    pairs = [members[:2] for members in _grouped(rows.documents).values() if len(members) > 1]
    pairs.sort(key=lambda pair: _common(*pair))
    spaced = np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).round().astype(int).tolist()
    found: dict[int, int] = {}
    for number in spaced:
        paths = [
            path
            for of_document in _paths(rows, pairs[number], tokenise, limits)
            for path in _plain(of_document)
        ]
        before_answers = min(len(path.tokens) - len(path.continuation) for path in paths)
        stem = min(shared_length([path.tokens for path in paths]), before_answers)
        found.setdefault(_common(*pairs[number]), stem)
    return np.array(list(found), dtype=np.float64), np.array(list(found.values()), dtype=np.float64)
