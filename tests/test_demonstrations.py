"""Shared demonstrations: a few sets for all documents, drawn once, never showing a document to itself,
cut to fit.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.tasks.demonstrations import Dealer, Demonstrations
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.loading import OpenTask, open_task
from lowmem_icl.tasks.packing import PackingLimits, fit_context, pack
from lowmem_icl.tasks.prompting import DirectPrompter

SHARED = Demonstrations("shared", 3)


def own_task(folder: Path, rows: int = 24) -> OpenTask:
    lines = [
        {"context": f"question {number}:", "options": [" yes", " no"], "gold": number % 2}
        for number in range(rows)
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return open_task(str(folder / "own.jsonl"), None)


@given(
    seed=st.integers(0, 99),
    shots=st.integers(1, 6),
    sets=st.integers(1, 4),
    scores_the_pool=st.booleans(),
    clusters=st.lists(st.integers(0, 5), min_size=1, max_size=30),
)
def test_sets_are_few_of_the_right_size_and_never_hold_the_document(
    seed: int, shots: int, sets: int, scores_the_pool: bool, clusters: list[int]
) -> None:
    dealer = Dealer(
        Demonstrations("shared", sets), random.Random(seed), list(range(40)), shots, scores_the_pool
    )
    dealt = [dealer.deal(index, str(cluster)) for index, cluster in enumerate(clusters)]
    for index, shown in enumerate(dealt):
        assert len(set(shown.indices)) == shots
        assert not scores_the_pool or index not in shown.indices
    of_cluster: dict[int, int | None] = {}
    for cluster, shown in zip(clusters, dealt, strict=True):
        assert of_cluster.setdefault(cluster, shown.set_number) == shown.set_number
    assert len({shown.set_number for shown in dealt}) == min(sets, len(set(clusters)))
    if not scores_the_pool:
        assert len({shown.indices for shown in dealt}) <= sets


def test_documents_are_those_of_the_papers_mode_and_nested_under_limits(tmp_path: Path) -> None:
    task = own_task(tmp_path)

    def of(shots: int, limit: int | None, **more: Any) -> list[int]:
        return [
            document.index
            for document in task.rows(shots=shots, part="evaluate", limit=limit, **more).documents
        ]

    assert sorted(of(2, 8, demonstrations=SHARED)) == sorted(of(2, 8)) == sorted(of(0, 8))
    assert set(of(2, 4, demonstrations=SHARED)) < set(of(2, 8, demonstrations=SHARED))
    dealt = task.rows(shots=2, part="evaluate", limit=None, demonstrations=SHARED).documents
    sets = [document.set_number for document in dealt if document.set_number is not None]
    assert len(sets) == len(dealt)
    assert sets == sorted(sets), "documents of one set stand together"
    assert np.bincount(sets).tolist() == [4, 4, 4]


def test_intervals_cluster_by_set(tmp_path: Path) -> None:
    task = own_task(tmp_path)

    def clusters(shots: int, sets: int) -> set[str]:
        how = Demonstrations("shared", sets)
        return set(task.rows(shots=shots, part="evaluate", limit=None, demonstrations=how).clusters)

    assert clusters(2, 3) == {"set 0:0", "set 0:1", "set 0:2"}
    assert clusters(2, 1) == {"set 0:0"}, "one set says nothing about others"
    assert len(clusters(0, 3)) == 12, "else by document"


def test_documents_with_the_same_prompt_are_one() -> None:
    def document(number: int, prompt: str, cluster: str) -> Document:
        return Document(number, ((prompt, " a"), (prompt, " b")), (True, False), cluster, (), "", 0, {})

    alike = [document(0, "x", "p"), document(1, "y", "q"), document(2, "x", "r"), document(3, "z", "q")]
    assert TaskRows("t", 0, "test", tuple(alike), "acc", ()).clusters == ["p", "q", "p", "q"]
    # Passages p and r share the prompt x, r and s the prompt y: all of them are one cluster.
    chained = [document(0, "x", "p"), document(1, "x", "r"), document(2, "y", "s"), document(3, "y", "r")]
    assert len(set(TaskRows("t", 0, "test", tuple(chained), "acc", ()).clusters)) == 1


def test_a_set_loses_its_first_demonstrations_until_its_longest_document_fits(tmp_path: Path) -> None:
    task = own_task(tmp_path)

    def characters(texts: list[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]

    whole = task.rows(shots=3, part="evaluate", limit=None, demonstrations=SHARED)
    longest = max(len(c + o) - 1 for d in whole.documents for c, o in d.options)
    limits = PackingLimits(longest - 1, 64, 2)
    fitted = task.rows(
        shots=3,
        part="evaluate",
        limit=None,
        demonstrations=SHARED,
        prompter=DirectPrompter(lambda options: fit_context(options, characters, limits)),
    )
    dropped = {document.set_number: document.dropped for document in fitted.documents}
    assert 1 in dropped.values()
    for before, after in zip(whole.documents, fitted.documents, strict=True):
        assert after.dropped == dropped[after.set_number], "all of a set lose the same"
        assert after.demonstrations == before.demonstrations[after.dropped :]
        assert before.options[0][0].endswith(after.options[0][0])
    packed = pack(fitted, characters, limits)
    for number, option in enumerate(packed.options):
        document = fitted.documents[number // 2]
        assert option.truncated == (document.dropped > 0)
        assert len(option.path) <= limits.context_tokens


@pytest.mark.parametrize("task", ["multirc", "piqa", "wsc"])
def test_real_rows_share_sets_by_passage(shared_data: Path, task: str) -> None:
    rows = open_task(task, shared_data).rows(shots=2, part="train", limit=12, demonstrations=SHARED)
    passages: dict[str, set[int | None]] = {}
    for document in rows.documents:
        passages.setdefault(document.cluster, set()).add(document.set_number)
        assert document.index not in document.demonstrations
    assert all(len(sets) == 1 for sets in passages.values())
    assert {document.set_number for document in rows.documents} == {0, 1, 2}
