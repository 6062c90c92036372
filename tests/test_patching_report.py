"""What people see of patches: units.parquet, page, figures, summary, terminal; also of runs without tasks."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from commands import invoke
from polars.testing import assert_frame_equal
from rich.console import Console

from lowmem_icl.cli.tables import show_summary
from lowmem_icl.experiments.patch.stage import with_means
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.layout import Asked
from lowmem_icl.report.figures.registry import FIGURES
from lowmem_icl.report.figures.style import figure_style
from lowmem_icl.report.files import publish_run
from lowmem_icl.report.findings.above_chance import Settings
from lowmem_icl.report.findings.patching import patch_sentence
from lowmem_icl.report.page.payload import payload
from lowmem_icl.report.page.sections.labels import learnt_sentence
from lowmem_icl.report.page.sections.patching import patching_section
from lowmem_icl.report.page.unit_arrays import Grid
from lowmem_icl.report.page.write import run_page
from lowmem_icl.report.patches import added_vectors, prompt_scores, top_patches, vector_heads
from lowmem_icl.report.run_tables import RunTables, read_run
from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.mask_table import Judging, mask_table
from lowmem_icl.tables.schema import UNITS, read_table
from lowmem_icl.tables.unit_table import unit_table

Row = dict[str, Any]
NO_CHANCE = Settings((), frozenset(), frozenset(), frozenset())


def patch(metric: str, value: float, head: int | None, **more: Any) -> Row:
    """A record about a unit of layer 0: a head, or the FFN where `head` is None."""
    kind = "ffn" if head is None else "head"
    return {
        "experiment": "patch", "procedure": "last", "task": "recall", "shots": 4, "labels": "shuffled",
        "method": "patching", "metric": metric, "value": value, "kind": kind, "layer": 0, "head": head,
        "documents": 8, "exact": True,
    } | more  # fmt: skip


def prompts(metric: str, labels: str, value: float, **more: Any) -> Row:
    whole = patch(metric, value, None, labels=labels) | {"kind": None, "layer": None, "method": None}
    return whole | more


def effects() -> pl.DataFrame:
    """Two heads and an FFN, patched at both places; what they are and do is of no model."""
    return frame(
        "results",
        [
            prompts("gold_logprob", "right", -1.0), prompts("gold_logprob", "shuffled", -5.0),
            prompts("acc", "right", 0.75), prompts("acc", "shuffled", 0.25),
            patch("restore_gold_logprob", 3.0, 0, low=2.0, high=4.0),
            patch("restore_gold_logprob_q_value", 0.01, 0),
            patch("restore_gold_logprob", -1.0, 1, low=-2.0, high=0.5),
            patch("restore_gold_logprob", 1.0, None, low=0.5, high=1.5),
            patch("restore_normalised", 0.875, 0, low=0.5, high=1.25, documents=6),
            patch("break_gold_logprob", -2.0, 1, low=-3.0, high=-1.0),
            patch("break_gold_logprob_q_value", 0.04, 1),
            patch("break_gold_logprob", 0.25, 0, low=0.0, high=0.5),
            patch("break_gold_logprob", 0.0, None),
            patch("function_vector", 0.5, 1, low=0.25, high=0.75, method="mean"),
            patch("restore_gold_logprob", 5.0, 0, method="attribution", exact=False),
            patch("restore_gold_logprob", 9.0, 0, procedure="all"),
            patch("restore_gold_logprob", 7.0, 0, procedure="all", task="repeat"),
        ],
    )  # fmt: skip


def units(results: pl.DataFrame) -> pl.DataFrame:
    return unit_table(results, mask_table(results, {}, Judging(1, 2, "gold_prob", 0.01)))


def known(row: Row) -> Row:
    named = {"task", "shots", "unit", "kind", "layer", "head"}
    return {name: value for name, value in row.items() if value is not None and name not in named}


def test_units_hold_patches_at_the_last_token_and_else_those_at_all() -> None:
    table = units(effects())
    assert table.schema == pl.Schema(UNITS)
    first, second, ffn, other = table.to_dicts()
    assert known(first) == {
        "restore": 3.0, "restore_low": 2.0, "restore_high": 4.0, "restore_q_value": 0.01, "break": 0.25,
        "break_low": 0.0, "break_high": 0.5, "restore_normalised": 0.875, "restore_normalised_low": 0.5,
        "restore_normalised_high": 1.25,
    }  # fmt: skip
    assert (second["break"], second["break_q_value"], second["function_vector_low"]) == (-2.0, 0.04, 0.25)
    assert known(ffn) == {
        "restore": 1.0, "restore_low": 0.5, "restore_high": 1.5, "break": 0.0,
    }  # fmt: skip
    assert (other["task"], known(other)) == ("repeat", {"restore": 7.0})


def test_prompts_units_and_heads_are_listed_as_measured() -> None:
    (scores,) = prompt_scores(effects()).to_dicts()
    assert scores == {
        "task": "recall", "shots": 4, "procedure": "last", "corruption": "shuffled", "pairs": 8,
        "gold_logprob_clean": -1.0, "gold_logprob_corrupted": -5.0, "acc_clean": 0.75, "acc_corrupted": 0.25,
        "pairs_apart": 6,
    }  # fmt: skip
    at_last = top_patches(effects(), 2).filter(pl.col("procedure") == "last")
    assert [(row["direction"], row["kind"], row["head"], row["value"]) for row in at_last.to_dicts()] == [
        ("restore", "head", 0, 3.0), ("restore", "ffn", None, 1.0),
        ("break", "head", 1, -2.0), ("break", "ffn", None, 0.0),
    ]  # fmt: skip
    assert at_last["q_value"].to_list() == [0.01, None, 0.04, None]
    (head,) = vector_heads(effects()).to_dicts()
    assert (head["head"], head["value"], head["low"], head["high"]) == (1, 0.5, 0.25, 0.75)


def test_sentences_name_what_is_significant_and_has_its_sign() -> None:
    assert patch_sentence(units(effects()), NO_CHANCE) == (
        "Put into corrupted prompts, the clean value of L0H0 (in 1 of 2 settings) restores the right answer; "
        "put into clean prompts, the corrupted value of L0H1 (in 1 of 2 settings) breaks it."
    )
    of_chance = Settings((("recall", 4),), frozenset({("recall", 4)}), frozenset(), frozenset())
    assert patch_sentence(units(effects()), of_chance) == (
        "Put into corrupted prompts, no unit's clean value significantly restores the right answer; put into "
        "clean prompts, no unit's corrupted value significantly breaks it."
    )
    assert patch_sentence(units(effects().clear()), NO_CHANCE) == ""


def test_added_vectors_stand_at_the_layer_that_is_best_for_the_tasks_own() -> None:
    same = {
        "experiment": "patch", "procedure": "added", "metric": "first_token_acc",
        "task": "recall", "shots": 0, "documents": 8, "exact": True,
    }  # fmt: skip
    hits = {"own": (0.25, 0.75), "other_task": (0.5, 0.125), "random": (0.0, 0.0625)}
    rows = [same | {"value": 0.125}]
    for shots, gain in ((4, 0.0), (16, 0.1)):
        rows += [
            same
            | {"method": method, "mask_task": method, "mask_shots": shots, "layer": layer,
               "value": value + gain, "low": 0.0, "high": 1.0}
            for method, values in hits.items()
            for layer, value in enumerate(values)
        ]  # fmt: skip
    first, second = added_vectors(frame("results", rows)).to_dicts()
    assert first == {
        "task": "recall", "layer": 1, "mask_shots": 4, "documents": 8, "own": 0.75, "low": 0.0, "high": 1.0,
        "without": 0.125, "other_task": 0.125, "random": 0.0625,
    }  # fmt: skip
    assert (second["mask_shots"], second["own"], second["random"]) == (16, 0.85, 0.1625)
    assert units(frame("results", rows)).is_empty()


def test_means_over_tasks_are_of_tasks_alone_and_never_of_q_values() -> None:
    values = {("recall", 4): 0.25, ("repeat", 4): 0.75, ("file", None): 9.0}
    rows = [
        patch(metric, value, 0, task=task, shots=shots)
        for (task, shots), value in values.items()
        for metric in ("function_vector", "restore_gold_logprob_q_value")
    ]
    found = with_means(frame("results", rows)).filter(pl.col("task") == AGGREGATE)
    assert found.select("shots", "metric", "value").rows() == [(4, "function_vector", 0.5)]


def label_effect(task: str, shots: int, low: float | None, labels: str = "shuffled") -> Row:
    return {
        "experiment": "evaluate", "mask": "clean", "metric": "acc_label_effect", "task": task, "shots": shots,
        "labels": labels, "value": 0.2, "low": low, "high": 0.5,
    }  # fmt: skip


def test_tasks_that_learn_from_labels_are_named_with_their_shots() -> None:
    learnt = [label_effect("recall", 4, 0.1), label_effect("recall", 16, 0.1), label_effect("wic", 4, 0.1)]
    others = [
        label_effect("repeat", 4, -0.1),
        label_effect("rte", 4, None),
        label_effect("repeat", 4, 0.1, "foreign"),
    ]
    assert learnt_sentence(frame("results", learnt + others)) == (
        "Accuracy credibly falls with shuffled labels in recall (at 4, 16 shots) and wic (at 4 shots); "
        "that is not shown for repeat."
    )
    assert learnt_sentence(frame("results", [others[0], label_effect("cb", 4, 0.0)])) == (
        "Accuracy credibly falls with shuffled labels in none of repeat and cb."
    )
    assert learnt_sentence(frame("results", others[1:2])) == ""


@pytest.fixture(scope="module")
def given(given_run: Path) -> RunTables:
    return read_run(given_run)


def test_a_run_without_tasks_has_all_that_others_have(given: RunTables, tmp_path: Path) -> None:
    shutil.copytree(given.folder, tmp_path / "copy")
    publish_run(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy" / "figures").iterdir()}
    assert names == {"patch-heads.svg", "function-vectors.svg"}
    printed = io.StringIO()
    show_summary(given.folder, Console(file=printed, width=100))
    assert "restores" in printed.getvalue()
    assert "function vectors, clean" in printed.getvalue()
    summary = json.loads((given.folder / "summary.json").read_text("utf-8"))
    assert [row["task"] for row in summary["patched_prompts"]] == ["pairs"]
    assert len(summary["answer"]["sentences"]) == 1
    assert summary["answer"]["notes"]
    status = invoke("status", given.folder)
    assert (status.exit_code, "state: finished" in status.output) == (0, True)
    page = run_page(given)
    assert [section.id for section in page.sections] == [
        "map",
        "atlas-section",
        "units",
        "patching",
        "method",
    ]
    assert (given.tasks, given.shots) == (["pairs", "clean"], [None])
    assert payload(given)["start"] == {"task": "pairs", "shots": None}
    assert_frame_equal(given.units, read_table(given.folder / "units.parquet", "units"))
    again = invoke("report", given.folder, given.folder, "--out", tmp_path / "both.html")
    assert again.exit_code == 0, again.output


def test_prompts_that_were_given_say_which_is_which(given: RunTables) -> None:
    (scores,) = prompt_scores(given.results).to_dicts()
    assert (scores["corruption"], scores["pairs"]) == ("given", 2)
    labels = given.results.filter(pl.col("metric") == "gold_logprob")["labels"].to_list()
    assert labels == ["right", "given"]


def test_arrays_of_prompts_that_were_given_are_those_of_the_table(given: RunTables) -> None:
    model = given.record["model"]
    grid = Grid(given.tasks, given.shots, model["layers"], model["heads"])
    restored = grid.values(given.units, "restore")
    records = given.results.filter((pl.col("metric") == "restore_gold_logprob") & pl.col("exact"))
    assert np.isfinite(restored[0]).sum() == len(records) == len(restored[0])
    for row in records.iter_rows(named=True):
        head = model["heads"] if row["head"] is None else row["head"]
        assert restored[0, row["layer"] * (model["heads"] + 1) + head] == row["value"]
    assert np.isnan(restored[1]).all(), "of the prompts of function vectors nothing was restored"


def test_a_section_without_patches_is_none(given: RunTables) -> None:
    empty = RunTables(given.folder, given.record, given.results.clear(), given.units, given.masks, {})
    assert patching_section(empty) is None
    assert payload(empty)["start"] == {"task": "", "shots": None}


def test_the_map_of_patches_holds_heads_and_ffns() -> None:
    record = {"model": {"layers": 1, "heads": 2}}
    with figure_style():
        figure = FIGURES["patch-heads"].draw(effects().filter(pl.col("task") == "recall"), record, Asked())
    assert figure is not None
    restored, broken = (np.asarray(axis.images[0].get_array()) for axis in figure.axes[:2])
    assert restored.tolist() == [[3.0, -1.0, 1.0]]
    assert broken.tolist() == [[0.25, -2.0, 0.0]]
    assert [axis.get_title("left") for axis in figure.axes[:2]] == ["recall, restored", "recall, broken"]
