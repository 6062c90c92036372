"""Texts to packed rows: options share their context, documents what they begin with in common.

Each option is one path of a token tree; a path that begins like another goes through the same tokens. Rows are
filled in the order of the documents, so packing depends on these documents alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.errors import InputError
from lowmem_icl.rows import PackedRows, Row
from lowmem_icl.tasks.loading import Document, TaskRows

SHORTEST_ROW_TOKENS = 128
LONGEST_ROW_TOKENS = 256
# 64 bytes of float32: with rows of such lengths every buffer of the attention starts on a full vector, whichever
# thread works on it. MKL's products differ in the last bit between aligned and unaligned buffers.
ROW_MULTIPLE = 16

Scalar = TypeVar("Scalar", bound=np.generic)
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
    """A task's documents as rows; option o of document d is number `first_option[d]` + o."""

    task: TaskRows
    packed: PackedRows
    options: tuple[OptionTokens, ...]
    first_option: NDArray[np.int64]

    def by_document(self, values: NDArray[Scalar]) -> list[NDArray[Scalar]]:
        """Cut an array with one value an option, [O], into one array a document."""
        return np.split(values, self.first_option[1:])


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
            options.append(OptionTokens(tuple(path), tuple(target), kept, kept < len(before)))
        result.append(options)
    return result


class _RowBuilder:
    """A forest of tokens in the making."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.owners: list[int] = []
        self.children: dict[tuple[int, int], int] = {}
        self.answers: list[tuple[int, int, int]] = []

    def new_tokens(self, paths: Sequence[tuple[int, ...]]) -> int:
        """Return by how many tokens the forest grows if these paths are added."""
        added: dict[tuple[int, int], int] = {}
        for path in paths:
            node = -1
            for token in path:
                key = (node, token)
                known = self.children.get(key)
                # Nodes that would be new get numbers that no node has.
                node = known if known is not None else added.setdefault(key, -2 - len(added))
        return len(added)

    def add(self, option: OptionTokens, number: int, owner: int, shared: bool) -> None:
        node, nodes = -1, []
        for token in option.path:
            key = (node, token)
            child = self.children.get(key) if shared else None
            if child is None:
                child = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.owners.append(owner)
                if shared:
                    self.children[key] = child
            nodes.append(child)
            node = child
        reading = nodes[len(option.path) - len(option.continuation) :]
        self.answers.extend(
            (place, token, number) for place, token in zip(reading, option.continuation, strict=True)
        )

    def row(self) -> Row:
        """Lay the forest out in depth-first order, children in the order they were added."""
        below: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            below.setdefault(parent, []).append(node)
        order: list[int] = []
        waiting = below.get(-1, [])[::-1]
        while waiting:
            node = waiting.pop()
            order.append(node)
            waiting.extend(below.get(node, [])[::-1])
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        positions = np.zeros(len(order), dtype=np.int64)
        ends = np.arange(1, len(order) + 1, dtype=np.int64)
        for here, node in enumerate(order):
            if self.parents[node] >= 0:
                positions[here] = positions[place[self.parents[node]]] + 1
        for here in range(len(order) - 1, -1, -1):
            parent = self.parents[order[here]]
            if parent >= 0:
                ends[place[parent]] = max(ends[place[parent]], ends[here])
        answers = np.array(self.answers, dtype=np.int64).reshape(-1, 3)
        fill = (0, -len(order) % ROW_MULTIPLE)
        return Row(
            tokens=np.pad(np.array(self.tokens, dtype=np.int64)[order], fill),
            positions=np.pad(positions, fill),
            # A token that fills up sees itself alone, and nothing sees it.
            ends=np.concatenate([ends, np.arange(len(order), len(order) + fill[1]) + 1]),
            owners=np.pad(np.array(self.owners, dtype=np.int64)[order], fill),
            read_at=place[answers[:, 0]],
            targets=answers[:, 1],
            options=answers[:, 2],
        )


def pack(task: TaskRows, tokenise: Tokenise, limits: PackingLimits, *, gold_only: bool = False) -> PackedTask:
    """Pack a task's documents into rows.

    With `gold_only` only gold options are laid out, each as a path of its own that shares no token, so that what
    is summed over a row's tokens can be told apart by document; option numbers are the same either way.
    """
    options = tokenise_options(task.documents, tokenise, limits, task.task)
    counts = [len(of_document) for of_document in options]
    first_option = (
        np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if counts else np.zeros(0, np.int64)
    )
    rows: list[Row] = []
    builder = _RowBuilder()
    for owner, (document, of_document) in enumerate(zip(task.documents, options, strict=True)):
        chosen = [
            (number, option)
            for number, option in enumerate(of_document, start=int(first_option[owner]))
            if not gold_only or document.gold[number - int(first_option[owner])]
        ]
        paths = [option.path for _, option in chosen]
        grows = sum(map(len, paths)) if gold_only else builder.new_tokens(paths)
        if builder.tokens and len(builder.tokens) + grows > limits.row_tokens:
            rows.append(builder.row())
            builder = _RowBuilder()
        for number, option in chosen:
            builder.add(option, number, owner, shared=not gold_only)
    if builder.tokens:
        rows.append(builder.row())
    flat = tuple(option for of_document in options for option in of_document)
    return PackedTask(task, PackedRows(tuple(rows), len(flat)), flat, first_option)
