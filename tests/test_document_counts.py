"""Limits that are fractions take what lm-eval takes of each task, and go with numbers as these do alone."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.evaluator_utils import get_sample_size

from lowmem_icl.options import RunOptions, run_options
from lowmem_icl.protocols import CORRECTED
from lowmem_icl.session.document_limits import part_limits
from lowmem_icl.tasks.document_counts import DocumentLimit, ceil_of, document_count, limit_words
from lowmem_icl.tasks.loading import OpenTask, open_task

COUNTS = st.lists(st.integers(0, 500), min_size=1, max_size=4)
NUMBER = st.integers(1, 600)
FRACTION = st.sampled_from([0.1, 0.07, 0.25, 0.5, 1 / 3, 0.999, 1e-9])


def shares(limit: DocumentLimit, counts: list[int]) -> list[int | None]:
    return limit.shares([partial(int, count) for count in counts])


def rows_file(folder: Path, count: int) -> Path:
    rows = [{"context": f"c{n}", "options": ["a", "b"], "gold": n % 2} for n in range(count)]
    path = folder / f"own-{count}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recall() -> OpenTask:
    return open_task("recall", None)


@pytest.mark.parametrize("limit", [0.5, 0.25, 0.001, 0.999])
def test_a_fraction_takes_as_many_documents_of_each_member_as_lm_eval_does(
    limit: float, recall: OpenTask
) -> None:
    assert len(recall.members) > 1
    documents = recall.rows(shots=0, part="evaluate", limit=limit).documents
    wanted = {member.number: get_sample_size(member.task, limit) for member in recall.members}
    assert Counter(document.member for document in documents) == wanted
    # The first of all: which ones does not depend on the limit's form.
    every = recall.rows(shots=0, part="evaluate", limit=None).documents
    for number, count in wanted.items():
        first = [document for document in every if document.member == number][:count]
        assert first == [document for document in documents if document.member == number]


def test_a_fraction_of_halves_is_of_each_half(tmp_path: Path) -> None:
    task = open_task(str(rows_file(tmp_path, 21)), None)
    assert len(task.rows(shots=0, part="evaluate", limit=0.5).documents) == 6
    assert len(task.rows(shots=0, part="train", limit=0.5).documents) == 5


def test_questions_with_several_answers_count_once(tmp_path: Path) -> None:
    folder = tmp_path / "multirc"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [
            {
                "paragraph": f"p{question}", "question": f"q{question}", "answer": f"a{answer}", "label": 1,
                "idx": {"paragraph": question, "question": question, "answer": answer},
            }
            for question in range(10)
            for answer in range(3)
        ]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = open_task("multirc", tmp_path)
    assert [document_count(member, "evaluate", CORRECTED) for member in task.members] == [10]
    documents = task.rows(shots=0, part="evaluate", limit=0.25).documents
    assert len(documents) == 9
    assert len({document.unit for document in documents}) == 3


@given(counts=COUNTS, number=NUMBER, most=st.none() | NUMBER, further=st.integers(0, 50))
def test_numbers_go_together_as_their_minimum_and_sum(
    counts: list[int], number: int, most: int | None, further: int
) -> None:
    bounded = shares(DocumentLimit(number, most), counts)
    assert bounded == shares(DocumentLimit(min(number, most or number)), counts)
    assert shares(DocumentLimit(number, further=further), counts) == shares(
        DocumentLimit(number + further), counts
    )
    assert sum(share or 0 for share in bounded) == min(number, most or number)


@given(counts=COUNTS, fraction=FRACTION, most=NUMBER, further=st.integers(0, 50))
def test_a_fraction_is_of_each_member_and_the_searchs_documents_come_first(
    counts: list[int], fraction: float, most: int, further: int
) -> None:
    alone = shares(DocumentLimit(fraction), counts)
    assert alone == [ceil_of(fraction, count) for count in counts]
    assert all(
        share is not None and fraction * count <= share + 1e-6
        for share, count in zip(alone, counts, strict=True)
    )
    more = shares(DocumentLimit(fraction, further=further), counts)
    assert all(both is not None and both >= (own or 0) for both, own in zip(more, alone, strict=True))
    assert sum(share or 0 for share in more) == sum(share or 0 for share in alone) + further
    bounded = shares(DocumentLimit(most, most=fraction), counts)
    assert all(share is not None and share <= (own or 0) for share, own in zip(bounded, alone, strict=True))


def test_a_tenth_of_thirty_is_three() -> None:
    assert [ceil_of(0.1, 30), ceil_of(0.07, 100), ceil_of(0.1, 31), ceil_of(0.3, 10)] == [3, 7, 4, 3]
    assert list(map(limit_words, (None, 32, 0.1, 1 / 8))) == ["all", "32", "10 %", "12.5 %"]


def test_curves_are_on_the_first_of_the_documents_evaluated(recall: OpenTask) -> None:
    options = RunOptions.model_validate({"limit": 0.05, "curve_limit": 1000})
    parts = part_limits(options)
    assert shares(parts["curves"][1], [100]) == shares(parts["evaluate"][1], [100]) == [5]
    assert shares(part_limits(RunOptions(limit=0.9))["curves"][1], [100]) == [64]


def test_a_fraction_stands_in_the_identity_as_a_number_however_it_is_spelled() -> None:
    digests = {run_options({"limit": text}).digest for text in ("0.1", ".1", "1e-1", "0.10", " 0.1")}
    assert len(digests) == 1
    assert run_options({"limit": "16"}).digest == run_options({"limit": "16.0"}).digest
    options = run_options({"limit": "0.1"})
    assert options.identity_values["limit"] == 0.1
    # A tenth of one split says nothing of another.
    assert options.resolved_train_limit == options.identity_values["train_limit"] == 32
    assert run_options({"limit": "0.1", "train_limit": "0.5"}).resolved_importance_limit == 0.5
