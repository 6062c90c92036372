"""Attention within every row of a micro-batch, as transformers' layers call it.

What goes through a layer is a micro-batch: the tokens of several rows, each under one or several masks, one
after the other. Linears and norms see them all at once; attention sees each row by itself.

Axis letters: N tokens of a micro-batch, V variants (a row under one mask each), T tokens of a row, P tokens
of its stem, Q queries and K keys of a mask, H query heads, G heads of keys and values, d head width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from lowmem_icl.model.branches import attend_branches

ATTENTION = "lowmem_icl_by_row"
# 64 bytes of float32: with so many queries and keys every buffer of the attention starts on a full vector,
# whichever thread works on it. MKL's products differ in the last bit between aligned and unaligned buffers.
ROW_MULTIPLE = 16
QUERY_BLOCK = 32
SPARED_SHARE = 0.1
"""Blocks of queries go together unless at least this share of their products is spared by keeping apart."""

KeyBias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class QueryBlock:
    """Queries of a row that are multiplied with some of its keys only: none of them sees another key."""

    queries: slice
    keys: slice

    @classmethod
    def spanning(cls, blocks: Sequence["QueryBlock"]) -> "QueryBlock":
        """Return the smallest block that contains all of these, which stand side by side."""
        first, last = blocks[0].queries.start, blocks[-1].queries.stop
        keys = [block.keys for block in blocks]
        return cls(slice(first, last), slice(min(k.start for k in keys), max(k.stop for k in keys)))

    @property
    def products(self) -> int:
        """How many pairs of a query and a key are multiplied."""
        return (self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start)


def query_blocks(first_seen: Sequence[int], stem_tokens: int) -> tuple[QueryBlock, ...]:
    """Deal the queries of a row over blocks that leave out the keys before their trees and behind themselves.

    first_seen [T]: the first token of the row that a token sees. Blocks depend on nothing else, so that a
    row's attention is the same in any company; all sizes are multiples of ROW_MULTIPLE.
    """
    tokens = len(first_seen)
    groups: list[list[QueryBlock]] = []
    for start in range(0, _round_up(tokens), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, _round_up(tokens))
        # All see the stem, which stands before the first key of the row.
        first = 0 if stem_tokens else min(first_seen[start:stop]) // ROW_MULTIPLE * ROW_MULTIPLE
        last = _round_up(stem_tokens + min(stop, tokens))
        block = QueryBlock(slice(start, stop), slice(first, last))
        together = [*groups[-1], block] if groups else [block]
        apart = sum(member.products for member in together)
        if groups and apart >= (1 - SPARED_SHARE) * QueryBlock.spanning(together).products:
            groups[-1] = together
        else:
            groups.append([block])
    return tuple(QueryBlock.spanning(group) for group in groups)


@dataclass(frozen=True, eq=False)
class RowMask:
    """What the tokens of a row see of it and of its stem, and how deep each stands in its tree.

    seen: additive, 0 and -inf, [Q, K]: T and P + T, filled up to multiples of ROW_MULTIPLE. positions [T],
    key_positions [P + T]: a token's depth, which is its position; deepest: the largest of them. blocks: the
    queries in order, each with the keys that it is multiplied with.
    """

    seen: Tensor
    positions: Tensor
    key_positions: Tensor
    deepest: int
    blocks: tuple[QueryBlock, ...]

    @classmethod
    def of(cls, ends: Tensor, positions: Tensor, deepest: int, stem_tokens: int = 0) -> "RowMask":
        """Return the mask of a row from its subtree ends and positions, [T] each (see rows.Row).

        A token sees its stem's P tokens, its ancestors and itself; nothing sees the filling.
        """
        tokens, device = len(ends), ends.device
        indices = torch.arange(tokens, device=device)
        seen = (indices[None, :] <= indices[:, None]) & (indices[:, None] < ends[None, :])
        size = _round_up(tokens), _round_up(stem_tokens + tokens)
        mask = torch.full(size, float("-inf"), device=device)
        # The queries that fill up are read by nobody; they see something, so that their softmax is a number.
        mask[tokens:] = 0
        mask[:tokens, :stem_tokens] = 0
        mask[:tokens, stem_tokens : stem_tokens + tokens].masked_fill_(seen, 0)
        stem_positions = torch.arange(stem_tokens, device=device)
        if mask.is_cuda or not tokens:
            # On a card one large call costs less than many small ones.
            blocks: tuple[QueryBlock, ...] = (QueryBlock(slice(0, size[0]), slice(0, size[1])),)
        else:
            blocks = query_blocks(seen.byte().argmax(1).tolist(), stem_tokens)
        return cls(mask, positions, torch.cat([stem_positions, positions]), deepest, blocks)

    def within(self, window: int | None) -> Tensor:
        """Return what is seen through a sliding window of so many tokens, itself included, [Q, K]."""
        if not window or self.deepest < window:
            return self.seen
        mask = self.seen.clone()
        far = self.positions[:, None] - self.key_positions[None, :] >= window
        mask[: len(self.positions), : len(self.key_positions)].masked_fill_(far, float("-inf"))
        return mask


def whole_row(tokens: int, device: torch.device | None = None) -> "Segment":
    """Return the segment of one plain row, in which every token sees all before it."""
    positions = torch.arange(tokens, device=device)
    return Segment(1, RowMask.of(torch.full_like(positions, tokens), positions, tokens - 1))


def _round_up(tokens: int) -> int:
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True, eq=False)
class Segment:
    """One row's part of a micro-batch: `variants` times its tokens, all seen through one mask.

    stem_keys, stem_values: [V, G, P, d], what the row's stem put there under the same masks; None without a
    stem. `shares_stem`: [1, G, P, d] instead, the same for all variants, which are then short.
    """

    variants: int
    mask: RowMask
    stem_keys: Tensor | None = None
    stem_values: Tensor | None = None
    shares_stem: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return len(self.mask.positions)

    @property
    def size(self) -> int:
        """Tokens it takes in the micro-batch."""
        return self.variants * self.tokens


@dataclass(frozen=True)
class AttentionForm:
    """How products of queries and keys become attention, apart from the row's mask.

    softcap: c · tanh(product / c) instead of the product; window: tokens that are seen, the own one included;
    key_bias: from positions of keys [K] to what is added by head, [H, K].
    """

    softcap: float | None = None
    window: int | None = None
    key_bias: KeyBias | None = None

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> "AttentionForm":
        """Take what makes up a form out of an attention function's arguments."""
        return cls(*(arguments.pop(name, None) for name in ("softcap", "sliding_window", "key_bias")))

    def of_plain_row(self, products: Tensor, first_query: int) -> Tensor:
        """Return the logits of a plain row's attention, [H, Q, K], from products with its first K keys.

        Query q is token `first_query` + q; what is not seen is -inf.
        """
        if self.softcap is not None:
            products = products.div_(self.softcap).tanh_().mul_(self.softcap)
        queries, keys = products.shape[1:]
        positions = torch.arange(keys, device=products.device)
        if self.key_bias is not None:
            products = products + self.key_bias(positions)[:, None]
        behind = torch.arange(first_query, first_query + queries, device=products.device)[:, None] - positions
        unseen = behind < 0 if not self.window else (behind < 0) | (behind >= self.window)
        return products.masked_fill_(unseen, float("-inf"))


