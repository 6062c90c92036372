"""Texts to tokens, and documents to what is run: the options of a task, and the rows that hold them.

Context and continuation are tokenised apart; too long a path loses tokens on the left (paper.md 6.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.errors import InputError
from lowmem_icl.rows import PackedRows
from lowmem_icl.tasks.documents import Document, OptionTexts, TaskRows
from lowmem_icl.tasks.row_layout import OptionPath, plan_rows

SHORTEST_ROW_TOKENS = 128
LONGEST_ROW_TOKENS = 256

Integers = NDArray[np.int64]
Tokenise = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class PackingLimits:
    """What a model sets: positions it has, tokens a row should about have, and the tokens put in front.

    `row_tokens` suits the width: attention over a row costs its length squared, so narrow models want short
    rows. `empty_context`: the token that stands for a context without tokens; `bos`: put before every
    context, or None.
    """

    context_tokens: int
    row_tokens: int
    empty_context: int
    bos: int | None = None

    @staticmethod
    def row_tokens_for(width: int) -> int:
        """Return the length of rows for a model of this width."""
        return min(max(width // 32, SHORTEST_ROW_TOKENS), LONGEST_ROW_TOKENS)

    def context_lengths(self, tokens: Integers) -> Integers:
        """Return the lengths of contexts of so many tokens with BOS, or with what stands for an empty one."""
        return np.maximum(1, tokens + (self.bos is not None))


class OptionTokens(NamedTuple):
    """One option as tokens: the path [context + continuation − 1], and the continuation it must predict."""

    path: tuple[int, ...]
    continuation: tuple[int, ...]
    context_tokens: int
    truncated: bool


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Texts as tokens, end to end: text x is `tokens[starts[x]:starts[x + 1]]`, maybe of a mapped file."""

    starts: Integers
    tokens: NDArray[np.int32]

    def __getitem__(self, text: int) -> list[int]:
        return self.tokens[int(self.starts[text]) : int(self.starts[text + 1])].tolist()

    @cached_property
    def lengths(self) -> Integers:
        """Tokens per text."""
        return np.diff(self.starts)


@dataclass(frozen=True, eq=False)
class TaskOptions(Sequence[OptionTokens]):
    """The options of a task's documents as tokens, [O], of which only numbers are held: tokens are looked up.

    contexts, continuations: numbers of texts in `table`; context_tokens: tokens of the context that the model
    sees, the rest being cut on the left where `truncated`.
    """

    table: TokenTable = field(repr=False)
    limits: PackingLimits
    contexts: Integers
    continuations: Integers
    context_tokens: Integers
    truncated: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.contexts)

    @overload
    def __getitem__(self, option: int) -> OptionTokens: ...
    @overload
    def __getitem__(self, option: slice) -> list[OptionTokens]: ...
    def __getitem__(self, option: int | slice) -> OptionTokens | list[OptionTokens]:
        if isinstance(option, slice):
            return [self[index] for index in range(*option.indices(len(self)))]
        limits = self.limits
        # What is cut is text: a model that needs its BOS has it before a prompt that is too long, too.
        front = [] if limits.bos is None else [limits.bos]
        text = self.table[int(self.contexts[option])]
        continuation = self.table[int(self.continuations[option])]
        kept = int(self.context_tokens[option])
        left = kept - len(front)
        before = front + (text[-left:] if left > 0 else [])
        path = ((before or [limits.empty_context]) + continuation)[:-1]
        return OptionTokens(tuple(path), tuple(continuation), kept, bool(self.truncated[option]))

    @property
    def continuation_tokens(self) -> Integers:
        """Tokens per continuation, [O]."""
        return self.table.lengths[self.continuations]

    @property
    def path_tokens(self) -> Integers:
        """Tokens per path, [O]: context and continuation without the last token."""
        return self.context_tokens + self.continuation_tokens - 1


@dataclass(frozen=True, eq=False)
class PackedTask:
    """A task's documents as tokens and as rows; option o of document d is number `first_option[d]` + o.

    `plan`: packs the rows, or finds them where they were kept.
    """

    task: TaskRows
    options: TaskOptions
    first_option: Integers
    plan: Callable[[], PackedRows] = field(repr=False)

    @cached_property
    def packed(self) -> PackedRows:
        """The rows, packed when they are first asked for."""
        return self.plan()


