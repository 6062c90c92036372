"""The page, its figures and its numbers, from tables made by hand."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report import ablation, agreement, curves, greedy, in_context, induction, page
from lowmem_icl.report.losses import greedy_losses
from lowmem_icl.report.numbers import mean_over_tasks, pruned, subject, top_units
from lowmem_icl.tables.schema import RESULTS

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


def bar_heights(figure: Figure) -> list[float]:
    """Return the heights of the bars in a figure's first panel, ascending."""
    return sorted(bar.get_height() for bar in figure.axes[0].patches if isinstance(bar, Rectangle))


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
    (finding,) = page.unit_findings(results)
    assert "L1F (3.50), L0H1 (2.00*)" in finding


def test_beside_the_costliest_units_stands_what_they_cost_on_documents_that_did_not_pick_them() -> None:
    units = [
        *drops("head", 0, 1, {"piqa": 3.0, AGGREGATE: 2.0}),
        *drops("head", 0, 0, {"piqa": 3.0, AGGREGATE: 1.0}),
        *drops("ffn", 0, None, {"piqa": 3.0, AGGREGATE: 3.0}),
    ]
    (unknown,) = page.unit_findings(table(*units))
    assert "nats of gold log-probability: mean 2.00; single values are picked and measured on the" in unknown
    same: Row = {"experiment": "ablate", "procedure": "top", "metric": "top_drop", "low": 0.5, "high": 1.25}
    judged = table(
        *units,
        *by_task(VALUES, **same, count=3, kind="head"),
        *by_task({"piqa": 7.0, AGGREGATE: 1.5}, **same, count=3),
        *by_task({"piqa": 7.0, AGGREGATE: 9.0}, **same, count=5),
    )
    (known,) = page.unit_findings(judged)
    assert "mean 2.00, on documents that did not pick the units 1.50 [0.50, 1.25]; single values" in known


def test_ffn_bars_leave_out_what_is_out_of_domain() -> None:
    bars = ablation.ffn_drops(table(*drops("ffn", 0, None, VALUES)))
    figure = ablation.ffn_bars(bars)
    assert figure is not None
    assert bar_heights(figure) == [2.0]


def test_in_context_effects_leave_out_what_is_out_of_domain() -> None:
    effects = table(*drops("head", 1, 0, VALUES, metric="icl_effect", low=-1.0, high=1.0))
    assert in_context.difference_rows(effects) == [["L1H0", "4", "2.000", "-1.000 to 1.000"]]


def test_the_grid_leaves_out_what_is_out_of_domain() -> None:
    same: Row = {
        "experiment": "prune", "procedure": "curve-combined", "metric": "acc", "method": "combined",
        "percent": 10, "heads_removed": 1, "ffns_removed": 0, "mask": "combined", "other_task": AGGREGATE,
    }  # fmt: skip
    points = curves.combined_points(table(*by_task({"piqa": 0.1, AGGREGATE: 0.2, "mathqa": 0.9}, **same)))
    assert points["value"].to_list() == [0.2]
    alone = curves.combined_points(table(*by_task({"piqa": 0.1, "mathqa": 0.9}, **same)))
    assert alone["value"].to_list() == [0.1]


def test_greedy_findings_are_of_the_mean_or_of_the_only_task() -> None:
    def masks(values: Mapping[str, float]) -> pl.DataFrame:
        return table(
            *(
                greedy_record(task, task, value, "greedy") | {"heads_removed": 3, "ffns_removed": 1}
                for task, value in values.items()
            )
        )

    (finding,) = page.greedy_findings(
        masks({"piqa": 0.1, "copa": 0.3, AGGREGATE: 0.2, "mathqa": 0.9}), record()
    )
    assert finding == (
        "At 4 shots 3 of 4 heads and 1 of 2 FFNs could be removed together, leaving a mean accuracy of 0.200."
    )
    (finding,) = page.greedy_findings(masks({"piqa": 0.1, "mathqa": 0.9}), record())
    assert "an accuracy on piqa of 0.100" in finding


def test_the_removal_of_induction_heads_is_told_of_the_mean() -> None:
    def removal(metric: str, method: str | None, values: Mapping[str, float]) -> list[Row]:
        # What a mask is called is no matter.
        return by_task(
            values, experiment="induction", procedure="removal", metric=metric, method=method, mask="any",
            heads_removed=2, documents=9, low=0.0, high=0.1,
        )  # fmt: skip

    (sentence,) = induction.removal_note(
        table(
            *removal("acc", None, {"piqa": 0.9, "copa": 0.7, AGGREGATE: 0.8, "mathqa": 0.1}),
            *removal("acc", "induction", {"piqa": 0.5, "copa": 0.3, AGGREGATE: 0.4, "mathqa": 0.1}),
            *removal("acc_drop", "random-median", {"piqa": 0.0, "copa": 0.1, AGGREGATE: 0.05, "mathqa": 0.5}),
        )
    )
    assert "the mean accuracy at 4 shots from 0.800 to 0.400" in sentence
    assert "cost 0.050 (median" in sentence
    (sentence,) = induction.removal_note(
        table(
            *removal("acc", None, {"piqa": 0.9, "mathqa": 0.1}),
            *removal("acc", "induction", {"piqa": 0.5, "mathqa": 0.1}),
        )
    )
    assert "the accuracy of piqa at 4 shots from 0.900 to 0.500" in sentence


