"""units.parquet, by hand: one record per setting and unit, and what each column is filled from."""

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.masks.files import MaskFile, MaskModel
from lowmem_icl.masks.mask import Mask
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.mask_table import Judging, mask_table
from lowmem_icl.tables.schema import UNITS
from lowmem_icl.tables.unit_table import unit_table

Row = dict[str, Any]
JUDGING = Judging(1, 2, "gold_prob", 0.01)
MODEL = MaskModel(id="demo", model_type="opt", layers=1, heads=2, digest="0")


def of_unit(experiment: str, metric: str, value: float, head: int | None, **more: Any) -> Row:
    """A record about a unit of layer 0: a head, or the FFN where `head` is None."""
    kind = "ffn" if head is None else "head"
    base = {
        "experiment": experiment,
        "metric": metric,
        "value": value,
        "kind": kind,
        "layer": 0,
        "head": head,
    }
    return base | {"task": "piqa", "shots": 1, "exact": True, "documents": 32} | more


def greedy_masks(removed: Mask) -> pl.DataFrame:
    name = "greedy-piqa-1shot"
    judged = {
        "experiment": "prune", "procedure": "greedy", "method": "greedy", "mask": name, "mask_task": "piqa",
        "mask_shots": 1, "task": "piqa", "shots": 1, "metric": "acc", "value": 0.8,
    }  # fmt: skip
    return mask_table(frame("results", [judged]), {name: MaskFile(name, removed, MODEL, {})}, JUDGING)


def no_masks() -> pl.DataFrame:
    return mask_table(frame("results", []), {}, JUDGING)


def test_every_column_comes_from_its_own_records() -> None:
    ablate: Row = {"procedure": "single", "method": "ablation"}
    results = frame(
        "results",
        [
            of_unit("ablate", "gold_logprob_drop", 0.5, 0, low=0.25, high=0.75, **ablate),
            of_unit("ablate", "gold_logprob_drop", 2.0, None, exact=False, **ablate),
            of_unit("ablate", "acc_drop", 0.125, 0, low=-0.5, high=0.5, **ablate),
            of_unit("ablate", "q_value", 0.03, 0, **ablate),
            of_unit("ablate", "acc_drop_q_value", 0.75, 0, **ablate),
            of_unit("ablate", "documents_hurt", 9.0, 0, **ablate),
            of_unit("ablate", "icl_effect", -1.0, 0, low=-2.0, high=0.0, procedure="icl-effect"),
            of_unit("importance", "gradient", 7.0, 0),
            of_unit("importance", "gradient", 5.0, 1),
            of_unit("induction", "prefix_matching", 0.875, 1, task=None, shots=None),
        ],
    )
    table = unit_table(results, greedy_masks(Mask(heads=frozenset({(0, 0)}))))
    assert table.schema == pl.Schema(UNITS)
    assert table["unit"].to_list() == ["L0H0", "L0H1", "L0F"]
    first, second, ffn = table.to_dicts()
    assert {name: value for name, value in first.items() if value is not None} == {
        "task": "piqa", "shots": 1, "unit": "L0H0", "kind": "head", "layer": 0, "head": 0, "drop": 0.5,
        "low": 0.25, "high": 0.75, "exact": True, "q_value": 0.03, "documents_hurt": 9, "acc_drop": 0.125,
        "acc_drop_low": -0.5, "acc_drop_high": 0.5, "acc_drop_q_value": 0.75, "icl_effect": -1.0,
        "icl_effect_low": -2.0, "icl_effect_high": 0.0, "gradient": 7.0, "rank": 2, "kept": False,
        "documents": 32,
    }  # fmt: skip
    assert (second["gradient"], second["drop"], second["rank"], second["kept"]) == (5.0, None, None, True)
    assert second["prefix_matching"] == 0.875
    assert (ffn["drop"], ffn["exact"], ffn["rank"], ffn["kept"]) == (2.0, False, 1, True)


def test_units_of_a_setting_without_a_search_are_neither_kept_nor_removed() -> None:
    results = frame("results", [of_unit("ablate", "gold_logprob_drop", 1.0, 0, shots=5)])
    assert unit_table(results, greedy_masks(Mask()))["kept"].to_list() == [None]
    assert unit_table(results, no_masks())["kept"].to_list() == [None]


def test_a_mask_that_removes_everything_keeps_nothing() -> None:
    results = frame("results", [of_unit("ablate", "gold_logprob_drop", 1.0, head) for head in (0, 1, None)])
    all_of_it = Mask(frozenset({(0, 0), (0, 1)}), frozenset({0}))
    assert unit_table(results, greedy_masks(all_of_it))["kept"].to_list() == [False] * 3
    assert unit_table(results, greedy_masks(Mask()))["kept"].to_list() == [True] * 3


def test_the_mean_over_tasks_stands_last_and_units_in_the_order_of_the_layers() -> None:
    results = frame(
        "results",
        [
            of_unit("ablate", "gold_logprob_drop", 1.0, head, task=task, shots=shots)
            for task, shots, head in (
                (AGGREGATE, 1, 0),
                ("wic", 1, None),
                ("wic", 1, 1),
                ("wic", 0, 0),
                ("cb", 1, 0),
            )
        ],
    )
    assert unit_table(results, no_masks()).select("task", "shots", "unit").rows() == [
        ("wic", 0, "L0H0"), ("wic", 1, "L0H1"), ("wic", 1, "L0F"), ("cb", 1, "L0H0"), (AGGREGATE, 1, "L0H0"),
    ]  # fmt: skip


def test_heads_that_were_only_scored_have_a_record_each() -> None:
    results = frame(
        "results",
        [of_unit("induction", "prefix_matching", 0.5, head, task=None, shots=None) for head in (1, 0)],
    )
    assert unit_table(results, no_masks()).select("task", "unit", "prefix_matching").rows() == [
        (None, "L0H0", 0.5), (None, "L0H1", 0.5),
    ]  # fmt: skip
    assert unit_table(frame("results", []), no_masks()).is_empty()


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, -2.0]), min_size=1, max_size=8))
def test_ranks_are_a_numbering_by_falling_drop(drops: list[float]) -> None:
    results = frame(
        "results", [of_unit("ablate", "gold_logprob_drop", drop, head) for head, drop in enumerate(drops)]
    )
    ranks = unit_table(results, no_masks())["rank"].to_list()
    assert sorted(ranks) == list(range(1, len(drops) + 1))
    by_rank = [drops[ranks.index(rank)] for rank in sorted(ranks)]
    assert by_rank == sorted(drops, reverse=True)
    assert ranks.index(1) == drops.index(max(drops)), "of equals the first"


@pytest.mark.parametrize("metric", ["gold_logprob_drop", "acc_drop"])
def test_what_screening_estimates_is_not_exact(metric: str) -> None:
    results = frame(
        "results", [of_unit("ablate", metric, 1.0, 0, exact=False, method="attribution", documents=7)]
    )
    (row,) = unit_table(results, no_masks()).to_dicts()
    is_drop = metric == "gold_logprob_drop"
    assert (row["exact"], row["documents"]) == ((False, 7) if is_drop else (None, None))
