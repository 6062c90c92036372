"""The page's sections and the numbers for its script, from tables made by hand."""

import itertools
import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from lowmem_icl.masks.files import MaskFile, MaskModel
from lowmem_icl.masks.mask import Mask
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.losses import greedy_losses
from lowmem_icl.report.numbers import compared_drops, mean_over_tasks, pruned, subject, top_units
from lowmem_icl.report.page.payload import agreement as agreement_matrices
from lowmem_icl.report.page.payload import curves, grid_points
from lowmem_icl.report.page.sections import agreement, induction, masks, pruning, units
from lowmem_icl.report.page.write import run_page
from lowmem_icl.report.run_tables import RunTables, judging_of
from lowmem_icl.tables.mask_table import mask_table
from lowmem_icl.tables.schema import RESULTS
from lowmem_icl.tables.unit_table import unit_table

Row = dict[str, Any]
# Two tasks in domain, whose mean the tables hold, and one out of domain, far away from it.
VALUES = {"piqa": 1.0, "copa": 3.0, AGGREGATE: 2.0, "mathqa": 50.0}


def table(*records: Mapping[str, Any]) -> pl.DataFrame:
    """Return results with these records."""
    return pl.DataFrame(list(records), schema=RESULTS)


def by_task(values: Mapping[str, float] = VALUES, **columns: Any) -> list[Row]:
    """Return a record per task."""
    return [{"task": task, "shots": 4, "value": value, **columns} for task, value in values.items()]


def drops(kind: str, layer: int, head: int | None, values: Mapping[str, float], **columns: Any) -> list[Row]:
    """Return what removing a unit alone costs each task."""
    same: Row = {
        "experiment": "ablate", "procedure": "single", "metric": "gold_logprob_drop", "method": "ablation",
        "kind": kind, "layer": layer, "head": head, "exact": True, "documents": 8,
    }  # fmt: skip
    return by_task(values, **(same | columns))


def record(**more: Any) -> Row:
    """Return as much of a run.json as the page reads."""
    return {
        "state": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "command": "lowmem-icl run",
        "model": {"id": "demo", "weights": "int8", "layers": 2, "heads": 2, "digest": "0" * 64},
        "options": {
            "protocol": "corrected", "seed": 42, "tolerance": 0.01, "objective": "gold_prob",
            "experiments": ["evaluate"],
        },
        "machine": {"processor": "x86_64", "threads": 2, "cuda": None},
        "versions": {"torch": "2"},
        "tasks": [{"task": "piqa"}],
        "shots": [4],
        "stages": {"evaluate": {"seconds": 1.5}},
        "warnings": [],
    } | more  # fmt: skip


def run_of(results: pl.DataFrame, run: Mapping[str, Any] | None = None) -> RunTables:
    """Return the tables of a run without mask files."""
    run = record() if run is None else run
    masks_frame = mask_table(results, {}, judging_of(run))
    return RunTables(Path("run"), run, results, unit_table(results, masks_frame), masks_frame, {})


def test_a_mean_is_the_tables_or_the_only_tasks() -> None:
    assert mean_over_tasks(table(*by_task()))["value"].to_list() == [2]
    assert subject(mean_over_tasks(table(*by_task()))) == "mean over tasks"
    only = mean_over_tasks(table(*by_task({"piqa": 1.0, "mathqa": 50.0})))
    assert (only["task"].to_list(), subject(only)) == (["piqa"], "piqa")
    assert mean_over_tasks(table(*by_task({"mathqa": 50.0})))["task"].to_list() == ["mathqa"]
    assert mean_over_tasks(table(*by_task({"piqa": 1.0, "copa": 3.0}))).is_empty(), "no mean of its own"
    assert mean_over_tasks(table()).is_empty()


def test_headline_units_leave_out_what_is_out_of_domain() -> None:
    results = table(
        *drops("head", 0, 1, VALUES),
        *drops("ffn", 1, None, {"piqa": 2.0, "copa": 5.0, AGGREGATE: 3.5, "mathqa": 0.0}),
        *drops("head", 0, 1, {"piqa": 0.9, AGGREGATE: 0.01, "mathqa": 0.0}, metric="q_value"),
    )
    assert top_units(results).select("kind", "layer", "head", "value", "q_value").rows() == [
        ("ffn", 1, None, 3.5, None),
        ("head", 0, 1, 2.0, 0.01),
    ]


