"""Tasks in the paper's protocol: prompts character by character, order, draws, limits, metrics."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import general_detokenize

from lowmem_icl.tasks.catalogue import DEMO_TASKS, PAPER_TASKS, demo_tasks_folder
from lowmem_icl.tasks.loading import OpenTask, open_task
from lowmem_icl.tasks.scoring import document_scores, task_metrics, unit_accuracy

# A row in the hub's field names.
Row = dict[str, Any]


def rows_of(folder: Path, task: str, split: str) -> list[Row]:
    return [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]


def clean(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def wsc_passage(row: Row) -> str:
    words = row["text"].split()
    before = " ".join(words[: row["span2_index"]])
    after = row["text"][len(before) + len(row["span2_text"]) + 1 :]
    return str(general_detokenize(before + f" *{row['span2_text']}*" + after))


def record_context(row: Row) -> str:
    parts: list[str] = row["passage"].strip().split("\n@highlight\n")
    return parts[0] + "\n\n" + "".join(f"  - {part}.\n" for part in parts[1:])


def winogrande_parts(row: Row) -> tuple[str, str]:
    before, after = row["sentence"].split("_", 1)
    return before, " " + after.strip()


def pairs(row: Row, context: str, options: list[str]) -> list[tuple[str, str]]:
    return [(context, option) for option in options]


# The templates of paper.md 6.2, written down a second time: row to (context, continuation) pairs and the gold
# place.
TEMPLATES: dict[str, Callable[[Row], tuple[list[tuple[str, str]], int]]] = {
    "hellaswag": lambda r: (
        pairs(
            r,
            clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"),
            [" " + clean(e) for e in r["endings"]],
        ),
        int(r["label"]),
    ),
    "piqa": lambda r: (
        pairs(r, f"Question: {r['goal']}\nAnswer:", [" " + r["sol1"], " " + r["sol2"]]),
        r["label"],
    ),
    "openbookqa": lambda r: (
        pairs(r, r["question_stem"], [" " + c for c in r["choices"]["text"]]),
        r["choices"]["label"].index(r["answerKey"].strip()),
    ),
    "winogrande": lambda r: (
        [(winogrande_parts(r)[0] + r[f"option{n}"], winogrande_parts(r)[1]) for n in (1, 2)],
        int(r["answer"]) - 1,
    ),
    "boolq": lambda r: (
        pairs(r, f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", [" no", " yes"]),
        r["label"],
    ),
    "cb": lambda r: (
        pairs(
            r,
            f"{r['premise']}\nQuestion: {r['hypothesis']}. True, False or Neither?\nAnswer:",
            [" True", " False", " Neither"],
        ),
        r["label"],
    ),
    "copa": lambda r: (
        pairs(
            r,
            r["premise"].strip()[:-1] + {"cause": " because", "effect": " therefore"}[r["question"]],
            [" " + r[c][0].lower() + r[c][1:] for c in ("choice1", "choice2")],
        ),
        r["label"],
    ),
    "wic": lambda r: (
        pairs(
            r,
            f"Sentence 1: {r['sentence1']}\nSentence 2: {r['sentence2']}\nQuestion: Is the word "
            f"'{r['sentence1'][r['start1'] : r['end1']]}' used in the same way in the two "
            "sentences above?\nAnswer:",
            [" no", " yes"],
        ),
        r["label"],
    ),
    "wsc": lambda r: (
        pairs(
            r,
            f"Passage: {wsc_passage(r)}\nQuestion: In the passage above, does the pronoun "
            f'"*{r["span2_text"]}*" refer to "*{r["span1_text"]}*"?\nAnswer:',
            [" no", " yes"],
        ),
        r["label"],
    ),
    "multirc": lambda r: (
        pairs(
            r,
            f"{r['paragraph']}\nQuestion: {r['question']}\nAnswer:",
            [f" {r['answer']}\nIs the answer correct? {v}" for v in ("no", "yes")],
        ),
        r["label"],
    ),
    "rte": lambda r: (
        pairs(
            r, f"{r['sentence1']}\nQuestion: {r['sentence2']} True or False?\nAnswer:", [" True", " False"]
        ),
        r["label"],
    ),
    "record": lambda r: (
        pairs(
            r,
            record_context(r),
            ["  - " + r["query"].replace("@placeholder", e) for e in sorted(set(r["entities"]))],
        ),
        sorted(set(r["entities"])).index(r["answers"][0]),
    ),
}
TEMPLATES["arc_easy"] = TEMPLATES["arc_challenge"] = lambda r: (
    pairs(r, f"Question: {r['question']}\nAnswer:", [" " + c for c in r["choices"]["text"]]),
    r["choices"]["label"].index(r["answerKey"].strip()),
)


@pytest.mark.parametrize("task", PAPER_TASKS)
@pytest.mark.parametrize("shots", [0, 1, 3])
def test_prompts_equal_the_templates_and_the_random_42_protocol(
    shared_data: Path, task: str, shots: int
) -> None:
    opened = open_task(task, shared_data)
    rows = opened.rows(shots=shots, part="evaluate", limit=10)
    assert rows.split == ("test" if task in ("arc_easy", "arc_challenge", "openbookqa") else "validation")
    scored, train = rows_of(shared_data, task, rows.split), rows_of(shared_data, task, "train")
    pool = [place for place, row in enumerate(train) if task != "wsc" or row["label"] == 1]
    rng = random.Random(42)
    order = list(range(len(scored)))
    rng.shuffle(order)
    drawn = {place: rng.sample(pool, shots) for place in order}
    if task != "multirc":
        assert [document.index for document in rows.documents] == order[:10]
    for document in rows.documents:
        assert list(document.demonstrations) == drawn[document.index]
        shown = ""
        for place in drawn[document.index]:
            listed, gold = TEMPLATES[task](train[place])
            shown += listed[gold][0] + listed[gold][1] + "\n\n"
        listed, gold = TEMPLATES[task](scored[document.index])
        assert list(document.options) == [(shown + context, continuation) for context, continuation in listed]
        assert document.gold[gold]
        assert sum(document.gold) == 1 or task == "record"


def test_limits_are_nested_and_documents_the_same_at_every_shot_count(shared_data: Path) -> None:
    opened = open_task("multirc", shared_data)
    few, more, shown = (
        [document.index for document in opened.rows(shots=shots, part="evaluate", limit=limit).documents]
        for shots, limit in ((0, 3), (0, 8), (1, 8))
    )
    assert set(few) < set(more)
    assert more == shown


def test_multirc_takes_whole_questions_and_is_right_only_on_all_of_them(shared_data: Path) -> None:
    rows = open_task("multirc", shared_data).rows(shots=0, part="evaluate", limit=5)
    every = rows_of(shared_data, "multirc", "validation")
    questions = {(document.row["paragraph"], document.row["question"]) for document in rows.documents}
    assert len(questions) == 5
    assert len(rows.documents) == sum((row["paragraph"], row["question"]) in questions for row in every)
    right = np.array([[0.0, 1.0] if document.gold[1] else [1.0, 0.0] for document in rows.documents])
    greedy = np.zeros(right.size, dtype=bool)
    assert task_metrics(rows, right.ravel(), greedy)[0].value == 1
    right[0] = right[0, ::-1]
    spoiled = right.ravel()
    assert task_metrics(rows, spoiled, greedy)[0].value == pytest.approx(0.8)
    by_unit, _ = unit_accuracy(rows, document_scores(rows, spoiled, greedy)["acc"])
    assert by_unit.mean() == pytest.approx(0.8)


@pytest.mark.parametrize("task", ["piqa", "wsc", "recall"])
def test_training_documents_are_not_among_their_own_demonstrations(shared_data: Path, task: str) -> None:
    rows = open_task(task, shared_data).rows(shots=3, part="train", limit=None)
    assert rows.split == "train"
    offset = {
        member: min(d.index for d in rows.documents if d.member == member)
        for member in range(len(rows.members))
    }
    for document in rows.documents:
        assert len(document.demonstrations) == 3
        assert document.index - offset[document.member] not in document.demonstrations


def test_a_group_is_one_task_with_demonstrations_from_each_member_alone() -> None:
    rows = open_task("recall", None).rows(shots=4, part="evaluate", limit=None)
    assert sorted(document.index for document in rows.documents) == list(range(512))
    for document in rows.documents:
        values = {option.strip() for _, option in document.options}
        shown = document.options[0][0].splitlines()[:-1]
        assert {line.split()[1] for line in shown} <= values
    # Rotations: every option is right equally often, so any constant answer is at chance.
    assert rows.chance == rows.majority == 0.25


@pytest.mark.parametrize("task", DEMO_TASKS)
def test_the_demo_asks_what_its_demonstrations_show(task: str) -> None:
    rows = open_task(task, None).rows(shots=16, part="evaluate", limit=200)
    answered = {"recall": lambda word, line: line.split()[0] == word}
    if task == "recall":
        shown = [
            any(
                answered[task](document.options[0][0].splitlines()[-1], line)
                for line in document.options[0][0].splitlines()[:-1]
            )
            for document in rows.documents
        ]
        assert np.mean(shown) > 0.95
    assert rows.chance == 0.25


def test_record_accepts_every_answer() -> None:
    row = {
        "passage": "Ann met Bob.\n@highlight\nThey talked",
        "query": "@placeholder left",
        "entities": ["Bob", "Ann", "bob"],
        "answers": ["Bob", "Ann"],
    }
    from lowmem_icl.tasks.definitions import templates

    assert templates.record_gold(row) == [0, 1, 2]
    assert templates.record_results(row, [(-1.0, False), (-2.0, False), (-3.0, False)]) == {
        "em": 1.0,
        "f1": 1.0,
    }


def own_file(folder: Path, *rows: object) -> str:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-50, 0), min_size=2, max_size=5), min_size=1, max_size=8), st.data())
def test_margin_is_positive_exactly_when_right_and_probability_lies_between(
    values: list[list[float]], data: st.DataObject
) -> None:
    opened: OpenTask = _hypothetical(values, data)
    rows = opened.rows(shots=0, part="evaluate", limit=None)
    logprobs = np.concatenate([values[document.index] for document in rows.documents])
    greedy = np.zeros(len(logprobs), dtype=bool)
    scores = document_scores(rows, logprobs, greedy)
    assert ((scores["gold_prob"] >= 0) & (scores["gold_prob"] <= 1)).all()
    assert (scores["acc"][scores["margin"] > 0] == 1).all()
    assert (scores["acc"][scores["margin"] < 0] == 0).all()
    (metric,) = task_metrics(rows, logprobs, greedy)
    assert metric.value == pytest.approx(scores["acc"].mean())


def _hypothetical(values: list[list[float]], data: st.DataObject) -> OpenTask:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {
                "context": "c",
                "options": [f" {n}" for n in range(len(one))],
                "gold": data.draw(st.integers(0, len(one) - 1)),
            }
            for one in values
        ]
        return open_task(own_file(Path(folder), *rows), None)


def test_the_demo_data_is_where_the_package_looks() -> None:
    assert (demo_tasks_folder() / "recall_0" / "train.jsonl").is_file()
