"""Requests as tokens to packed rows: options share their context, documents what they begin with in common.

The tasks behind requests are not known here, so what is shared is found in the tokens themselves.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowmem_icl.rows import PackedRows
from lowmem_icl.tasks.row_layout import (
    SHORTEST_STEM_TOKENS,
    OptionPath,
    Tokens,
    common_length,
    plan_rows,
    shared_length,
)

Paths = list[OptionPath]


@dataclass(frozen=True)
class TokenRequest:
    """A context and the continuation to be scored after it, as tokens; neither is empty."""

    context: Tokens
    continuation: Tokens

    def path(self, max_length: int) -> Tokens:
        """Return what the model sees: both without the last token; too long, it loses tokens on the left."""
        assert 0 < len(self.continuation) <= max_length, "it fits by itself"
        return (self.context + self.continuation)[-(max_length + 1) :][:-1]


@dataclass(frozen=True)
class PackedRequests:
    """Requests as rows; request r is option `options[r]`: equal requests are scored once."""

    packed: PackedRows
    options: list[int]


def pack_requests(requests: Sequence[TokenRequest], max_length: int, row_tokens: int) -> PackedRequests:
    """Pack requests into rows of about so many tokens; the order in which they come plays no part."""
    distinct = sorted({(request.context, request.continuation) for request in requests})
    numbers = {pair: number for number, pair in enumerate(distinct)}
    documents: list[Paths] = []
    for owner, (_, pairs) in enumerate(itertools.groupby(distinct, lambda pair: pair[0])):
        documents.append(
            [
                OptionPath(numbers[pair], owner, TokenRequest(*pair).path(max_length), pair[1])
                for pair in pairs
            ]
        )
    rows = plan_rows(groups_by_prefix(documents), row_tokens, shared=True)
    options = [numbers[request.context, request.continuation] for request in requests]
    return PackedRequests(PackedRows(tuple(rows), len(distinct)), options)


@dataclass
class _Span:
    """Documents one after another that begin with `shared` tokens in common: those in groups, each with the
    tokens that its stem saves, and those that are in none.
    """

    shared: int
    groups: list[tuple[list[Paths], int]] = field(default_factory=list)
    loose: list[Paths] = field(default_factory=list)

    def take(self, inner: "_Span") -> None:
        """Add the documents of a span within this one."""
        self.groups += inner.groups
        self.loose += inner.loose

    def closed(self) -> "_Span":
        """Return the span with a group of what is loose and of groups that save less by themselves, where
        that saves tokens.
        """
        if self.shared < SHORTEST_STEM_TOKENS:
            return self
        joining = [len(documents) * self.shared > saved for documents, saved in self.groups]
        joined, lost = list(self.loose), 0
        for (documents, saved), joins in zip(self.groups, joining, strict=True):
            joined += documents if joins else []
            lost += saved if joins else 0
        saves = (len(joined) - 1) * self.shared
        if saves <= lost:
            return self
        kept = [group for group, joins in zip(self.groups, joining, strict=True) if not joins]
        return _Span(self.shared, [*kept, (joined, saves)])


def groups_by_prefix(documents: Sequence[Paths]) -> list[list[Paths]]:
    """Return documents in groups that begin alike; those that begin like no other stand alone.

    documents: sorted by their tokens. A group of k that have s tokens in common saves (k − 1)·s, and from the
    longest common beginnings to the shortest, documents join where that saves more.
    """
    spans: list[_Span] = []
    before: Tokens = ()
    for paths in documents:
        tokens = paths[0].tokens[: common_length(paths)]
        shared = shared_length([before, tokens])
        _close_to(shared, spans)
        spans.append(_Span(len(tokens), loose=[paths]))
        before = tokens
    _close_to(0, spans)
    return [
        group
        for span in spans
        for group in [*(each for each, _ in span.groups), *([one] for one in span.loose)]
    ]


def _close_to(shared: int, spans: list[_Span]) -> None:
    """Close all open spans, the innermost first, that have more in common than what follows them, and open
    one that has as much, which takes them in.
    """
    inner: _Span | None = None
    while spans and spans[-1].shared > shared:
        outer = spans.pop()
        if inner is not None:
            outer.take(inner)
        inner = outer.closed()
    if inner is None:
        return
    if not spans or spans[-1].shared < shared:
        spans.append(_Span(shared))
    spans[-1].take(inner)
