"""Attention patterns, a few queries at a time, and what they say of heads on repeated sequences.

Axis letters: H heads, T tokens of a row, Q queries of a block, K keys they may see, d head width, B base
tokens.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_icl.model.attention import AttentionForm

QUERY_ROWS = 64
COPIES = 4


class PatternScores(NamedTuple):
    """Of every head, [H] in float64: mean attention to what followed earlier occurrences of the query's token
    (prefix_matching), to the token before (previous_token), and to the earlier occurrences themselves
    (duplicate_token).
    """

    prefix_matching: Tensor
    previous_token: Tensor
    duplicate_token: Tensor


def query_blocks(tokens: int, query_rows: int = QUERY_ROWS) -> Iterator[slice]:
    """Yield spans of so many queries of a row: always the same cuts, so that results are the same, too."""
    for start in range(0, tokens, query_rows):
        yield slice(start, min(tokens, start + query_rows))


class RowStates(NamedTuple):
    """What the attention of a layer saw of a plain row: queries (scaled), keys: [H, T, d]; and its form."""

    queries: Tensor
    keys: Tensor
    form: AttentionForm = AttentionForm()


def attention_logits(seen: RowStates, span: slice) -> Tensor:
    """Return the logits of the queries in `span` for all keys up to the last of them, -inf for later ones.

    [H, Q, K], K = span.stop.
    """
    products = seen.queries[:, span] @ seen.keys[:, : span.stop].transpose(1, 2)
    return seen.form.of_plain_row(products, span.start)


def patterns(seen: RowStates, query_rows: int = QUERY_ROWS) -> Iterator[tuple[slice, Tensor]]:
    """Yield a row's attention probabilities by blocks of queries: their span, and [H, Q, K] in float32."""
    for span in query_blocks(seen.queries.shape[1], query_rows):
        yield span, attention_logits(seen, span).softmax(-1)


def pattern_scores(
    blocks: Iterable[tuple[slice, Tensor]], base_tokens: int, *, spurious: bool = False
) -> PatternScores:
    """Score the attention on a sequence of B different tokens four times over behind a BOS, given by blocks
    of queries.

    Prefix matching (Bansal et al. 2023, appendix A.4): for every query j = B + 1 … 4B the attention to j − mB
    + 1, the positions after earlier occurrences of its token, summed over m and averaged over the 3B queries;
    0 to 1. `spurious` adds the three entries of the reference code that are none: from 2B, 3B and 4B to place
    1. Duplicate token: likewise to j − mB. Previous token: to j − 1, averaged over j = 2 … 4B.
    """
    last = COPIES * base_tokens
    total: Tensor | None = None
    for span, pattern in blocks:
        query = torch.arange(span.start, span.stop, device=pattern.device)[:, None]
        earlier = query - base_tokens * torch.arange(1, COPIES, device=pattern.device)
        occurs = (earlier >= 1) & (query <= last)
        before = query - 1
        first = torch.ones_like(query)
        counted = (query % base_tokens == 0) & (query > base_tokens) if spurious else first < 0
        # Three positions after, three occurrences, the token before, and the reference's own.
        columns = torch.cat([earlier + 1, earlier, before, first], 1)
        wanted = torch.cat([occurs, occurs, before >= 1, counted], 1)
        rows = torch.arange(len(query), device=pattern.device)[:, None]
        taken = pattern[:, rows, columns.clamp_(0, pattern.shape[2] - 1)].double() * wanted
        summed = taken.sum(1)
        total = summed if total is None else total + summed
    assert total is not None
    after, occurrences, before_, extra = total.split([COPIES - 1, COPIES - 1, 1, 1], dim=1)
    queries = (COPIES - 1) * base_tokens
    return PatternScores(
        (after.sum(1) + extra[:, 0]) / queries, before_[:, 0] / (last - 1), occurrences.sum(1) / queries
    )
