"""Token paths to rows: options share their context, documents what they begin with in common.

Each option is one path of a token tree; a path that begins like another goes through the same tokens, and
what many documents begin with is a stem of its own. Rows are filled in the order of the documents, so the
layout depends on these documents alone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowmem_icl.rows import Row, stem_of

SHORTEST_STEM_TOKENS = 16

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class OptionPath:
    """An option to be packed: its number, its document, its tokens, and those it must predict."""

    number: int
    owner: int
    tokens: Tokens
    continuation: Tokens


def plan_rows(
    groups: Sequence[Sequence[Sequence[OptionPath]]], row_tokens: int, *, shared: bool
) -> list[Row]:
    """Return rows of about so many tokens for documents, each the paths of its options.

    groups: documents that begin alike stand in one; they get a stem if that is worth it. Where nothing is
    `shared`, every path has tokens of its own.
    """
    rows: list[Row] = []
    plain: list[Sequence[OptionPath]] = []
    for documents in groups:
        stem = _stem_length(documents, row_tokens) if shared else 0
        if stem:
            rows += _filled_rows(documents, row_tokens, stem_of(documents[0][0].tokens[:stem]), shared=True)
        else:
            plain += documents
    # In the order of the documents again.
    plain.sort(key=lambda paths: paths[0].owner)
    return rows + _filled_rows(plain, row_tokens, None, shared=shared)


class RowLayout:
    """A row in the making: a forest of tokens in depth-first order."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []
        self.owners: list[int] = []
        self.answers: list[tuple[int, int, int]] = []

    def grow(self, paths: Sequence[OptionPath], depth: int, above: tuple[int, ...] = ()) -> None:
        """Add paths from a depth on; what they begin with in common is added once.

        above: the indices of the tokens before that depth, which all of them share.
        """
        shared = shared_length([path.tokens for path in paths], depth)
        start = len(self.tokens)
        run = paths[0].tokens[depth:shared]
        self.tokens.extend(run)
        self.positions.extend(range(depth, shared))
        self.owners.extend([paths[0].owner] * len(run))
        self.ends.extend([0] * len(run))
        indices = (*above, *range(start, len(self.tokens)))
        branches: dict[int, list[OptionPath]] = {}
        for path in paths:
            if len(path.tokens) == shared:
                self._answer(path, indices)
            else:
                branches.setdefault(path.tokens[shared], []).append(path)
        for branch in branches.values():
            self.grow(branch, shared, indices)
        self.ends[start : start + len(run)] = [len(self.tokens)] * len(run)

    def _answer(self, path: OptionPath, indices: tuple[int, ...]) -> None:
        read_at = indices[len(indices) - len(path.continuation) :]
        for index, token in zip(read_at, path.continuation, strict=True):
            self.answers.append((index, token, path.number))

    def row(self, stem: Row | None) -> Row:
        """Return the row as planned, answers by option."""
        answers = np.array(sorted(self.answers, key=lambda answer: answer[2]), dtype=np.int64).reshape(-1, 3)
        return Row(
            tokens=np.array(self.tokens, dtype=np.int64),
            positions=np.array(self.positions, dtype=np.int64),
            ends=np.array(self.ends, dtype=np.int64),
            owners=np.array(self.owners, dtype=np.int64),
            read_at=answers[:, 0],
            targets=answers[:, 1],
            options=answers[:, 2],
            stem=stem,
        )


def shared_length(paths: Sequence[Tokens], known: int = 0) -> int:
    """Return how many tokens all paths begin with in common, which is at least `known`."""
    first, last = min(paths), max(paths)
    most = min(len(first), len(last))
    if first[known:most] == last[known:most]:
        return most
    differing = np.flatnonzero(np.array(first[known:most]) != np.array(last[known:most]))
    return known + int(differing[0])


def _stem_length(documents: Sequence[Sequence[OptionPath]], row_tokens: int) -> int:
    """Return how many tokens become a stem: what all paths begin with, 0 where it is not worth it.

    Answers are read after it.
    """
    paths = [path for document_paths in documents for path in document_paths]
    if len(documents) < 2:
        return 0
    stem = common_length(paths)
    if stem < SHORTEST_STEM_TOKENS:
        return 0
    grown = sum(_grown_tokens(document_paths, stem) for document_paths in documents)
    return stem if stem + grown > row_tokens else 0


def common_length(paths: Sequence[OptionPath]) -> int:
    """Return how many tokens all paths begin with, before any answer is read."""
    before_answers = min(len(path.tokens) - len(path.continuation) for path in paths)
    return min(shared_length([path.tokens for path in paths]), before_answers)


def _grown_tokens(paths: Sequence[OptionPath], depth: int) -> int:
    """Return how many tokens a document's options, packed together, take beyond a depth they share."""
    ordered = sorted(path.tokens for path in paths)
    total = len(ordered[0]) - depth
    for before, path in itertools.pairwise(ordered):
        total += len(path) - shared_length([before, path], depth)
    return total


def _filled_rows(
    documents: Sequence[Sequence[OptionPath]], row_tokens: int, stem: Row | None, *, shared: bool
) -> list[Row]:
    """Deal documents over rows of about so many tokens, in order; a longer document has a row of its own."""
    depth = 0 if stem is None else len(stem)
    rows: list[list[OptionPath]] = []
    held = row_tokens
    for paths in documents:
        grows = _grown_tokens(paths, depth) if shared else sum(len(path.tokens) for path in paths)
        if held + grows > row_tokens:
            rows.append([])
            held = 0
        rows[-1] += paths
        held += grows
    planned = []
    for members in rows:
        layout = RowLayout()
        for together in [members] if shared else [[path] for path in members]:
            layout.grow(together, depth)
        planned.append(layout.row(stem))
    return planned