class RowAttention:
    """Passed where a layer passes its attention mask: the rows' segments, and where their states are left.

    queries [1, H, N, d], scaled, unless they were not asked for; keys, values [1, G, N, d].
    """

    def __init__(self, segments: Sequence[Segment], with_queries: bool) -> None:
        self.segments = segments
        self.with_queries = with_queries
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.form = AttentionForm()


# Arguments of attention functions that change nothing here, and why.
HARMLESS_ARGUMENTS = {
    "position_ids": "positions are in the queries and keys, or in the residual, before attention is called",
    "cache_position": "no keys are cached between calls",
    "use_cache": "no keys are cached between calls",
    "output_attentions": "the weights are given as None, which a layer hands through unread",
    "is_causal": "the mask of each row says what its tokens see",
}


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise NotImplementedError naming an argument that means something and that is not handled."""
    for name, value in arguments.items():
        if value is None or name in HARMLESS_ARGUMENTS or (name == "dropout" and not value):
            continue
        raise NotImplementedError(
            f"attention argument '{name}' = {value!r:.80}: this layer asks for what is not implemented; "
            f"implement it in {__name__}, or list it among its harmless arguments with the reason"
        )


def attend_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowAttention,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend within every row of a micro-batch: query [1, H, N, d], key, value [1, G, N, d] to [1, N, H, d].

    What a row gets does not depend on the other segments: torch's attention is called on its tokens alone.
    `arguments`: those that transformers' layers pass, `scaling` among them, and our own `key_bias`.
    """
    scaling: float = arguments.pop("scaling")
    row_attention = attention_mask
    row_attention.form = AttentionForm.taken_from(arguments)
    _refuse_unknown(arguments)
    row_attention.keys, row_attention.values = key[0], value[0]
    if row_attention.with_queries:
        row_attention.queries = query[0] * scaling
    outputs = []
    start = 0
    for segment in row_attention.segments:
        part = slice(start, start + segment.size)
        q, k, v = (
            states[0, :, part].unflatten(1, (segment.variants, segment.tokens)).transpose(0, 1)
            for states in (query, key, value)
        )
        attend = _attend_branches if segment.shares_stem else _attend
        z = attend(segment, (q, k, v), scaling, row_attention.form)
        outputs.append(z[:, : segment.tokens].flatten(0, 1))
        start += segment.size
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


