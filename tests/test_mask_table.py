"""masks.parquet, by hand: what masks remove and keep, what they are compared with, and which are equal."""

from typing import Any

import polars as pl
import pytest

from lowmem_icl.masks.files import MaskFile, MaskModel
from lowmem_icl.masks.mask import Mask
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.mask_table import Judging, mask_table
from lowmem_icl.tables.schema import MASKS

Row = dict[str, Any]
JUDGING = Judging(1, 2, "gold_prob", 0.01)
MODEL = MaskModel(id="demo", model_type="opt", layers=1, heads=2, digest="0")
FIRST = Mask(heads=frozenset({(0, 0)}))


def judged(mask: str, value: float, task: str = "piqa", metric: str = "acc", **more: Any) -> Row:
    """A record of the piqa mask at 1 shot on a task."""
    base = {"experiment": "prune", "procedure": "greedy", "method": "greedy", "mask": mask, "metric": metric}
    own = {"mask_task": "piqa", "mask_shots": 1, "task": task, "shots": 1, "split": "test", "documents": 64}
    return base | own | {"value": value} | more


def clean(value: float, low: float, **more: Any) -> Row:
    base = {"experiment": "evaluate", "task": "piqa", "shots": 1, "mask": "clean", "metric": "acc"}
    return base | {"value": value, "low": low, "chance": 0.5, "split": "test", "documents": 64} | more


def files(made: Row | None = None, scores: Row | None = None, **masks: Mask) -> dict[str, MaskFile]:
    return {name: MaskFile(name, mask, MODEL, made or {}, scores or {}) for name, mask in masks.items()}


def test_a_mask_stands_beside_the_clean_model_on_the_same_documents() -> None:
    results = frame(
        "results",
        [
            clean(0.875, 0.75),
            clean(0.625, 0.5, documents=32, experiment="prune"),
            clean(0.5, 0.5, metric="majority"),
            clean(0.25, 0.0, labels="shuffled"),
            judged("own", 0.75, low=0.5, high=0.875, heads_removed=1, ffns_removed=0, chance=0.5),
            judged("own", 0.0625, metric="gold_prob_drop", low=0.03125, high=0.125),
            judged("own", 0.5, documents=16, procedure="curve-heads"),
        ],
    )
    table = mask_table(results, files(own=FIRST), JUDGING)
    assert table.schema == pl.Schema(MASKS)
    row, fewer = table.to_dicts()
    assert {name: value for name, value in row.items() if value is not None} == {
        "mask": "own", "method": "greedy", "ablation": "zero", "mask_task": "piqa", "mask_shots": 1,
        "experiment": "prune", "procedure": "greedy", "task": "piqa", "shots": 1, "split": "test",
        "heads_removed": 1, "ffns_removed": 0, "removed": ["L0H0"], "kept": ["L0H1", "L0F"], "metric": "acc",
        "value": 0.75, "low": 0.5, "high": 0.875, "clean": 0.875, "clean_low": 0.75, "chance": 0.5,
        "majority": 0.5, "objective": "gold_prob", "loss": 0.0625, "loss_low": 0.03125, "loss_high": 0.125,
        "verdict": "fails", "at_chance": False, "documents": 64,
    }  # fmt: skip
    assert (fewer["clean"], fewer["loss"], fewer["verdict"], fewer["removed"]) == (None, None, None, None)


def test_units_are_listed_once_and_first_where_the_mask_was_made_for() -> None:
    results = frame("results", [judged("own", 0.5, "wic"), judged("own", 0.5), judged("other", 0.5)])
    table = mask_table(results, files(own=FIRST, other=Mask()), JUDGING)
    assert table.select("mask", "task", pl.col("kept").list.len()).rows() == [
        ("own", "piqa", 2), ("own", "wic", None), ("other", "piqa", 3),
    ]  # fmt: skip


def test_equal_masks_name_the_first_and_empty_ones_the_clean_run() -> None:
    results = frame("results", [judged(name, 0.5) for name in ("a", "b", "empty", "c", "missing")])
    table = mask_table(results, files(a=FIRST, b=FIRST, empty=Mask(), c=Mask(ffns=frozenset({0}))), JUDGING)
    assert table["same_as"].to_list() == [None, "a", "clean", None, None]
    assert table["kept"].to_list()[-2:] == [["L0H0", "L0H1"], None]


@pytest.mark.parametrize(("low", "is_at_chance"), [(0.5, True), (0.53125, False), (None, True)])
def test_what_is_at_chance_is_marked(low: float, *, is_at_chance: bool) -> None:
    results = frame("results", [clean(0.625, low), judged("own", 0.5)])
    assert mask_table(results, files(own=FIRST), JUDGING)["at_chance"].to_list() == [is_at_chance]


def test_where_the_clean_model_was_not_evaluated_the_masks_file_says_how_it_did() -> None:
    results = frame(
        "results",
        [judged("own", 0.5), judged("own", 0.0, metric="gold_prob_drop"), judged("own", 0.25, "wic")],
    )
    scores = {"before": {"acc": 0.5}, "at_chance": True}
    own, other = mask_table(results, files(None, scores, own=FIRST), JUDGING).to_dicts()
    assert (own["clean"], own["at_chance"]) == (0.5, True)
    assert (other["clean"], other["at_chance"]) == (None, None)


def test_of_a_given_mask_the_file_says_how_it_was_made() -> None:
    given = judged(
        "own", 0.5, experiment="evaluate", procedure=None, method=None, mask_task=None, mask_shots=None
    )
    for tasks, task in (["piqa"], "piqa"), (["piqa", "wic"], AGGREGATE), ([], None):
        made = {"method": "union", "tasks": tasks, "shots": [1]}
        (row,) = mask_table(frame("results", [given]), files(made, own=FIRST), JUDGING).to_dicts()
        assert (row["method"], row["mask_task"], row["mask_shots"]) == ("union", task, 1)
