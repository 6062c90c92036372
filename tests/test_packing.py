"""Packed rows: every path is found again, nothing sees what it must not,
and packing is exact about truncation.
"""

from dataclasses import replace

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


def task_of(documents: list[list[tuple[str, str]]], *, one_set: bool = False) -> TaskRows:
    made = [
        Document(
            index,
            tuple(options),
            (True,) + (False,) * (len(options) - 1),
            str(index),
            (1, 2) if one_set else (),
            str(index),
            0,
            {},
        )
        for index, options in enumerate(documents)
    ]
    return TaskRows("made", 0, "validation", tuple(made), "acc", ())


def paths_read(row: Row) -> dict[int, list[list[int]]]:
    """For every answer of every option: the tokens seen at the place it is read, in order."""
    seen: dict[int, list[list[int]]] = {}
    before = [] if row.stem is None else row.stem.tokens.tolist()
    for index, option in zip(row.read_at, row.options, strict=True):
        ancestors = [j for j in range(len(row)) if j <= index < row.ends[j]]
        depths = [len(before) + depth for depth in range(len(ancestors))]
        assert [row.positions[j] for j in ancestors] == depths, "positions are depths"
        seen.setdefault(int(option), []).append(before + [int(row.tokens[j]) for j in ancestors])
    return seen


texts = st.text("abc", min_size=0, max_size=10)
options = st.lists(st.tuples(texts, st.text("xyz", min_size=1, max_size=4)), min_size=1, max_size=4)


@settings(deadline=None)
@given(
    documents=st.lists(options, min_size=1, max_size=6),
    gold_only=st.booleans(),
    shared=st.sampled_from(["", "s" * 8, "s" * 30]),
    row_tokens=st.sampled_from([16, 40]),
)
def test_every_answer_sees_its_own_path_and_nothing_else(
    documents: list[list[tuple[str, str]]], gold_only: bool, shared: str, row_tokens: int
) -> None:
    documents = [[(shared + context, target) for context, target in listed] for listed in documents]
    limits = PackingLimits(context_tokens=40 if shared else 12, row_tokens=row_tokens, empty_context=2)
    packed = pack(task_of(documents, one_set=bool(shared)), characters, limits, gold_only=gold_only)
    seen: dict[int, list[list[int]]] = {}
    for row in packed.packed.rows:
        for option, paths in paths_read(row).items():
            assert option not in seen, "an option is read in one row"
            seen[option] = paths
    for document, listed in enumerate(documents):
        for index, (context, continuation) in enumerate(listed):
            number = int(packed.first_option[document]) + index
            if gold_only and index:
                assert number not in seen
                continue
            whole = [ord(c) for c in context] or [limits.empty_context]
            whole = (whole + [ord(c) for c in continuation])[-limits.context_tokens - 1 :][:-1]
            first = len(whole) - len(continuation)
            assert seen[number] == [whole[: first + 1 + step] for step in range(len(continuation))]


@given(documents=st.lists(options, min_size=1, max_size=6))
def test_gold_paths_share_nothing_between_documents(documents: list[list[tuple[str, str]]]) -> None:
    packed = pack(task_of(documents), characters, LIMITS, gold_only=True)
    for row in packed.packed.rows:
        for index in range(len(row)):
            ancestors = [j for j in range(len(row)) if j <= index < row.ends[j]]
            assert {int(row.owners[j]) for j in ancestors} == {int(row.owners[index])}


def test_options_share_their_context() -> None:
    packed = pack(task_of([[("abcdef", "xy"), ("abcdef", "xz"), ("abcdef", "zz")]]), characters, LIMITS)
    (row,) = packed.packed.rows
    # Six of the context, one x that two options share, one z of the third; last tokens are never read in.
    assert len(row) == 8


def test_documents_with_one_set_of_demonstrations_grow_from_a_stem() -> None:
    limits = PackingLimits(context_tokens=60, row_tokens=12, empty_context=2)
    shared = "demonstrations, shared"
    documents = [
        [(f"{shared} {word}", "x"), (f"{shared} {word}", "yz")] for word in ("dax", "wug", "blicket")
    ]
    packed = pack(task_of(documents, one_set=True), characters, limits).packed
    stems = {row.stem for row in packed.rows if row.stem is not None}
    assert all(row.stem is not None for row in packed.rows)
    assert len(stems) == 1
    assert "".join(map(chr, stems.pop().tokens)) == f"{shared} "
    assert len(packed.rows) == 2, "two short documents share a row"
    assert packed.token_count == len(shared) + 1 + len("daxy") + len("wugy") + len("blickety")
    alone = pack(task_of(documents), characters, limits).packed
    assert all(row.stem is None for row in alone.rows)


def test_no_answer_is_read_in_a_stem() -> None:
    """Documents that are one and the same text share all of it but the place where the answer is read."""
    limits = PackingLimits(context_tokens=60, row_tokens=8, empty_context=2)
    text = "a passage and its question"
    packed = pack(task_of([[(text, "x")], [(text, "y")], [(text, "z")]], one_set=True), characters, limits)
    rows = packed.packed.rows
    assert all(len(row.stem or ()) == len(text) - 1 for row in rows)
    assert sum(len(row.read_at) for row in rows) == 3


def test_documents_on_one_passage_grow_from_a_stem_without_demonstrations() -> None:
    limits = PackingLimits(context_tokens=60, row_tokens=20, empty_context=2)
    task = task_of(
        [[("a long passage of text. one?", "x")], [("short", "y")], [("a long passage of text. two?", "z")]]
    )
    on_passages = replace(
        task, documents=tuple(replace(d, cluster=c) for d, c in zip(task.documents, "PQP", strict=True))
    )
    rows = pack(on_passages, characters, limits).packed.rows
    assert [len(row.stem) if row.stem else 0 for row in rows] == [len("a long passage of text. "), 0]


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