AttentionInterface.register(ATTENTION, attend_by_row)


def _attend(
    segment: Segment, states: tuple[Tensor, Tensor, Tensor], scaling: float, form: AttentionForm
) -> Tensor:
    """Return the output of one segment, filled up, [V, Q, H, d], from its states [V, H or G, T, d]."""
    q, k, v = states
    mask = segment.mask.within(form.window)
    queries, keys = mask.shape
    n_heads = q.shape[1]
    filled_q = _filled_up(None, q, queries)
    filled_k = _by_query_head(_filled_up(segment.stem_keys, k, keys), n_heads)
    filled_v = _by_query_head(_filled_up(segment.stem_values, v, keys), n_heads)
    if form.key_bias is not None:
        bias = form.key_bias(segment.mask.key_positions)
        mask = mask + pad(bias, (0, keys - bias.shape[1]))[:, None]
    outputs = []
    for block in segment.mask.blocks:
        of_keys = filled_k[:, :, block.keys], filled_v[:, :, block.keys]
        z = _attend_block(
            filled_q[:, :, block.queries],
            *of_keys,
            mask[..., block.queries, block.keys],
            scaling,
            form.softcap,
        )
        outputs.append(z.transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _attend_branches(
    segment: Segment, states: tuple[Tensor, Tensor, Tensor], scaling: float, form: AttentionForm
) -> Tensor:
    """Return the same of variants that share a stem, [V, T, H, d]."""
    assert segment.stem_keys is not None
    assert segment.stem_values is not None
    seen = segment.mask.within(form.window)[: segment.tokens, : len(segment.mask.key_positions)]
    if form.key_bias is not None:
        seen = seen + form.key_bias(segment.mask.key_positions)[:, None]
    return attend_branches(
        states, (segment.stem_keys[0], segment.stem_values[0]), seen, (scaling, form.softcap)
    )


def _attend_block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """Return the output of queries [V, H, Q, d] that see keys and values [V, H, K, d] through a mask."""
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    products = q @ k.transpose(2, 3) * (scaling / softcap)
    return (products.tanh() * softcap + mask).softmax(-1) @ v


def _by_query_head(states: Tensor, n_heads: int) -> Tensor:
    """Return keys or values [V, G, K, d] for every query head, [V, H, K, d]."""
    groups = states.shape[1]
    return states if groups == n_heads else states.repeat_interleave(n_heads // groups, 1)


def _filled_up(stem_states: Tensor | None, states: Tensor, length: int) -> Tensor:
    """Return the stem's states, a row's [V, H, T, d] and zeros, `length` together, in one copy."""
    parts = [states] if stem_states is None else [stem_states, states]
    if missing := length - sum(part.shape[2] for part in parts):
        variants, heads, _, head_width = states.shape
        parts.append(states.new_zeros(1).expand(variants, heads, missing, head_width))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