def test_where_no_head_was_removed_nothing_is_told_of_it() -> None:
    scores = {"experiment": "induction", "procedure": "scores", "metric": "prefix_matching", "kind": "head"}
    results = table({**scores, "layer": 0, "head": 1, "value": 0.1})
    assert induction.removal_note(results) == []
    section = induction.induction_section(results, record())
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


def test_estimates_agree_with_exact_drops_as_the_mean_over_tasks_says() -> None:
    same = {"experiment": "ablate", "procedure": "agreement", "metric": "estimate_spearman"}
    note = ablation.exactness_note(
        table(
            *drops("head", 0, 0, VALUES),
            *drops("head", 0, 1, VALUES, exact=False, documents=32),
            *by_task({"piqa": 0.5, "copa": 0.7, AGGREGATE: 0.6, "mathqa": 0.0}, method="attribution", **same),
            *by_task({"piqa": 0.1, "copa": 0.3, AGGREGATE: 0.2}, method="attribution-drawn", **same),
        )
    )
    assert note.startswith("3 of 6 drops are exact, on 8 training documents per task;")
    assert "0.60 over all exact units, 0.20 over those drawn at random." in note
    assert ablation.exactness_note(table(*drops("head", 0, 0, VALUES))) == (
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
    assert ablation.compared_drops(results).select("value", "exact").rows() == [(1.5, 1.0)]


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
    figure = greedy.pruning_bars(results)
    assert figure is not None
    assert bar_heights(figure) == [0.1, 0.3]


def test_greedy_masks_stand_with_their_losses_and_what_is_certified() -> None:
    def masks(method: str, **lost: float) -> list[Row]:
        accuracy = greedy_record("piqa", "piqa", 0.8, method) | {"heads_removed": 3, "ffns_removed": 1}
        return [accuracy, accuracy | {"metric": "gold_prob_drop"} | lost]

    results = table(
        *masks("greedy", value=0.05, low=0.03, high=0.07),
        *masks("certified", value=0.001, low=-0.005, high=0.008),
        *masks("random", value=0.02),
    )
    tested = [
        {"task": "piqa", "shots": 4, "certified_units": 4},
        {"task": "copa", "shots": 4, "certified_units": 0},
    ]
    run = record() | {"certificates": tested}
    losses = greedy_losses(results, run)
    assert {mask.method: loss.verdict for mask, loss in losses.items()} == {
        "greedy": "fails", "certified": "holds", "random": "cannot tell"
    }  # fmt: skip
    section = greedy.greedy_section(results, run)
    assert section is not None
    assert "No mask is certified for copa at 4 shots." in section.text
    cells = {row[2]: list(row[-3:]) for row in section.rows}
    assert cells["greedy"] == ["0.050", "0.030 to 0.070", "fails"]
    assert cells["certified"] == ["0.001", "-0.005 to 0.008", "holds"]
    assert cells["random"] == ["0.020", "", "cannot tell"]


def curve_record(procedure: str, method: str, percent: int, value: float, **columns: Any) -> Row:
    return {
        "experiment": "prune", "procedure": procedure, "metric": "acc", "task": "piqa", "shots": 4,
        "kind": "head", "method": method, "percent": percent, "value": value, "stderr": 0.1, "low": 0.0,
        "high": 1.0, **columns,
    }  # fmt: skip


def test_panels_of_curves_hold_the_curves_of_their_shot_count() -> None:
    points = table(
        *(curve_record("curve-heads", "gradient", percent, 0.9) for percent in (0, 10)),
        *(curve_record("curve-heads", "gradient", percent, 0.8, other_task=AGGREGATE) for percent in (0, 10)),
        *(
            curve_record("cross-shot", "gradient", percent, 0.1, other_task="piqa", other_shots=16)
            for percent in (10, 30)
        ),
        *(curve_record("random", "random", percent, 0.5) for percent in (0, 10)),
        *(
            curve_record("random", "random", percent, 0.2, seed=42, mask=f"random-{percent}")
            for percent in (0, 10)
        ),
    )
    figure = curves.pruning_curves(points, "head")
    assert figure is not None
    (axis,) = figure.axes
    handles = axis.get_legend_handles_labels()[1]
    assert sorted(handles) == ["own ranking", "random draws", "ranking of all tasks"]
    drawn = [tuple(np.asarray(line.get_ydata()).tolist()) for line in axis.lines]
    assert sorted(drawn) == [(0.5, 0.5), (0.8, 0.8), (0.9, 0.9)]


def test_knees_stand_beside_what_they_cost() -> None:
    rows = curves.knee_rows(
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

    note = greedy.replacement_note(
        [
            loss("piqa", "greedy", 0.3), loss("piqa", "gradient", 0.1),
            loss("copa", "greedy", 0.1), loss("copa", "gradient", 0.3),
        ]
    )  # fmt: skip
    assert note.endswith("returned instead, for piqa at 4 shots.")
    assert greedy.replacement_note([]) == ""


def test_a_run_without_numbers_has_a_page_without_sections() -> None:
    assert not page.run_report(table(), record()).sections
    reference = record(options=record()["options"] | {"protocol": "reference"})
    (section,) = page.run_report(table(), reference).sections
    assert section.title == "Protocol"
