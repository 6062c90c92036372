"""Means over tasks are made in one place, leave out what is out of domain, and are as computed by hand."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.blocks import frame


def record(task: str, value: float, **fields: Any) -> dict[str, Any]:
    base = {
        "experiment": "evaluate",
        "task": task,
        "shots": 1,
        "split": "validation",
        "mask": "clean",
        "metric": "acc",
    }
    measured = {"value": value, "stderr": 0.1, "low": value - 0.2, "high": value + 0.3}
    return base | measured | {"chance": 0.5, "documents": 10, "exact": True} | fields


def test_the_mean_is_of_all_tasks_in_the_domain() -> None:
    records = [record("piqa", 0.5), record("copa", 0.7), record("mathqa", 0.0), record("lambada", 0.0)]
    (mean,) = over_tasks(frame("results", records)).to_dicts()
    assert mean["task"] == "aggregate"
    assert mean["value"] == np.mean([0.5, 0.7])
    assert mean["stderr"] == pytest.approx(np.sqrt(2 * 0.01) / 2)
    assert mean["low"] == pytest.approx(0.6 - np.sqrt(2 * 0.04) / 2)
    assert mean["high"] == pytest.approx(0.6 + np.sqrt(2 * 0.09) / 2)
    assert (mean["chance"], mean["documents"], mean["split"]) == (0.5, 20, "validation")


def test_numbers_that_one_task_lacks_have_no_mean() -> None:
    records = [record("piqa", 0.5), record("copa", 0.7), record("piqa", 0.1, metric="f1")]
    assert over_tasks(frame("results", records))["metric"].to_list() == ["acc"]
    assert over_tasks(frame("results", [record("piqa", 0.5), record("mathqa", 0.5)])).is_empty()


def test_a_tasks_own_metric_counts_as_its_accuracy() -> None:
    records = [record("piqa", 0.5), record("record", 0.9, metric="em", split="test")]
    (mean,) = over_tasks(frame("results", records)).to_dicts()
    assert (mean["metric"], mean["value"], mean["split"]) == ("acc", 0.7, None)


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_a_task_without_an_error_is_left_out_of_the_bounds(unknown: float | None) -> None:
    nothing = {"stderr": unknown, "low": unknown, "high": unknown}
    records = [record("piqa", 0.4), record("copa", 0.5), record("boolq", 0.9, **nothing)]
    (mean,) = over_tasks(frame("results", records)).to_dicts()
    assert mean["value"] == pytest.approx(0.6)
    # As if its error were that of the other two: three members of equal reach.
    assert mean["low"] == pytest.approx(0.6 - 0.2 / np.sqrt(3))
    assert mean["high"] == pytest.approx(0.6 + 0.3 / np.sqrt(3))
    (alone,) = over_tasks(frame("results", [record(task, 0.5, **nothing) for task in ("a", "b")])).to_dicts()
    assert (alone["stderr"], alone["low"], alone["high"]) == (None, None, None)


def test_where_a_task_has_an_error_but_no_interval_the_mean_has_none() -> None:
    records = [record("piqa", 0.4), record("copa", 0.5, low=None, high=None)]
    (mean,) = over_tasks(frame("results", records)).to_dicts()
    assert (mean["low"], mean["high"]) == (None, None)
    assert mean["stderr"] == pytest.approx(np.sqrt(2 * 0.01) / 2)


def test_what_tasks_prune_by_their_own_rankings_is_one_thing() -> None:
    records = [
        record(
            task,
            value,
            procedure="curve-heads",
            percent=10,
            mask=f"gradient-{task}",
            mask_task=task,
            mask_shots=1,
        )
        for task, value in (("piqa", 0.4), ("copa", 0.6))
    ]
    records += [
        record(
            task,
            value,
            procedure="curve-heads",
            percent=10,
            mask="gradient-all",
            mask_task="aggregate",
            mask_shots=1,
        )
        | {"other_task": "aggregate", "other_shots": 1}
        for task, value in (("piqa", 0.1), ("copa", 0.3))
    ]
    own, shared = over_tasks(frame("results", records)).sort("value", descending=True).to_dicts()
    assert (own["value"], own["mask"], own["other_task"]) == (0.5, None, None)
    assert (shared["value"], shared["mask"], shared["other_task"]) == (0.2, "gradient-all", "aggregate")


def test_units_have_means_of_their_own() -> None:
    blocks = [
        {
            "task": task,
            "shots": 0,
            "metric": "gold_prob_drop",
            "kind": "head",
            "layer": np.arange(3),
            "head": 0,
        }
        | {
            "value": values,
            "stderr": np.ones(3),
            "exact": True,
            "documents": 4,
            "heads_removed": 1,
            "ffns_removed": 0,
        }
        for task, values in (("piqa", np.arange(3.0)), ("copa", np.arange(3.0) + 2))
    ]
    means = over_tasks(frame("results", blocks)).sort("layer")
    assert means["value"].to_list() == [1.0, 2.0, 3.0]
    assert set(means["ablation"]) == {"zero"}


def test_a_mean_with_an_estimate_in_it_is_not_exact() -> None:
    means = over_tasks(frame("results", [record("piqa", 0.5), record("copa", 0.7, exact=False)]))
    assert means["exact"].to_list() == [False]


def test_labels_and_ablation_follow_from_the_rest() -> None:
    records = [
        record("piqa", 0.5),
        record("piqa", 0.5, shots=0, mask="m", heads_removed=2),
        record("piqa", 0.5, shots=None),
    ]
    table = frame("results", records)
    assert table["labels"].to_list() == ["right", None, None]
    assert table["ablation"].to_list() == [None, "zero", None]
    assert table.schema == pl.Schema(frame("results", []).schema)
