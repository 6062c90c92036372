"""Labels as a control: which answers demonstrations show, and the texts that come of it."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.task import ConfigurableTask

from lowmem_icl.protocols import CORRECTED, REFERENCE, Labels
from lowmem_icl.tasks.catalogue import PAPER_TASKS
from lowmem_icl.tasks.demonstrations import Demonstrations
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.label_controls import (
    NoLabelControl,
    changes_a_prompt,
    foreign_answers,
    shuffled_answers,
    with_other_labels,
)
from lowmem_icl.tasks.loading import OpenTask, open_task
from lowmem_icl.tasks.prompting import DIRECT_PROMPTER, Prompt, PromptRequest

CONTROLS: tuple[Labels, ...] = ("shuffled", "foreign")
Row = dict[str, Any]


@dataclass
class NotingPrompter:
    """Makes prompts and notes what was asked for."""

    asked: list[PromptRequest] = field(default_factory=list)

    def prompts(self, requests: Sequence[PromptRequest]) -> list[Prompt]:
        self.asked += requests
        return DIRECT_PROMPTER.prompts(requests)

    def fits(self, prompt: Prompt) -> bool:
        return True


def control_of(
    task: OpenTask, rows: TaskRows, labels: Labels
) -> tuple[TaskRows, list[tuple[list[Row], list[Row]]]]:
    """Return documents with other labels and, for each, the rows shown and those whose answers they show."""
    prompter = NotingPrompter()
    control = with_other_labels(task, rows, labels, CORRECTED, prompter)
    shown = [
        (
            [request.shown(index) for index in request.key.demonstrations],
            [request.shown(index) for index in request.key.answers],
        )
        for request in prompter.asked
    ]
    return control, shown


# --- Which answers are shown. ---


@given(st.lists(st.integers(0, 50), min_size=2, max_size=12, unique=True), st.integers(0, 99))
def test_shuffled_answers_are_the_same_ones_and_none_stays_where_it_was(shown: list[int], seed: int) -> None:
    answers = shuffled_answers(shown, random.Random(seed))
    assert sorted(answers) == sorted(shown)
    assert all(own != other for own, other in zip(shown, answers, strict=True))
    assert answers == shuffled_answers(shown, random.Random(seed))


def test_every_order_without_a_fixed_point_is_as_likely() -> None:
    rng = random.Random(0)
    drawn = [shuffled_answers((1, 2, 3, 4), rng) for _ in range(9000)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 9, "4! orders, of which 9 leave nothing in its place"
    assert max(abs(count - 1000) for count in counts) < 150


@given(pool=st.integers(1, 30), n_shown=st.integers(1, 12), is_in_pool=st.booleans(), seed=st.integers(0, 99))
def test_foreign_answers_are_of_other_rows(pool: int, n_shown: int, is_in_pool: bool, seed: int) -> None:
    rng = random.Random(seed)
    rows = list(range(100, 100 + pool))
    scored = rng.choice(rows) if is_in_pool else None
    free = [index for index in rows if index != scored]
    shown = rng.sample(free, min(n_shown, len(free)))
    if len(free) < 2 * len(shown):
        with pytest.raises(NoLabelControl, match="too few rows"):
            foreign_answers(shown, rows, scored, rng)
        return
    answers = foreign_answers(shown, rows, scored, rng)
    assert len(set(answers)) == len(shown)
    assert not set(answers) & {*shown, scored}
    assert set(answers) <= set(rows)


def test_a_single_demonstration_has_nothing_to_exchange() -> None:
    with pytest.raises(NoLabelControl, match="single demonstration"):
        shuffled_answers((3,), random.Random(0))


def own_task(folder: Path, rows: int = 24) -> OpenTask:
    lines = [
        {"context": f"question {number}:", "options": [f" yes {number}", " no"], "gold": 0}
        for number in range(rows)
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return open_task(str(folder / "own.jsonl"), None)


@pytest.mark.parametrize("labels", CONTROLS)
def test_answers_depend_on_neither_the_limit_nor_other_documents(tmp_path: Path, labels: Labels) -> None:
    task = own_task(tmp_path)

    def prompts(limit: int | None) -> dict[int, list[tuple[str, str]]]:
        rows = task.rows(shots=3, part="evaluate", limit=limit)
        control = with_other_labels(task, rows, labels, CORRECTED, DIRECT_PROMPTER)
        return {document.index: list(document.options) for document in control.documents}

    every, some = prompts(None), prompts(4)
    assert len(some) == 4
    assert some.items() <= every.items()


@pytest.mark.parametrize("labels", CONTROLS)
@pytest.mark.parametrize("protocol", [CORRECTED, REFERENCE], ids=lambda protocol: protocol.name)
def test_documents_of_a_set_show_the_same_answers(tmp_path: Path, labels: Labels, protocol: Any) -> None:
    task = own_task(tmp_path)
    how = Demonstrations("shared", 3)
    rows = task.rows(shots=3, part="evaluate", limit=None, demonstrations=how, protocol=protocol)
    prompter = NotingPrompter()
    with_other_labels(task, rows, labels, protocol, prompter)
    by_demonstrations: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for document, request in zip(rows.documents, prompter.asked, strict=True):
        by_demonstrations.setdefault(document.demonstrations, set()).add(request.key.answers)
        assert document.index not in request.key.answers
    assert any(len(answers) == 1 for answers in by_demonstrations.values())
    if protocol is CORRECTED:
        assert {len(answers) for answers in by_demonstrations.values()} == {1}
        assert len(by_demonstrations) == 3


# --- The texts. ---


def boolq_text(row: Row) -> str:
    return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"


def boolq_shown(row: Row, other: Row) -> str:
    return f"{boolq_text(row)} {['no', 'yes'][other['label']]}"


def copa_text(row: Row) -> str:
    return row["premise"][:-1] + {"cause": " because", "effect": " therefore"}[row["question"]]


def copa_shown(row: Row, other: Row) -> str:
    answer = other[f"choice{other['label'] + 1}"]
    return f"{copa_text(row)} {answer[0].lower()}{answer[1:]}"


def winogrande_shown(row: Row, other: Row) -> str:
    return row["sentence"].replace("_", other[f"option{other['answer']}"], 1).strip()


def multirc_text(row: Row) -> str:
    return f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer:"


def multirc_shown(row: Row, other: Row) -> str:
    verdict = "yes" if other["label"] else "no"
    return f"{multirc_text(row)} {row['answer']}\nIs the answer correct? {verdict}"


@pytest.mark.parametrize("labels", CONTROLS)
@pytest.mark.parametrize(
    ("name", "text", "shown_with"),
    [
        ("boolq", boolq_text, boolq_shown),
        ("copa", copa_text, copa_shown),
        ("multirc", multirc_text, multirc_shown),
    ],
)
def test_real_prompts_show_each_question_with_anothers_answer(
    shared_data: Path, name: str, labels: Labels, text: Callable[[Row], str], shown_with: Any
) -> None:
    task = open_task(name, shared_data)
    rows = task.rows(shots=3, part="evaluate", limit=4)
    control, shown = control_of(task, rows, labels)
    for document, right, (demonstrations, others) in zip(
        control.documents, rows.documents, shown, strict=True
    ):
        expected = "\n\n".join([*map(shown_with, demonstrations, others), text(document.row)])
        assert [context for context, _ in document.options] == [expected] * len(document.options)
        assert [answer for _, answer in document.options] == [answer for _, answer in right.options]
        assert replace(document, options=()) == replace(right, options=())


@pytest.mark.parametrize("labels", CONTROLS)
def test_winogrande_fills_the_gap_of_a_demonstration_with_anothers_answer(
    shared_data: Path, labels: Labels
) -> None:
    task = open_task("winogrande", shared_data)
    rows = task.rows(shots=2, part="evaluate", limit=4)
    control, shown = control_of(task, rows, labels)
    for document, (demonstrations, others) in zip(control.documents, shown, strict=True):
        before, after = document.row["sentence"].split("_", 1)
        expected = [
            (
                "\n\n".join([*map(winogrande_shown, demonstrations, others), before + document.row[option]]),
                f" {after.strip()}",
            )
            for option in ("option1", "option2")
        ]
        assert list(document.options) == expected


@pytest.mark.parametrize("labels", CONTROLS)
def test_record_completes_the_line_of_a_demonstration_with_anothers_entity(
    shared_data: Path, labels: Labels
) -> None:
    task = open_task("record", shared_data)
    rows = task.rows(shots=2, part="evaluate", limit=2)
    control, shown = control_of(task, rows, labels)
    for document, (demonstrations, others) in zip(control.documents, shown, strict=True):
        context = document.options[0][0]
        for row, other in zip(demonstrations, others, strict=True):
            assert f"  - {row['query']}\n\n".replace("@placeholder", other["answers"][0]) in context


@pytest.mark.parametrize("labels", CONTROLS)
def test_recall_shows_its_names_with_other_words(labels: Labels) -> None:
    task = open_task("recall", None)
    rows = task.rows(shots=4, part="evaluate", limit=16)
    control, shown = control_of(task, rows, labels)
    assert {document.member for document in control.documents} == set(range(8))
    for document, (demonstrations, others) in zip(control.documents, shown, strict=True):
        lines = [
            f"{row['text']} {other['choices'][other['answer']]}"
            for row, other in zip(demonstrations, others, strict=True)
        ]
        assert document.options[0][0] == "\n".join([*lines, document.row["text"]])
        assert all(other["choices"] == document.row["choices"] for other in others), "of the same member"


@pytest.mark.parametrize("name", [*PAPER_TASKS, "recall", "category", "knowledge", "repeat", "own"])
def test_own_answers_rendered_that_way_are_the_prompts_of_always(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    data = request.getfixturevalue("shared_data") if name in PAPER_TASKS else None
    task = own_task(tmp_path) if name == "own" else open_task(name, data)
    prompter = NotingPrompter()
    rows = task.rows(shots=3, part="evaluate", limit=8, prompter=prompter)
    own = [
        replace(asked, key=replace(asked.key, answers=asked.key.demonstrations)) for asked in prompter.asked
    ]
    prompts = DIRECT_PROMPTER.prompts(own)
    again = DIRECT_PROMPTER.prompts(prompter.asked)
    assert prompts == again, "and nothing of it stays with the task"
    assert sorted(map(repr, (prompt.options for prompt in prompts))) == sorted(
        repr(document.options) for document in rows.documents
    )
    for labels in CONTROLS:
        control = with_other_labels(task, rows, labels, CORRECTED, DIRECT_PROMPTER)
        # WSC's demonstrations are all right with yes.
        assert changes_a_prompt(rows, control) == (name != "wsc")


def lm_eval_task(**changes: Any) -> OpenTask:
    """A task as lm-eval's registry has them: templates, letters for answers, a description, a prefix."""
    rows = [{"q": f"Q{number}", "right": number % 4, "kind": "a"} for number in range(12)]
    config: Row = {
        "task": "letters",
        "output_type": "multiple_choice",
        "training_split": "train",
        "validation_split": "validation",
        "custom_dataset": lambda **_: {
            "train": datasets.Dataset.from_list(rows),
            "validation": datasets.Dataset.from_list(rows[:4]),
        },
        "description": "Answer with a letter.\n\n",
        "doc_to_text": "{{q}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return OpenTask("lm-eval:letters", [ConfigurableTask(config=config | changes)])


@pytest.mark.parametrize("labels", CONTROLS)
def test_tasks_of_lm_eval_keep_their_description_and_their_templates(labels: Labels) -> None:
    task = lm_eval_task()
    rows = task.rows(shots=2, part="evaluate", limit=None)
    control, shown = control_of(task, rows, labels)
    for document, (demonstrations, others) in zip(control.documents, shown, strict=True):
        lines = [
            f"{row['q']}\nAnswer: {'ABCD'[other['right']]}\n\n"
            for row, other in zip(demonstrations, others, strict=True)
        ]
        question = f"{document.row['q']}\nAnswer:"
        expected = "Answer with a letter.\n\n" + "".join(lines) + question
        assert list(document.options) == [(expected, f" {letter}") for letter in "ABCD"]


def test_answers_in_a_context_that_no_definition_points_out_are_left_alone() -> None:
    task = lm_eval_task(
        doc_to_text="{{right % 2}}", doc_to_choice="{{[q, q + '!']}}", doc_to_target="{{kind}}"
    )
    assert task.tasks[0].multiple_input
    rows = task.rows(shots=2, part="evaluate", limit=None)
    with pytest.raises(NoLabelControl, match="answers stand in the context"):
        with_other_labels(task, rows, "shuffled", CORRECTED, DIRECT_PROMPTER)