def task_options(
    task: TaskRows, table: TokenTable, contexts: Integers, continuations: Integers, limits: PackingLimits
) -> TaskOptions:
    """Return the options of a task's documents, in order, from the numbers of their texts, [O] each.

    Raises InputError for an option that has no token or does not fit the context by itself.
    """
    counts = [len(document.gold) for document in task.documents]
    before = limits.context_lengths(table.lengths[contexts])
    continuation_tokens = table.lengths[continuations]
    bad = np.flatnonzero((continuation_tokens == 0) | (continuation_tokens > limits.context_tokens))
    if len(bad):
        owner = int(np.repeat(np.arange(len(counts)), counts)[bad[0]])
        document = task.documents[owner]
        _, text = document.options[int(bad[0]) - sum(counts[:owner])]
        raise InputError(
            f"task {task.task}, document {document.index}: "
            f"an option has {continuation_tokens[bad[0]]} tokens; expected 1 to {limits.context_tokens}, "
            f"the model's context: {text[:60]!r}"
        )
    kept = np.minimum(before, limits.context_tokens + 1 - continuation_tokens)
    dropped = np.repeat([document.dropped > 0 for document in task.documents], counts)
    return TaskOptions(table, limits, contexts, continuations, kept, (kept < before) | dropped)


def tokenised(task: TaskRows, tokenise: Tokenise, limits: PackingLimits) -> TaskOptions:
    """Return the options of a task's documents as tokens, every text of theirs tokenised once, now."""
    texts = sorted({text for document in task.documents for option in document.options for text in option})
    ids = tokenise(texts) if texts else []
    numbers = {text: number for number, text in enumerate(texts)}
    starts = np.concatenate([[0], np.cumsum([len(text_ids) for text_ids in ids])]).astype(np.int64)
    table = TokenTable(starts, np.array([token for text_ids in ids for token in text_ids], dtype=np.int32))
    pairs = np.array(
        [
            (numbers[context], numbers[continuation])
            for document in task.documents
            for context, continuation in document.options
        ],
        dtype=np.int64,
    ).reshape(-1, 2)
    return task_options(task, table, pairs[:, 0], pairs[:, 1], limits)


def fit_context(options: OptionTexts, tokenise: Tokenise, limits: PackingLimits) -> bool:
    """Tell whether all options, (context, continuation) each, fit the model's context whole."""
    lengths = np.array([len(ids) for ids in tokenise([text for option in options for text in option])])
    return lengths_fit(lengths[::2], lengths[1::2], limits)


def lengths_fit(contexts: Integers, continuations: Integers, limits: PackingLimits) -> bool:
    """Tell whether options of so many tokens fit the model's context whole, [O] each."""
    return bool(np.all(limits.context_lengths(contexts) + continuations - 1 <= limits.context_tokens))


def first_options(documents: Sequence[Document]) -> Integers:
    """Return the number of every document's first option, [N]."""
    counts = np.array([len(document.gold) for document in documents], dtype=np.int64)
    return np.cumsum(counts) - counts


def pack(task: TaskRows, tokenise: Tokenise, limits: PackingLimits, *, gold_only: bool = False) -> PackedTask:
    """Tokenise a task's documents and pack them into rows; see `packed`."""
    options = tokenised(task, tokenise, limits)
    return PackedTask(
        task, options, first_options(task.documents), lambda: packed(task, options, gold_only=gold_only)
    )


def packed(task: TaskRows, options: TaskOptions, *, gold_only: bool = False) -> PackedRows:
    """Pack a task's documents into rows.

    Documents with one set of demonstrations, or without demonstrations on one passage, grow from a stem where
    they need several rows. With `gold_only` only gold options are packed, each as a path of its own that
    shares no token, so that what is summed over a row's tokens can be told apart by document; option numbers
    are the same either way.
    """
    groups: dict[object, list[list[OptionPath]]] = {}
    for owner, (document, first) in enumerate(
        zip(task.documents, first_options(task.documents), strict=True)
    ):
        paths = [
            OptionPath(number, owner, option.path, option.continuation)
            for number, gold in enumerate(document.gold, start=int(first))
            if gold or not gold_only
            for option in [options[number]]
        ]
        key = (document.member, document.demonstrations or document.cluster)
        groups.setdefault(None if gold_only else key, []).append(paths)
    rows = plan_rows(list(groups.values()), options.limits.row_tokens, shared=not gold_only)
    return PackedRows(tuple(rows), len(options))