def test_the_removal_of_induction_heads_is_told_of_the_mean() -> None:
    def removal(metric: str, method: str | None, values: Mapping[str, float]) -> list[Row]:
        # What a mask is called is no matter.
        return by_task(
            values, experiment="induction", procedure="removal", metric=metric, method=method, mask="any",
            heads_removed=2, documents=9, low=0.0, high=0.1,
        )  # fmt: skip

    def told(*rows: Row) -> str:
        section = induction.induction_section(run_of(table(*rows)))
        assert section is not None
        return section.text

    text = told(
        *removal("acc", None, {"piqa": 0.9, "copa": 0.7, AGGREGATE: 0.8, "mathqa": 0.1}),
        *removal("acc", "induction", {"piqa": 0.5, "copa": 0.3, AGGREGATE: 0.4, "mathqa": 0.1}),
        *removal("acc_drop", "induction", {"piqa": 0.4, "copa": 0.4, AGGREGATE: 0.4, "mathqa": 0.0}),
        *removal("acc_drop", "random-median", {"piqa": 0.0, "copa": 0.1, AGGREGATE: 0.05, "mathqa": 0.5}),
    )
    assert "the mean accuracy of piqa and copa at 4 shots from 0.800 to 0.400" in text
    assert "cost 0.050 (95 % of draws: 0.000 to 0.100)" in text
    text = told(
        *removal("acc", None, {"piqa": 0.9, "mathqa": 0.1}),
        *removal("acc", "induction", {"piqa": 0.5, "mathqa": 0.1}),
        *removal("acc_drop", "induction", {"piqa": 0.4, "mathqa": 0.0}),
    )
    assert "the accuracy of piqa at 4 shots from 0.900 to 0.500" in text


def test_where_no_head_was_removed_nothing_is_told_of_it() -> None:
    scores = {"experiment": "induction", "procedure": "scores", "metric": "prefix_matching", "kind": "head"}
    results = table({**scores, "layer": 0, "head": 1, "value": 0.1})
    section = induction.induction_section(run_of(results))
    assert section is not None
    assert section.text == "No head reaches a prefix-matching score of 0.3."


def overlap(task: str, other: str, metric: str, value: float, shots: int = 4, **columns: Any) -> Row:
    return {
        "experiment": "overlap", "task": task, "shots": 4, "method": "gradient", "other_task": other,
        "other_shots": shots, "other_method": "gradient", "metric": metric, "value": value, **columns,
    }  # fmt: skip


def test_agreement_leaves_out_what_is_out_of_domain() -> None:
    found = table(
        overlap("copa", "piqa", "spearman", 0.5),
        overlap("copa", "piqa", "kendall", 0.4),
        overlap("copa", "piqa", "top_overlap", 0.7, percent=30),
        overlap("copa", "piqa", "top_overlap", 0.1, percent=10),
        overlap("copa", "mathqa", "spearman", -0.9),
        overlap("lambada", "piqa", "spearman", -0.9),
        overlap("lambada", "mathqa", "spearman", -0.9),
        overlap(AGGREGATE, "piqa", "spearman", 0.95),
        overlap("mathqa", "mathqa", "spearman", -0.9, shots=16),
        overlap("piqa", "piqa", "spearman", 0.8, shots=16),
        *(
            overlap(task, "", "split_half", 0.25) | {"other_task": None, "other_shots": None}
            for task in ("copa", "piqa", "mathqa")
        ),
    )
    assert agreement.agreement_rows(found) == [
        ["gradient", "4", "other tasks", "1", "0.500", "", "0.250", "0.400", "0.700", ""],
        ["gradient", "4", "itself at 16 shots", "1", "0.800", "", "", "", "", ""],
    ]


def test_an_unknown_agreement_is_no_number() -> None:
    pairs = [("piqa", "copa", 0.5), ("piqa", "rte", 0.9)]
    results = table(*(
        {"experiment": "overlap", "metric": "spearman", "method": "gradient", "other_method": "gradient",
         "task": left, "other_task": right, "shots": 4, "other_shots": 4, "value": value}
        for left, right, value in pairs
    ))  # fmt: skip
    (matrix,) = agreement_matrices(results)
    values = dict(zip(matrix["tasks"], matrix["values"], strict=True))
    unknown = values["copa"][matrix["tasks"].index("rte")]
    assert math.isnan(unknown)
    assert values["rte"][matrix["tasks"].index("piqa")] == 0.9


def test_estimates_agree_with_exact_drops_as_the_mean_over_tasks_says() -> None:
    same = {"experiment": "ablate", "procedure": "agreement", "metric": "estimate_spearman"}
    note = units.exactness_note(
        table(
            *drops("head", 0, 0, VALUES),
            *drops("head", 0, 1, VALUES, exact=False, documents=32),
            *by_task({"piqa": 0.5, "copa": 0.7, AGGREGATE: 0.6, "mathqa": 0.0}, method="attribution", **same),
            *by_task({"piqa": 0.1, "copa": 0.3, AGGREGATE: 0.2}, method="attribution-drawn", **same),
        )
    )
    assert note.startswith("3 of 6 drops are exact, on 8 training documents per task;")
    assert "0.60 over all exact units, 0.20 over those drawn at random." in note
    assert units.exactness_note(table(*drops("head", 0, 0, VALUES))) == (
        "Every unit was ablated exactly, on 8 training documents per task."
    )


