"""Packed rows: every path is found again, nothing sees what it must not, and packing is exact about truncation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_icl.errors import InputError
from lowmem_icl.rows import Row
from lowmem_icl.tasks.loading import Document, TaskRows
from lowmem_icl.tasks.packing import PackingLimits, pack

LIMITS = PackingLimits(context_tokens=12, row_tokens=16, empty_context=2)


def characters(texts: list[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


def task_of(documents: list[list[tuple[str, str]]]) -> TaskRows:
    made = [
        Document(
            index, tuple(options), (True,) + (False,) * (len(options) - 1), str(index), (), str(index), 0, {}
        )
        for index, options in enumerate(documents)
    ]
    return TaskRows("made", 0, "validation", tuple(made), "acc", ())


def paths_read(row: Row) -> dict[int, list[list[int]]]:
    """For every answer of every option: the tokens seen at the place it is read, in order."""
    seen: dict[int, list[list[int]]] = {}
    for place, option in zip(row.read_at, row.options, strict=True):
        ancestors = [j for j in range(len(row)) if j <= place < row.ends[j]]
        assert [row.positions[j] for j in ancestors] == list(range(len(ancestors))), "positions are depths"
        seen.setdefault(int(option), []).append([int(row.tokens[j]) for j in ancestors])
    return seen


texts = st.text("abc", min_size=0, max_size=10)
options = st.lists(st.tuples(texts, st.text("xyz", min_size=1, max_size=4)), min_size=1, max_size=4)


@settings(deadline=None)
@given(documents=st.lists(options, min_size=1, max_size=6), gold_only=st.booleans())
def test_every_answer_sees_its_own_path_and_nothing_else(
    documents: list[list[tuple[str, str]]], gold_only: bool
) -> None:
    packed = pack(task_of(documents), characters, LIMITS, gold_only=gold_only)
    seen: dict[int, list[list[int]]] = {}
    for row in packed.packed.rows:
        for option, paths in paths_read(row).items():
            assert option not in seen, "an option is read in one row"
            seen[option] = paths
    for document, listed in enumerate(documents):
        for place, (context, continuation) in enumerate(listed):
            number = int(packed.first_option[document]) + place
            if gold_only and place:
                assert number not in seen
                continue
            whole = [ord(c) for c in context] or [LIMITS.empty_context]
            whole = (whole + [ord(c) for c in continuation])[-LIMITS.context_tokens - 1 :][:-1]
            first = len(whole) - len(continuation)
            assert seen[number] == [whole[: first + 1 + step] for step in range(len(continuation))]


@given(documents=st.lists(options, min_size=1, max_size=6))
def test_gold_paths_share_nothing_between_documents(documents: list[list[tuple[str, str]]]) -> None:
    packed = pack(task_of(documents), characters, LIMITS, gold_only=True)
    for row in packed.packed.rows:
        for place in range(len(row)):
            ancestors = [j for j in range(len(row)) if j <= place < row.ends[j]]
            assert {int(row.owners[j]) for j in ancestors} == {int(row.owners[place])}


def test_options_share_their_context() -> None:
    packed = pack(task_of([[("abcdef", "xy"), ("abcdef", "xz"), ("abcdef", "zz")]]), characters, LIMITS)
    (row,) = packed.packed.rows
    # Six of the context, one x that two options share, one z of the third; last tokens are never read in.
    used = {j for place in row.read_at for j in range(place + 1) if place < row.ends[j]}
    assert len(used) == 8
    assert len(row) == 16, "filled up to a multiple of 16"


def test_too_long_a_context_loses_tokens_on_the_left() -> None:
    packed = pack(task_of([[("abcdefghijklmnop", "xyz")]]), characters, LIMITS)
    (option,) = packed.options
    assert "".join(map(chr, option.path)) == "ghijklmnopxy"
    assert (option.truncated, option.context_tokens) == (True, 10)


@pytest.mark.parametrize("continuation", ["", "x" * 13])
def test_an_option_without_tokens_or_too_long_for_the_context_is_refused(continuation: str) -> None:
    with pytest.raises(InputError, match=r"document 0: an option has \d+ tokens; expected 1 to 12"):
        pack(task_of([[("abc", continuation)]]), characters, LIMITS)


def test_bos_is_put_before_every_context() -> None:
    limits = PackingLimits(context_tokens=12, row_tokens=16, empty_context=2, bos=2)
    packed = pack(task_of([[("ab", "x")], [("", "x")]]), characters, limits)
    assert [option.path for option in packed.options] == [(2, 97, 98), (2,)]


def test_packing_depends_on_the_documents_alone() -> None:
    documents = [[("abc", "x"), ("abc", "y")], [("abd", "x")], [("bbb", "xyz")]]
    first, second = (pack(task_of(documents), characters, LIMITS).packed.rows for _ in range(2))
    assert [row.digest for row in first] == [row.digest for row in second]
    assert np.unique([row.digest for row in first]).size == len(first)
