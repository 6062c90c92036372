"""Micro-batches: every variant once, none split, nothing lost on the way."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.engine.batches import MICRO_BATCH_TOKENS, Piece, gather, join, micro_batches, scatter

blocks = st.lists(st.tuples(st.integers(1, 90).map(lambda n: 16 * n), st.integers(0, 20)), max_size=12)


@given(block=blocks)
def test_every_variant_goes_once_in_order_and_batches_are_bounded(block: list[tuple[int, int]]) -> None:
    lengths, alive = [length for length, _ in block], [variants for _, variants in block]
    batches = list(micro_batches(lengths, alive))
    seen = [(p.place, v) for batch in batches for p in batch for v in range(p.first, p.stop)]
    assert seen == [(place, v) for place, variants in enumerate(alive) for v in range(variants)]
    for batch in batches:
        tokens = sum(lengths[p.place] * (p.stop - p.first) for p in batch)
        assert tokens <= MICRO_BATCH_TOKENS or (len(batch) == 1 and batch[0].stop == batch[0].first + 1)


@given(block=blocks.filter(bool), seed=st.integers(0, 9))
def test_scatter_undoes_gather(block: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    residuals = [torch.from_numpy(rng.normal(size=(variants, length // 16, 3))) for length, variants in block]
    doubled = [2 * residual for residual in residuals]
    for batch in micro_batches([length // 16 for length, _ in block], [variants for _, variants in block]):
        scatter(2 * gather(residuals, batch), residuals, batch)
    assert all(torch.equal(ours, expected) for ours, expected in zip(residuals, doubled, strict=True))


def test_what_is_kept_whole_counts_as_ones() -> None:
    pieces = [Piece(0, 0, 2), Piece(3, 1, 3)]
    cut = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    joined = join([None, cut], pieces)
    assert joined is not None
    assert joined.tolist() == [[1, 1], [1, 1], [1, 0], [0, 0]]
    assert join([None, None], pieces) is None
