"""Pairs of prompts: what corruptions change, which documents make pairs, and files of prompts."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.protocols import CORRECTED, CORRUPTIONS, Corruption
from lowmem_icl.tasks.demonstrations import PER_DOCUMENT, Demonstrations
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.label_controls import NoLabelControl, with_other_labels
from lowmem_icl.tasks.loading import OpenTask, open_task
from lowmem_icl.tasks.packing import PackingLimits, pack
from lowmem_icl.tasks.prompt_pairs.corruptions import corrupted, wrong_answers
from lowmem_icl.tasks.prompt_pairs.made import NoPromptPairs, pairs_of
from lowmem_icl.tasks.prompt_table import PromptTable, TablePrompter, TableWriter
from lowmem_icl.tasks.prompting import DIRECT_PROMPTER

BOS, VOCABULARY = 256, 300
LIMITS = PackingLimits(context_tokens=4000, row_tokens=128, empty_context=0, bos=BOS)


def by_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@dataclass(frozen=True)
class Corrupted:
    """Documents of a task as they are and corrupted, prompted by the same writer."""

    task: OpenTask
    clean: TaskRows
    changed: TaskRows


def corrupt(
    task: OpenTask,
    corruption: Corruption,
    *,
    limit: int | None = 8,
    shots: int = 4,
    demonstrations: Demonstrations = PER_DOCUMENT,
) -> Corrupted:
    writer = TableWriter(by_bytes, LIMITS)
    rows = task.rows(shots=shots, part="train", limit=limit, demonstrations=demonstrations, prompter=writer)
    return Corrupted(task, rows, corrupted(task, rows, corruption, CORRECTED, writer, "train"))


def shown_lines(context: str) -> list[tuple[str, str]]:
    """Questions and answers of a prompt of `own_task`, the query without an answer."""
    return [(line[:9], line[9:]) for line in context.split("\n\n")]


def own_task(folder: Path, options: Callable[[int], list[str]], gold: Callable[[int], int]) -> OpenTask:
    lines = [
        {"context": f"ask {number:03d}: ", "options": options(number), "gold": gold(number)}
        for number in range(40)
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return open_task(str(folder / "own.jsonl"), None)


def mostly_yes(folder: Path) -> OpenTask:
    return own_task(folder, lambda _: ["yes", "no"], lambda number: int(number % 8 == 0))


# --- What corruptions show. ---


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), st.integers(0, 999))
def test_wrong_answers_are_never_of_the_same_text(texts: list[str], seed: int) -> None:
    shown = list(range(len(texts)))
    # Rows besides the demonstrations: one of every text.
    text_of = [*texts, *"abcdef"].__getitem__
    rng = random.Random(seed)
    others = iter([rng.randrange(len(texts), len(texts) + 6) for _ in range(10_000)])
    answers = wrong_answers(shown, others, text_of, rng)
    assert all(text_of(own) != text_of(other) for own, other in zip(shown, answers, strict=True))
    can_be_reordered = 2 * max(Counter(texts).values()) <= len(texts)
    assert (sorted(answers) == shown) == can_be_reordered, "the same answers wherever that is possible"


def test_wrong_answers_are_drawn_from_many_orders() -> None:
    drawn = {wrong_answers((1, 2, 3, 4), iter(()), "-abcd".__getitem__, random.Random(s)) for s in range(999)}
    assert len(drawn) == 9, "all orders that leave nothing in its place"


@pytest.mark.parametrize("how", [PER_DOCUMENT, Demonstrations("shared", 3)], ids=lambda how: how.mode)
def test_demonstrations_of_few_labels_show_the_other_one(tmp_path: Path, how: Demonstrations) -> None:
    found = corrupt(mostly_yes(tmp_path), "wrong", demonstrations=how)
    swapped = {"yes": "no", "no": "yes", "": ""}
    for clean, changed in zip(found.clean.documents, found.changed.documents, strict=True):
        expected = [(ask, swapped[answer]) for ask, answer in shown_lines(clean.options[0][0])]
        assert shown_lines(changed.options[0][0]) == expected
        assert [text for _, text in changed.options] == [text for _, text in clean.options]
    assert found.changed.labels == "wrong"


def test_wrong_answers_keep_their_number_of_tokens_where_an_order_does(tmp_path: Path) -> None:
    task = own_task(tmp_path, lambda number: [f"{'x' * (number % 5)}{number}", "no"], lambda _: 0)
    found = corrupt(task, "wrong")
    for clean, changed in zip(found.clean.documents, found.changed.documents, strict=True):
        left, right = shown_lines(clean.options[0][0]), shown_lines(changed.options[0][0])
        assert sorted(answer for _, answer in left) == sorted(answer for _, answer in right)
        assert all(own != other for (_, own), (_, other) in zip(left[:-1], right[:-1], strict=True))
        assert len(clean.options[0][0]) == len(changed.options[0][0])


def test_other_queries_stand_after_the_same_demonstrations(tmp_path: Path) -> None:
    task = own_task(tmp_path, lambda number: [str(number), "no"], lambda _: 0)
    found = corrupt(task, "queries")
    for clean, changed in zip(found.clean.documents, found.changed.documents, strict=True):
        left, right = shown_lines(clean.options[0][0]), shown_lines(changed.options[0][0])
        assert left[:-1] == right[:-1]
        assert right[-1] not in left, "neither the query nor a demonstration"
        assert [text for _, text in changed.options] == [text for _, text in clean.options]
        assert changed.gold == clean.gold


def test_a_query_as_long_as_the_own_one_is_preferred(tmp_path: Path) -> None:
    lines = [{"context": "q" * (1 + number % 3) + str(number + 10), "options": ["a", "b"], "gold": 0}
             for number in range(40)]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = corrupt(open_task(str(tmp_path / "own.jsonl"), None), "queries")
    for clean, changed in zip(found.clean.documents, found.changed.documents, strict=True):
        assert len(clean.options[0][0]) == len(changed.options[0][0])
        assert clean.options[0][0] != changed.options[0][0]


def test_shuffled_prompts_are_those_of_the_control() -> None:
    task = open_task("recall", None)
    found = corrupt(task, "shuffled")
    control = with_other_labels(task, found.clean, "shuffled", CORRECTED, DIRECT_PROMPTER, "train")
    assert found.changed == control


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("how", [PER_DOCUMENT, Demonstrations("shared", 3)], ids=lambda how: how.mode)
def test_corruptions_depend_on_neither_the_limit_nor_other_documents(
    tmp_path: Path, corruption: Corruption, how: Demonstrations
) -> None:
    task = mostly_yes(tmp_path)
    every, some = (
        {document.index: list(document.options) for document in found.changed.documents}
        for found in (corrupt(task, corruption, limit=limit, demonstrations=how) for limit in (None, 4))
    )
    assert len(some) == 4
    assert some.items() <= every.items()


def test_what_has_nothing_else_to_show_says_so(tmp_path: Path) -> None:
    task = own_task(tmp_path, lambda _: ["yes", "no"], lambda _: 0)
    with pytest.raises(NoLabelControl, match="another answer than 'yes'"):
        corrupt(task, "wrong")
    with pytest.raises(NoLabelControl, match="no demonstrations"):
        corrupt(task, "wrong", shots=0)


@pytest.mark.parametrize("how", [PER_DOCUMENT, Demonstrations("shared", 3)], ids=lambda how: how.mode)
def test_a_document_with_nothing_else_to_show_alone_has_no_pair(tmp_path: Path, how: Demonstrations) -> None:
    # One row has another answer than all others. Its own prompt cannot show it, nor be corrupted.
    task = own_task(tmp_path, lambda _: ["yes", "no"], lambda number: int(number == 7))
    found = corrupt(task, "wrong", limit=None, demonstrations=how)
    alone = [
        clean.index
        for clean, changed in zip(found.clean.documents, found.changed.documents, strict=True)
        if list(clean.options) == list(changed.options)
    ]
    (odd,) = (document.index for document in found.clean.documents if document.gold[1])
    assert alone == [odd]
    made = pairs_of(pack(found.clean, by_bytes, LIMITS), pack(found.changed, by_bytes, LIMITS))
    assert (len(made.pairs), made.equal) == (len(found.clean.documents) - 1, 1)


def test_a_document_with_no_other_query_alone_has_no_pair(tmp_path: Path) -> None:
    def asking(text_of: Callable[[int], str]) -> OpenTask:
        lines = [{"context": text_of(number), "options": ["a", "b"], "gold": 0} for number in range(40)]
        (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return open_task(str(tmp_path / "own.jsonl"), None)

    # One row asks something else. What shows it already cannot ask it.
    found = corrupt(asking(lambda number: "odd" if number == 7 else "all"), "queries", limit=None)
    documents = zip(found.clean.documents, found.changed.documents, strict=True)
    keeps = [(list(clean.options) == list(changed.options), clean) for clean, changed in documents]
    assert {kept for kept, _ in keeps} == {True, False}
    for kept, document in keeps:
        assert kept == ("odd" in document.options[0][0].rpartition("\n\n")[0])
    with pytest.raises(NoLabelControl, match="no row of other text"):
        corrupt(asking(lambda _: "all"), "queries")


@pytest.mark.parametrize("name", ["boolq", "wsc", "multirc", "record", "copa"])
@pytest.mark.parametrize("corruption", ["wrong", "queries"])
def test_real_tasks_are_corrupted_and_a_table_finds_the_same(
    shared_data: Path, name: str, corruption: Corruption
) -> None:
    task = open_task(name, shared_data)
    writer = TableWriter(by_bytes, LIMITS)
    rows = task.rows(shots=3, part="train", limit=3, prompter=writer)
    changed = corrupted(task, rows, corruption, CORRECTED, writer, "train")
    found = corrupted(
        task, rows, corruption, CORRECTED, TablePrompter(PromptTable(writer.arrays()), LIMITS), "train"
    )
    for clean, left, right in zip(rows.documents, changed.documents, found.documents, strict=True):
        assert list(left.options) == list(right.options)
        assert left.options[0][0] != clean.options[0][0]


@pytest.mark.parametrize("name", ["boolq", "wsc", "multirc"])
def test_wrong_verdicts_are_the_other_ones(shared_data: Path, name: str) -> None:
    found = corrupt(open_task(name, shared_data), "wrong", shots=3, limit=6)

    def verdicts(context: str) -> list[str]:
        return re.findall(r"(?:\nAnswer:|\nIs the answer correct\?) (yes|no)\n", context)

    for clean, changed in zip(found.clean.documents, found.changed.documents, strict=True):
        left, right = (verdicts(document.options[0][0]) for document in (clean, changed))
        assert len(left) == len(right) == 3
        assert all(own != other for own, other in zip(left, right, strict=True))


def test_no_query_of_the_same_passage_is_asked(shared_data: Path) -> None:
    found = corrupt(open_task("multirc", shared_data), "queries", shots=1, limit=4)
    for clean, changed in zip(found.clean.documents, found.changed.documents, strict=True):
        own, asked = (document.options[0][0].rsplit("\n\n", 1)[1] for document in (clean, changed))
        assert own.startswith(clean.row["paragraph"])
        assert not asked.startswith(clean.row["paragraph"])


def test_documents_of_a_set_show_the_same_wrong_answers(tmp_path: Path) -> None:
    task = own_task(tmp_path, lambda number: [f"{number}", "no"], lambda _: 0)
    found = corrupt(task, "wrong", demonstrations=Demonstrations("shared", 3), limit=None)
    shown: dict[tuple[int, ...], set[str]] = {}
    for document in found.changed.documents:
        before = document.options[0][0].rpartition("\n\n")[0]
        shown.setdefault(document.demonstrations, set()).add(before)
    assert len(shown) < len(found.changed.documents)
    assert all(len(texts) == 1 for texts in shown.values())


def test_answers_in_the_context_make_no_pairs(shared_data: Path) -> None:
    task = open_task("winogrande", shared_data)
    rows = task.rows(shots=2, part="train", limit=2)
    with pytest.raises(NoLabelControl, match="answers stand in the context"):
        corrupted(task, rows, "shuffled", CORRECTED, TableWriter(by_bytes, LIMITS), "train")
    clean = pack(rows, by_bytes, LIMITS)
    control = with_other_labels(task, rows, "shuffled", CORRECTED, DIRECT_PROMPTER, "train")
    with pytest.raises(NoPromptPairs, match="prompt per option"):
        pairs_of(clean, pack(control, by_bytes, LIMITS))


# --- Pairs of documents. ---


def test_pairs_are_the_documents_prompts_as_tokens(tmp_path: Path) -> None:
    found = corrupt(mostly_yes(tmp_path), "wrong")
    made = pairs_of(pack(found.clean, by_bytes, LIMITS), pack(found.changed, by_bytes, LIMITS))
    assert (len(made.pairs), made.equal, made.truncated) == (8, 0, 0)
    documents = zip(made.pairs, found.clean.documents, found.changed.documents, strict=True)
    for pair, clean, changed in documents:
        assert bytes(pair.clean[1:]).decode() == clean.options[0][0]
        assert bytes(pair.corrupted[1:]).decode() == changed.options[0][0]
        assert pair.clean[0] == pair.corrupted[0] == BOS
        assert [bytes(option).decode() for option in pair.options] == [text for _, text in clean.options]
        assert (pair.document, pair.gold) == (clean.index, clean.gold)
        assert pair.is_aligned == (len(clean.options[0][0]) == len(changed.options[0][0]))
    assert made.aligned == tuple(pair for pair in made.pairs if pair.is_aligned)


def test_equal_and_truncated_prompts_are_counted_and_left_out(tmp_path: Path) -> None:
    found = corrupt(mostly_yes(tmp_path), "shuffled", shots=2, limit=None)
    clean, changed = (pack(rows, by_bytes, LIMITS) for rows in (found.clean, found.changed))
    made = pairs_of(clean, changed)
    documents = zip(found.clean.documents, found.changed.documents, strict=True)
    equal = sum(list(left.options) == list(right.options) for left, right in documents)
    assert made.equal == equal > 0 < len(made.pairs)
    assert len(made.pairs) + equal == len(found.clean.documents)
    short = PackingLimits(context_tokens=33, row_tokens=128, empty_context=0, bos=BOS)
    cut = pairs_of(pack(found.clean, by_bytes, short), pack(found.changed, by_bytes, short))
    assert (cut.pairs, cut.truncated) == ((), len(found.clean.documents))


def test_prompts_of_fewer_demonstrations_are_whole(tmp_path: Path) -> None:
    found = corrupt(mostly_yes(tmp_path), "wrong", demonstrations=Demonstrations("shared", 3))
    fewer = replace(
        found.clean, documents=tuple(replace(document, dropped=1) for document in found.clean.documents)
    )
    clean = pack(fewer, by_bytes, LIMITS)
    assert clean.options.truncated.all()
    made = pairs_of(clean, pack(found.changed, by_bytes, LIMITS))
    assert (len(made.pairs), made.truncated) == (8, 0)


# --- Files. ---
