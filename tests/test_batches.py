"""Micro-batches and groups: every variant and row once, none split, bounded."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_engine import random_rows

from lowmem_icl.engine.micro_batches import MICRO_BATCH_TOKENS, Piece, micro_batches, row_groups
from lowmem_icl.rows import with_stems

blocks = st.lists(
    st.tuples(
        st.integers(1, 1400), st.sets(st.integers(0, 30)).map(lambda slots: np.array(sorted(slots), int))
    ),
    max_size=12,
)


@given(block=blocks)
def test_every_variant_goes_once_in_order_and_batches_are_bounded(
    block: list[tuple[int, np.ndarray]],
) -> None:
    lengths = [length for length, _ in block]
    work = [(place, slots) for place, (_, slots) in enumerate(block)]
    batches = list(micro_batches(work, lengths, MICRO_BATCH_TOKENS))
    seen = [(piece.index, slot) for batch in batches for piece in batch for slot in piece.slots]
    assert seen == [(place, slot) for place, slots in work for slot in slots]
    for batch in batches:
        tokens = sum(lengths[piece.index] * len(piece.slots) for piece in batch)
        assert tokens <= MICRO_BATCH_TOKENS or (len(batch) == 1 and len(batch[0].slots) == 1)


def test_slots_side_by_side_are_taken_as_a_slice_and_others_as_they_are() -> None:
    values = np.arange(10)
    for slots, kind in (([3, 4, 5], slice), ([3, 5], np.ndarray), ([7], slice)):
        index = Piece(0, np.array(slots)).selection
        assert isinstance(index, kind)
        assert values[index].tolist() == slots


@given(seed=st.integers(0, 20), shared=st.sampled_from([0, 40]), most=st.integers(1, 400))
def test_groups_hold_every_row_once_and_stems_with_theirs(seed: int, shared: int, most: int) -> None:
    rows = with_stems([*random_rows(seed, shared), *random_rows(seed + 1, 0)])
    groups = row_groups(rows, most)
    seen = [index for group in groups for index in group.members]
    stems = [group.stem for group in groups if group.stem is not None]
    assert sorted(seen + stems) == list(range(len(rows)))
    for group in groups:
        stem = None if group.stem is None else rows[group.stem]
        assert all(rows[index].stem is stem for index in group.members)
        if stem is None:
            assert len(group.members) == 1 or sum(len(rows[index]) for index in group.members) <= most