def test_estimates_are_compared_with_exact_drops_alone() -> None:
    attribution = {"experiment": "importance", "metric": "attribution", "method": "attribution"}
    results = table(
        *drops("head", 0, 0, {"piqa": 1.0}),
        *drops("head", 0, 1, {"piqa": 0.7}, exact=False, method="attribution"),
        *drops("head", 0, 0, {"piqa": 1.5}, **attribution),
        *drops("head", 0, 1, {"piqa": 0.7}, **attribution),
    )
    assert compared_drops(results).select("value", "exact").rows() == [(1.5, 1.0)]


def greedy_record(task: str, mask_task: str, value: float, method: str, mask: str = "mask") -> Row:
    return {
        "experiment": "prune", "procedure": "greedy", "metric": "acc", "task": task, "shots": 4,
        "value": value, "method": method, "mask": mask, "mask_task": mask_task, "mask_shots": 4,
    }  # fmt: skip


def test_greedy_masks_are_told_by_their_columns() -> None:
    tricky = "x-aggregate-y"
    results = table(
        greedy_record(tricky, tricky, 0.1, "greedy", f"greedy-{tricky}-4shot"),
        greedy_record(tricky, AGGREGATE, 0.2, "greedy"),
        greedy_record(AGGREGATE, AGGREGATE, 0.3, "greedy"),
        {
            "experiment": "prune", "procedure": "curve-heads", "metric": "acc", "task": tricky, "shots": 4,
            "value": 0.4, "percent": 10, "mask_task": tricky,
        },
    )  # fmt: skip
    assert pruned(results).select("task", "value").rows() == [(AGGREGATE, 0.3), (tricky, 0.1)]


def test_greedy_masks_stand_with_their_losses_and_what_is_certified() -> None:
    def searched(method: str, **lost: float) -> list[Row]:
        name = f"{method}-piqa-4shot"
        accuracy = greedy_record("piqa", "piqa", 0.8, method, name) | {"heads_removed": 3, "ffns_removed": 1}
        return [accuracy, accuracy | {"metric": "gold_prob_drop"} | lost]

    results = table(
        *searched("greedy", value=0.05, low=0.03, high=0.07),
        *searched("certified", value=0.001, low=-0.005, high=0.008),
        *searched("random", value=0.02),
    )
    tested = [
        {"task": "piqa", "shots": 4, "certified_units": 4},
        {"task": "copa", "shots": 4, "certified_units": 0},
    ]
    run = record() | {"certificates": tested}
    losses = greedy_losses(run_of(results, run).masks)
    assert {mask.method: loss.verdict for mask, loss in losses.items()} == {
        "greedy": "fails", "certified": "holds", "random": "cannot tell"
    }  # fmt: skip
    section = masks.masks_section(run_of(results, run))
    assert section is not None
    assert "No mask is certified for copa at 4 shots." in section.text
    (row,) = section.data
    assert (row.removed, row.greedy, row.compared) == ("3H 1F", "0.800", ["", "0.800"])
    assert (row.loss, row.verdict, row.certified) == ("0.050 [0.030, 0.070]", "fails", "3H 1F")
    assert row.command == "", "no file of it is in the folder"


def test_the_command_judges_a_mask_on_what_the_run_was_judged_on() -> None:
    rows = [greedy_record(task, task, 0.8, "greedy") for task in ("my task.jsonl", AGGREGATE)]
    same = {"heads_removed": 0, "ffns_removed": 0}
    results = table(*({**row, **same, "mask": f"greedy-{number}"} for number, row in enumerate(rows)))
    options = {
        "model": "st/o'neill", "tasks": ["/rows/my task.jsonl", "copa"], "data_dir": "/rows", "limit": 16,
        "protocol": "corrected", "seed": 7, "bos": False, "revision": None, "weights": "int8",
    }  # fmt: skip
    run = run_of(results, record(tasks=[{"task": "my task.jsonl"}], options=record()["options"] | options))
    model = MaskModel(id="demo", model_type="opt", layers=2, heads=2, digest="0")
    files = {name: MaskFile(name, Mask(), model, {}) for name in ("greedy-0", "greedy-1")}
    commands = [shlex.split(row.command) for row in masks.mask_rows(replace(run, mask_files=files))]
    own, mean = [dict(itertools.pairwise(words)) for words in commands]
    assert (own["--tasks"], mean["--tasks"]) == ("/rows/my task.jsonl", "/rows/my task.jsonl,copa")
    assert (own["--model"], own["--data-dir"], own["--limit"], own["--shots"], own["--seed"]) == (
        "st/o'neill", "/rows", "16", "4", "7"
    )  # fmt: skip
    assert "--no-bos" in commands[0]
    assert not {"--protocol", "--revision", "--weights"} & set(commands[0]), "what is by default"


