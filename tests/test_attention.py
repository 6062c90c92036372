"""Attention in blocks of queries: every key that is seen, few others, and the numbers of the whole mask."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import random_rows
from torch.nn.functional import scaled_dot_product_attention

from lowmem_icl.model.attention import ROW_MULTIPLE, RowAttention, RowMask, Segment, attend_by_row
from lowmem_icl.rows import with_stems


def masks(seed: int, shared: int) -> list[RowMask]:
    return [
        RowMask.of(
            torch.from_numpy(row.ends),
            torch.from_numpy(row.positions),
            int(row.positions.max(initial=0)),
            0 if row.stem is None else len(row.stem),
        )
        for row in with_stems(random_rows(seed, shared))
    ]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500), shared=st.sampled_from([0, 17, 300]))
def test_blocks_hold_every_query_once_and_every_key_that_is_seen(seed: int, shared: int) -> None:
    for mask in masks(seed, shared):
        covered = torch.zeros_like(mask.seen, dtype=torch.int64)
        for block in mask.blocks:
            covered[block.queries, block.keys] += 1
            for part in (block.queries, block.keys):
                assert part.start % ROW_MULTIPLE == part.stop % ROW_MULTIPLE == 0
        assert covered.max() == 1
        assert covered.any(1).all()
        tokens = len(mask.positions)
        assert (covered[:tokens] >= (mask.seen[:tokens] == 0)).all()


def test_a_plain_rows_blocks_leave_out_the_keys_behind_them() -> None:
    tokens = 512
    positions = torch.arange(tokens)
    mask = RowMask.of(torch.full_like(positions, tokens), positions, tokens - 1)
    assert sum(block.products for block in mask.blocks) < 0.6 * tokens**2
    of_stem = RowMask.of(torch.full((64,), 64), torch.arange(600, 664), 663, 600)
    assert len(of_stem.blocks) == 1, "what hardly spares anything is not cut up"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 500), shared=st.sampled_from([0, 17]), variants=st.integers(1, 3))
def test_blocks_give_the_attention_of_the_whole_mask(seed: int, shared: int, variants: int) -> None:
    torch.manual_seed(seed)
    heads, width = 3, 16
    for mask in masks(seed, shared):
        tokens, stem = len(mask.positions), len(mask.key_positions) - len(mask.positions)
        q, k, v = torch.randn(3, variants, heads, stem + tokens, width)
        query, key, value = (states[:, :, stem:].transpose(0, 1).flatten(1, 2)[None] for states in (q, k, v))
        segment = Segment(variants, mask)
        if stem:
            segment = replace(segment, stem_keys=k[:, :, :stem], stem_values=v[:, :, :stem])
        attention = RowAttention([segment], False)
        found, _ = attend_by_row(torch.nn.Identity(), query, key, value, attention, scaling=0.3)
        seen = mask.seen[:tokens, : stem + tokens]
        expected = scaled_dot_product_attention(q[:, :, stem:], k, v, attn_mask=seen, scale=0.3)
        torch.testing.assert_close(found[0], expected.transpose(1, 2).flatten(0, 1), atol=1e-5, rtol=1e-5)
