"""Texts to packed rows: options share their context, documents what they begin with in common.

Each option is one path of a token tree; a path that begins like another goes through the same tokens, and what many
documents begin with is a stem of its own. Rows are filled in the order of the documents, so packing depends on these
documents alone.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.errors import InputError
from lowmem_icl.rows import PackedRows, Row, stem_of
from lowmem_icl.tasks.loading import Document, TaskRows

SHORTEST_ROW_TOKENS = 128
LONGEST_ROW_TOKENS = 256
SHORTEST_STEM_TOKENS = 16

Tokenise = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class PackingLimits:
    """What a model sets: positions it has, tokens a row should about have, and the tokens put in front.

    `row_tokens` suits the width: attention over a row costs its length squared, so narrow models want short rows.
    `empty_context`: the token that stands for a context without tokens; `bos`: put before every context, or None.
    """

    context_tokens: int
    row_tokens: int
    empty_context: int
    bos: int | None = None

    @staticmethod
    def row_tokens_for(width: int) -> int:
        """Return the length of rows for a model of this width."""
        return min(max(width // 32, SHORTEST_ROW_TOKENS), LONGEST_ROW_TOKENS)


@dataclass(frozen=True)
class OptionTokens:
    """One option as tokens: the path [context + continuation − 1], and the continuation it must predict."""

    path: tuple[int, ...]
    continuation: tuple[int, ...]
    context_tokens: int
    truncated: bool


@dataclass(frozen=True, eq=False)
class PackedTask:
    """A task's documents as tokens and as rows; option o of document d is number `first_option[d]` + o."""

    task: TaskRows
    options: tuple[OptionTokens, ...]
    first_option: NDArray[np.int64]
    row_tokens: int
    gold_only: bool

    @cached_property
    def packed(self) -> PackedRows:
        """The rows, laid out when they are asked for."""
        return PackedRows(tuple(_rows(self)), len(self.options))


def tokenise_options(
    documents: Sequence[Document], tokenise: Tokenise, limits: PackingLimits, task: str
) -> list[list[OptionTokens]]:
    """Return every document's options as tokens; context and continuation are tokenised apart.

    Too long a path loses tokens on the left (paper.md 6.1). Raises InputError for an option that has no token or
    does not fit the context by itself.
    """
    texts = sorted({text for document in documents for option in document.options for text in option})
    ids = dict(zip(texts, tokenise(texts), strict=True)) if texts else {}
    prefix = [] if limits.bos is None else [limits.bos]
    result = []
    for document in documents:
        options = []
        for context, continuation in document.options:
            target = ids[continuation]
            before = prefix + ids[context] or [limits.empty_context]
            if not target or len(target) > limits.context_tokens:
                raise InputError(
                    f"task {task}, document {document.index}: an option has {len(target)} tokens; "
                    f"expected 1 to {limits.context_tokens}, the model's context: {continuation[:60]!r}"
                )
            path = (before + target)[-limits.context_tokens - 1 :][:-1]
            kept = len(path) + 1 - len(target)
            truncated = kept < len(before) or document.dropped > 0
            options.append(OptionTokens(tuple(path), tuple(target), kept, truncated))
        result.append(options)
    return result


def fit_context(options: Sequence[tuple[str, str]], tokenise: Tokenise, limits: PackingLimits) -> bool:
    """Tell whether all options, (context, continuation) each, fit the model's context whole."""
    lengths = [len(ids) for ids in tokenise([text for option in options for text in option])]
    before = 0 if limits.bos is None else 1
    return all(
        max(1, before + context) + target - 1 <= limits.context_tokens
        for context, target in zip(lengths[::2], lengths[1::2], strict=True)
    )


@dataclass(frozen=True)
class _Path:
    """One option to be laid out: its number, the document it belongs to, and its tokens."""

    number: int
    owner: int
    option: OptionTokens

    @property
    def ids(self) -> tuple[int, ...]:
        return self.option.path