def curve_record(procedure: str, method: str, percent: int, value: float, **columns: Any) -> Row:
    return {
        "experiment": "prune", "procedure": procedure, "metric": "acc", "task": "piqa", "shots": 4,
        "kind": "head", "method": method, "percent": percent, "value": value, "stderr": 0.1, "low": 0.0,
        "high": 1.0, **columns,
    }  # fmt: skip


def test_knees_stand_beside_what_they_cost() -> None:
    rows = pruning.knee_rows(
        table(
            curve_record("curve-heads", "gradient", 30, 30.0, metric="knee"),
            curve_record("curve-heads", "gradient", 30, 0.015, metric="knee_acc_drop", low=-0.01, high=0.03),
            curve_record("curve-heads", "gradient", 10, 10.0, metric="knee_certain"),
            curve_record("curve-ffns", "ablation", 0, 0.0, metric="knee", kind="ffn", other_task=AGGREGATE),
        )
    )
    assert rows == [
        ["piqa", "4", "heads", "own", "30 %", "10 %", "+1.5 (-1.0 to +3.0)"],
        ["piqa", "4", "FFNs", "of all tasks", "0 %", "", ""],
    ]


def test_a_better_mask_of_equal_size_is_named() -> None:
    def loss(task: str, method: str, value: float) -> Row:
        return {"task": task, "shots": 4, "method": method, "check_loss": value}

    note = masks.replacement_note(
        [
            loss("piqa", "greedy", 0.3), loss("piqa", "gradient", 0.1),
            loss("copa", "greedy", 0.1), loss("copa", "gradient", 0.3),
        ]
    )  # fmt: skip
    assert note.endswith("returned instead, for piqa at 4 shots.")
    assert masks.replacement_note([]) == ""


def test_curves_are_those_of_their_shot_count_by_what_is_removed() -> None:
    def levels(procedure: str, method: str, value: float, **columns: Any) -> list[Row]:
        removed = {0: 0, 10: 1, 20: 1}
        return [
            curve_record(procedure, method, percent, value, heads_removed=heads, ffns_removed=0, **columns)
            for percent, heads in removed.items()
        ]

    results = table(
        *levels("curve-heads", "gradient", 0.9),
        *levels("curve-heads", "gradient", 0.8, other_task=AGGREGATE, other_shots=4),
        *levels("cross-shot", "gradient", 0.1, other_task="piqa", other_shots=16),
        *levels("random", "random", 0.5),
        *levels("random", "random", 0.2, seed=42, mask="random-drawn"),
        curve_record("curve-heads", "gradient", 20, 20.0, metric="knee", heads_removed=1),
    )
    found = {curve["label"]: curve for curve in curves(results, "head", record()["model"])}
    assert set(found) == {"own ranking", "ranking of all tasks", "random"}
    assert {label: curve["y"] for label, curve in found.items()} == {
        "own ranking": [0.9, 0.9], "ranking of all tasks": [0.8, 0.8], "random": [0.5, 0.5]
    }  # fmt: skip
    assert found["own ranking"]["x"] == [0, 1], "two levels that remove one head are one point"
    assert found["own ranking"]["knee"] == 1


def test_the_grid_is_of_heads_and_ffns_together() -> None:
    same: Row = {
        "experiment": "prune", "procedure": "curve-combined", "metric": "acc", "method": "combined",
        "percent": 10, "heads_removed": 1, "ffns_removed": 2, "mask": "combined", "other_task": AGGREGATE,
    }  # fmt: skip
    points = grid_points(table(*by_task({"piqa": 0.1, AGGREGATE: 0.2}, **same)), record()["model"])
    removed = [(point["heads_removed"], point["ffns_removed"]) for point in points]
    assert removed == [(1, 2), (1, 2)]
    assert {point["task"]: point["value"] for point in points} == {"piqa": 0.1, AGGREGATE: 0.2}


def test_a_page_counts_the_tasks_of_runs_with_and_without_a_mean() -> None:
    own = [{"task": "piqa"}, {"task": "mathqa"}]
    for results, tasks in ((table(), own), (table(*by_task({AGGREGATE: 0.5}, metric="acc")), own)):
        assert "; 2 tasks; 4 demonstrations" in run_page(run_of(results, record(tasks=tasks))).lead


def test_a_run_without_numbers_has_a_page_that_says_how_it_was_made() -> None:
    (section,) = run_page(run_of(table())).sections
    assert section.title == "Method"
    assert section.table is None
    reference = record(options=record()["options"] | {"protocol": "reference"})
    (section,) = run_page(run_of(table(), reference)).sections
    assert section.table is not None
    assert len(section.table.rows) > 5
