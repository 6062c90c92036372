"""Labels as a control: the same documents after demonstrations with other answers, and what that takes from
their scores.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import oracles
import polars as pl
import pytest
from commands import invoke
from conftest import reference_model
from demo_scores import DEMO
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.task import ConfigurableTask

from lowmem_icl.experiments.evaluate.measure import MaskScores, label_effect_records
from lowmem_icl.masks.mask import Mask
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import CORRECTED, REFERENCE, Labels
from lowmem_icl.report.labels import COLUMNS, label_rows
from lowmem_icl.session.prepare import prepare
from lowmem_icl.tables.schema import RESULTS, read_table
from lowmem_icl.tasks.catalogue import PAPER_TASKS
from lowmem_icl.tasks.demonstrations import Demonstrations
from lowmem_icl.tasks.documents import Document, TaskRows
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


# --- What a run makes of it. ---


def test_controls_are_of_the_tasks_that_can_have_them_and_the_others_are_named(
    shared_data: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(
        "\n".join(json.dumps({"context": "q", "options": [" a", " b"], "gold": n % 2}) for n in range(9))
    )
    changes = {
        "tasks": f"wsc,copa,{few}",
        "data_dir": shared_data,
        "shots": "0,1,3",
        "limit": 4,
        "train_limit": 2,
    }
    prepared = prepare(RunOptions.model_validate(changes))
    found = [(control.task, control.shots, control.labels) for control in prepared.label_controls]
    assert found == [
        ("copa", 1, "foreign"),
        ("copa", 3, "shuffled"),
        ("copa", 3, "foreign"),
        (str(few), 1, "foreign"),
        (str(few), 3, "shuffled"),
    ]
    assert prepared.notes == (
        "task wsc: no control with foreign or shuffled labels: all demonstrations show the same answer",
        f"task {few}: no control with foreign labels: there are too few rows besides the demonstrations to "
        "take answers from",
    )
    assert not prepare(RunOptions.model_validate(changes | {"labels": "right"})).label_controls
    assert not prepare(RunOptions.model_validate(changes | {"experiments": "importance"})).label_controls


def test_training_documents_have_controls_where_ablations_are_about_labels(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [{"context": f"q{n}", "options": [" a", " b"], "gold": n % 2} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    changes = {"tasks": str(path), "shots": "0,1,4", "limit": 6, "train_limit": 5, "labels": "right"}
    assert not prepare(RunOptions.model_validate(changes)).train_controls
    prepared = prepare(RunOptions.model_validate(changes | {"label_drops": True}))
    assert not prepared.label_controls
    (control,) = prepared.train_controls
    (right,) = (task for task in prepared.train if task.shots == 4)
    assert (control.shots, control.labels, control.split) == (4, "shuffled", right.split)
    for document, own in zip(control.documents, right.documents, strict=True):
        assert (document.index, document.gold) == (own.index, own.gold)
        shown, own_shown = (next(iter(of.options))[0] for of in (document, own))
        assert sorted(re.findall(r" [ab]", shown)) == sorted(re.findall(r" [ab]", own_shown))
        assert re.findall(r"q\d+", shown) == re.findall(r"q\d+", own_shown), "the same questions"
    assert changes_a_prompt(right, control)
    both, alone = (
        prepare(RunOptions.model_validate(changes | {"label_drops": drops, "labels": "right,shuffled"}))
        for drops in (True, False)
    )
    assert prompts_of(both.label_controls) == prompts_of(alone.label_controls)
    assert prompts_of(both.train_controls) == prompts_of(prepared.train_controls)


def prompts_of(tasks: Sequence[TaskRows]) -> list[list[tuple[str, str]]]:
    return [list(document.options) for task in tasks for document in task.documents]


def made_task(golds: Sequence[tuple[bool, ...]], units: Sequence[str], labels: Labels) -> TaskRows:
    documents = tuple(
        Document(number, [(f"question {number}", "")] * len(gold), gold, str(number), (), unit, 0, {})
        for number, (gold, unit) in enumerate(zip(golds, units, strict=True))
    )
    return TaskRows("made", 2, "test", documents, "acc", (), labels)


def test_effects_are_paired_differences_of_option_log_probabilities() -> None:
    golds, units = [(True, False), (False, True), (True, False)], ["a", "b", "b"]
    right, control = (made_task(golds, units, labels) for labels in ("right", "foreign"))
    with_right = np.array([-1.0, -2.0, -4.0, -3.0, -0.5, -0.6])
    with_foreign = np.array([-1.5, -1.0, -4.0, -3.5, -0.5, -0.4])
    scores, others = (
        MaskScores("clean", Mask(), logprobs, np.zeros(6, dtype=bool))
        for logprobs in (with_right, with_foreign)
    )
    records = {record["metric"]: record for record in label_effect_records(right, control, scores, others)}
    assert set(records) == {"acc_label_effect", "gold_logprob_label_effect"}
    # Units: a is right, then wrong; b is right, then has one document wrong.
    assert records["acc_label_effect"]["value"] == 1.0
    logprob = records["gold_logprob_label_effect"]
    assert logprob["value"] == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    # The spread of the differences 0.5, 0.5 and 0, over the root of three documents.
    assert logprob["stderr"] == pytest.approx(np.std([0.5, 0.5, 0.0], ddof=1) / np.sqrt(3))
    assert np.isnan([logprob["low"], logprob["high"]]).all(), "one of three documents is unlike the others"
    accuracy = records["acc_label_effect"]
    assert accuracy["low"] < accuracy["value"] <= accuracy["high"]
    assert {(record["labels"], record["mask"], record["documents"]) for record in records.values()} == {
        ("foreign", "clean", 3)
    }


def evaluated(small_run: Path) -> pl.DataFrame:
    results = read_table(small_run / "results.parquet", "results")
    return results.filter(pl.col("experiment") == "evaluate")


def value(records: pl.DataFrame, task: str, metric: str, labels: str) -> float:
    found = records.filter(
        (pl.col("task") == task)
        & (pl.col("metric") == metric)
        & (pl.col("labels") == labels)
        & (pl.col("shots") == 4)
    )
    return float(found["value"].item())


def test_a_run_has_the_same_metrics_with_all_labels_and_their_differences(small_run: Path) -> None:
    records = evaluated(small_run).filter(pl.col("shots") > 0)
    metrics = {str(labels): set(members["metric"]) for (labels,), members in records.group_by("labels")}
    effects = {"acc_label_effect", "gold_logprob_label_effect"}
    for labels in CONTROLS:
        assert metrics[labels] == (metrics["right"] - {"majority"}) | effects
        for task in ("recall", "knowledge", "aggregate"):
            for metric in ("acc", "gold_logprob"):
                gained = value(records, task, metric, "right") - value(records, task, metric, labels)
                assert value(records, task, f"{metric}_label_effect", labels) == pytest.approx(gained)
    assert set(records["mask"]) == {"clean"}
    assert not evaluated(small_run).filter((pl.col("shots") == 0) & pl.col("labels").is_not_null()).height
    answers = read_table(small_run / "answers.parquet", "answers")
    n_options = 2 * 2 * 16 * 4
    assert len(answers) == n_options, "answers are those with right labels alone"


def test_recall_is_learnt_from_labels_and_knowledge_is_not(small_run: Path) -> None:
    records = evaluated(small_run)
    for labels in CONTROLS:
        assert value(records, "recall", "gold_logprob_label_effect", labels) > 2
        assert value(records, "recall", "acc_label_effect", labels) > 0.3
        assert abs(value(records, "knowledge", "gold_logprob_label_effect", labels)) < 0.01
        assert value(records, "knowledge", "acc_label_effect", labels) == 0


def test_scores_with_shuffled_labels_are_hugging_faces(stores: Path, tmp_path: Path) -> None:
    same = ("--weights", "float32", "--shots", 4, "--store-dir", stores)
    result = invoke(
        "run", *same, "--tasks", "recall", "--limit", 8, "--train-limit", 2, "--experiments", "evaluate",
        "--labels", "right,shuffled", "--out", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = invoke("prompts", "recall", *same, "--limit", 8, "--count", 8, "--labels", "shuffled", "--json")
    assert shown.exit_code == 0, shown.output
    model, golds = reference_model(DEMO), []
    for entry in json.loads(shown.stdout):
        assert entry["labels"] == "shuffled"
        (option,) = [option for option in entry["options"] if option["gold"]]
        path = [*option["context_ids"], *option["continuation_ids"]][:-1]
        golds.append(oracles.option_logprob(model, path, option["continuation_ids"]))
    records = read_table(tmp_path / "run" / "results.parquet", "results")
    assert len(golds) == 8
    assert value(records, "recall", "gold_logprob", "shuffled") == pytest.approx(np.mean(golds), abs=1e-4)
    assert set(records["labels"]) == {"right", "shuffled"}


def test_the_page_shows_labels_side_by_side(small_run: Path) -> None:
    page = (small_run / "report.html").read_text()
    for text in ("What the labels give", "right − shuffled", "has not been learnt from labels"):
        assert text in page, text
    rows = label_rows(read_table(small_run / "results.parquet", "results"))
    assert [row[:3] for row in rows] == [
        [task, "4", measure]
        for task in ("recall", "knowledge", "aggregate")
        for measure in ("accuracy", "gold log-probability")
    ]
    records = evaluated(small_run)
    for task, _, measure, *values in rows:
        metric = {"accuracy": "acc", "gold log-probability": "gold_logprob"}[measure]
        scores = [f"{value(records, task, metric, labels):.3f}" for labels in ("right", *CONTROLS)]
        gains = [f"{value(records, task, f'{metric}_label_effect', labels):.3f}" for labels in CONTROLS]
        assert [*values[:3], values[3], values[5]] == [*scores, *gains]
        assert all(" to " in values[index] for index in (4, 6))


def test_a_control_that_a_task_lacks_leaves_its_cells_empty() -> None:
    same = {"experiment": "evaluate", "mask": "clean", "task": "record", "shots": 1}
    records = [
        {"metric": "em", "labels": "right", "value": 0.5},
        {"metric": "em", "labels": "foreign", "value": 0.25},
        {"metric": "acc_label_effect", "labels": "foreign", "value": 0.25, "low": 0.1, "high": 0.4},
    ]
    accuracy, _ = label_rows(pl.DataFrame([same | record for record in records], schema=RESULTS))
    assert dict(zip(COLUMNS[3:6], accuracy[3:6], strict=True)) == {
        "right": "0.500", "shuffled": "", "foreign": "0.250",
    }  # fmt: skip
    assert accuracy[6:] == ["", "", "0.250", "0.100 to 0.400"]
    assert not label_rows(pl.DataFrame([same | records[0]], schema=RESULTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--labels", "shuffled"), "--labels: expected right among them"),
        (("run", "--labels", "right,wrong"), "--labels: expected"),
        (("prompts", "recall", "--labels", "wrong"), "--labels: expected"),
        (("prompts", "recall", "--labels", "foreign"), "there are no demonstrations"),
        (("prompts", "recall", "--labels", "shuffled", "--shots", 1), "a single demonstration"),
    ],
)
def test_labels_that_cannot_be_had_are_refused(arguments: tuple[object, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