class _Layout:
    """A forest of tokens in depth-first order in the making."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []
        self.owners: list[int] = []
        self.answers: list[tuple[int, int, int]] = []

    def grow(self, paths: Sequence[_Path], depth: int, above: tuple[int, ...] = ()) -> None:
        """Lay out paths from a depth on; what they begin with in common is laid out once.

        above: the places of the tokens before that depth, which all of them share.
        """
        shared = _shared_length([path.ids for path in paths], depth)
        start = len(self.tokens)
        run = paths[0].ids[depth:shared]
        self.tokens.extend(run)
        self.positions.extend(range(depth, shared))
        self.owners.extend([paths[0].owner] * len(run))
        self.ends.extend([0] * len(run))
        places = (*above, *range(start, len(self.tokens)))
        branches: dict[int, list[_Path]] = {}
        for path in paths:
            if len(path.ids) == shared:
                self._answer(path, places)
            else:
                branches.setdefault(path.ids[shared], []).append(path)
        for branch in branches.values():
            self.grow(branch, shared, places)
        self.ends[start : start + len(run)] = [len(self.tokens)] * len(run)

    def _answer(self, path: _Path, places: tuple[int, ...]) -> None:
        continuation = path.option.continuation
        for place, token in zip(places[len(places) - len(continuation) :], continuation, strict=True):
            self.answers.append((place, token, path.number))

    def row(self, stem: Row | None) -> Row:
        """Return what was laid out, answers by option."""
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


def _shared_length(paths: Sequence[tuple[int, ...]], known: int = 0) -> int:
    """Return how many tokens all paths begin with in common, being told that it is at least `known`."""
    first, last = min(paths), max(paths)
    most = min(len(first), len(last))
    differing = np.flatnonzero(np.array(first[known:most]) != np.array(last[known:most]))
    return known + int(differing[0]) if len(differing) else most


def pack(task: TaskRows, tokenise: Tokenise, limits: PackingLimits, *, gold_only: bool = False) -> PackedTask:
    """Pack a task's documents into rows.

    Documents with one set of demonstrations, or without demonstrations on one passage, grow from a stem where they need
    several rows. With `gold_only` only gold options are laid out, each as a path of its own that shares no token, so
    that what is summed over a row's tokens can be told apart by document; option numbers are the same either way.
    """
    options = tokenise_options(task.documents, tokenise, limits, task.task)
    counts = [len(of_document) for of_document in options]
    first_option = np.concatenate([[0], np.cumsum(counts)])[:-1].astype(np.int64)
    flat = tuple(option for of_document in options for option in of_document)
    return PackedTask(task, flat, first_option, limits.row_tokens, gold_only)


def _rows(task: PackedTask) -> list[Row]:
    groups: dict[object, list[list[_Path]]] = {}
    for owner, (document, first) in enumerate(zip(task.task.documents, task.first_option, strict=True)):
        numbers = range(int(first), int(first) + len(document.options))
        paths = [
            _Path(number, owner, task.options[number])
            for number, gold in zip(numbers, document.gold, strict=True)
            if gold or not task.gold_only
        ]
        key = None if task.gold_only else (document.member, document.demonstrations or document.cluster)
        groups.setdefault(key, []).append(paths)
    rows: list[Row] = []
    plain: list[list[_Path]] = []
    for documents in groups.values():
        stem = 0 if task.gold_only else _stem_length(documents, task.row_tokens)
        if stem:
            grown_from = stem_of(documents[0][0].ids[:stem])
            rows += _filled_rows(documents, task.row_tokens, grown_from, shared=True)
        else:
            plain += documents
    # In the order of the documents again.
    plain.sort(key=lambda paths: paths[0].owner)
    return rows + _filled_rows(plain, task.row_tokens, None, shared=not task.gold_only)


def _stem_length(documents: Sequence[Sequence[_Path]], row_tokens: int) -> int:
    """Return how many tokens become a stem: what all paths begin with, 0 where that is little or one row holds all.

    Answers are read after it.
    """
    paths = [path for of_document in documents for path in of_document]
    if len(documents) < 2:
        return 0
    before_answers = min(len(path.ids) - len(path.option.continuation) for path in paths)
    stem = min(_shared_length([path.ids for path in paths]), before_answers)
    grown = sum(_grown_tokens(of_document, stem) for of_document in documents)
    return stem if stem >= SHORTEST_STEM_TOKENS and stem + grown > row_tokens else 0


def _grown_tokens(paths: Sequence[_Path], depth: int) -> int:
    """Return how many tokens a document's options take from a depth on, laid out together."""
    ordered = sorted(path.ids for path in paths)
    total = len(ordered[0]) - depth
    for before, path in itertools.pairwise(ordered):
        total += len(path) - max(depth, _shared_length([before, path]))
    return total


def _filled_rows(
    documents: Sequence[Sequence[_Path]], row_tokens: int, stem: Row | None, *, shared: bool
) -> list[Row]:
    """Deal documents over rows of about so many tokens, in order; a longer document has a row of its own."""
    depth = 0 if stem is None else len(stem)
    rows: list[list[_Path]] = []
    held = row_tokens
    for paths in documents:
        grows = _grown_tokens(paths, depth) if shared else sum(len(path.ids) for path in paths)
        if held + grows > row_tokens:
            rows.append([])
            held = 0
        rows[-1] += paths
        held += grows
    laid_out = []
    for members in rows:
        layout = _Layout()
        for together in [members] if shared else [[path] for path in members]:
            layout.grow(together, depth)
        laid_out.append(layout.row(stem))
    return laid_out
