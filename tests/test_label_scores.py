"""Labels as a control: the same documents after demonstrations with other answers, and what that takes from
their scores.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import polars as pl
import pytest
from commands import invoke
from conftest import reference_model
from demo_scores import DEMO

from lowmem_icl.experiments.evaluate.measure import MaskScores, label_effect_records
from lowmem_icl.masks.mask import Mask
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import Labels
from lowmem_icl.report.page.section import number_text
from lowmem_icl.report.page.sections.labels import COLUMNS, label_rows
from lowmem_icl.session.prepare import prepare
from lowmem_icl.tables.schema import RESULTS, read_table
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.label_controls import (
    changes_a_prompt,
)

CONTROLS: tuple[Labels, ...] = ("shuffled", "foreign")
Row = dict[str, Any]


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
        for measure in ("accuracy", "log-probability")
    ]
    records = evaluated(small_run)
    for task, _, measure, *values in rows:
        metric = {"accuracy": "acc", "log-probability": "gold_logprob"}[measure]
        scores = [number_text(value(records, task, metric, labels)) for labels in ("right", *CONTROLS)]
        gains = [number_text(value(records, task, f"{metric}_label_effect", labels)) for labels in CONTROLS]
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
