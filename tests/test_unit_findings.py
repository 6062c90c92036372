"""What the answer of a run says of units: which matter, which are induction heads, and their names."""

from collections.abc import Mapping
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_findings import DRAWS, HEADS, JUDGING, LAYERS, Row, answer_of, clean, removal

from lowmem_icl.experiments.induction.measure import HEAD_SCORE
from lowmem_icl.masks.mask import Mask, all_ffns, all_heads
from lowmem_icl.report.findings.above_chance import mean_above_chance, settings_of
from lowmem_icl.report.findings.headline import headline_units
from lowmem_icl.report.findings.wording import MOST_NAMED, listed, span_text, units_text
from lowmem_icl.report.numbers import INDUCTION_SCORE
from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.mask_table import mask_table
from lowmem_icl.tables.unit_table import unit_table


def scored(layer: int, head: int, score: float) -> Row:
    base = {"experiment": "induction", "metric": "prefix_matching", "kind": "head"}
    return base | {"layer": layer, "head": head, "value": score}


def test_induction_heads_stand_beside_random_heads_of_equal_number() -> None:
    rows = [*clean("recall", 0.9, 0.8, 0.95), *removal("recall", 0.9, 0.25, 0.125)]
    heads = {"induction-heads": Mask(heads=frozenset({(1, 0), (0, 2)}))}
    assert answer_of(rows, heads).sentences[0] == (
        "Removing the 2 induction heads (L0H2 L1H0) takes the accuracy of recall at 4 shots"
        " from 0.900 to 0.250 [0.125, 0.375]; 2 random heads of the same layers cost 0.125 (95 % of "
        "draws: 0.125 to 0.125)."
    )
    three = [scored(0, 1, 0.3), scored(0, 2, 0.9), scored(1, 0, 0.8), scored(1, 1, 0.2)]
    assert (
        "Removing the 2 strongest of 3 induction heads (L0H2 L1H0) together takes"
        in (answer_of([*rows, *three], heads).sentences[0])
    )
    assert (
        "Removing the 2 induction heads (L0H2 L1H0) takes"
        in (answer_of([*rows, *three[1:]], heads).sentences[0])
    )
    assert INDUCTION_SCORE == HEAD_SCORE
    no_more = answer_of([*clean("recall", 0.9, 0.8, 0.95), *removal("recall", 0.9, 0.875, 0.125)])
    assert no_more.sentences[0].endswith("so they cost no more than random heads may.")
    for left_out, text in ((4, "cost 0.125 (one draw)."), (3, "cost 0.125 (too few draws for a band).")):
        few = answer_of([row for row in rows if row.get("mask") not in DRAWS[:left_out]], heads)
        assert few.sentences[0].endswith(text)
    alone = [row for row in rows if row.get("method") != "random"]
    assert (
        answer_of(alone, heads)
        .sentences[0]
        .endswith("[0.125, 0.375]; too few other heads for a random draw.")
    )


def test_the_mean_over_tasks_above_chance_is_that_of_the_tables() -> None:
    tasks = {"recall": 0.9, "wic": 0.7, "copa": 0.5, "mathqa": 0.1}
    rows = [row for task, value in tasks.items() for row in removal(task, value, value / 2, 0.0)]
    mean, counted = mean_above_chance(frame("results", rows), {("copa", 4)})
    assert counted == ["recall", "wic"]
    clean_mean = mean.filter((pl.col("metric") == "acc") & (pl.col("mask") == "clean"))
    assert clean_mean["value"].to_list() == pytest.approx([0.8])


def units_rows(drops: Mapping[tuple[str, int], tuple[float, float, int]]) -> list[Row]:
    """Drop, q-value and documents hurt, of nine, of L0H<head> on tasks at 4 shots."""
    rows = []
    for (task, head), (drop, q_value, hurt) in drops.items():
        base = {
            "experiment": "ablate", "task": task, "shots": 4, "kind": "head", "layer": 0, "head": head,
            "exact": True,
        }  # fmt: skip
        values = {
            "gold_logprob_drop": drop,
            "q_value": q_value,
            "documents_hurt": hurt,
            "documents_helped": 9 - hurt,
        }
        rows += [base | {"metric": metric, "value": value} for metric, value in values.items()]
    return rows


def test_units_come_by_how_many_settings_they_matter_in_not_by_one_large_drop() -> None:
    drops = {
        ("recall", 0): (9.0, 0.01, 9), ("copa", 0): (0.0, 0.9, 5), ("chance", 0): (5.0, 0.01, 9),
        ("recall", 1): (0.5, 0.05, 9), ("copa", 1): (0.25, 0.01, 8), ("chance", 1): (5.0, 0.01, 9),
        # Removing it helps.
        ("recall", 2): (-1.0, 0.01, 0), ("copa", 2): (-1.0, 0.01, 0), ("chance", 2): (0.0, 1.0, 0),
    }  # fmt: skip
    rows = [
        *clean("recall", 0.9, 0.8, 0.95), *clean("copa", 0.9, 0.8, 0.95), *clean("chance", 0.5, 0.4, 0.6),
        *units_rows(drops),
    ]  # fmt: skip
    results = frame("results", rows)
    masks = mask_table(results, {}, JUDGING)
    units = headline_units(unit_table(results, masks), settings_of(results, masks))
    assert units.select("unit", "matters", "settings", "median", "lowest", "highest").rows() == [
        ("L0H1", 2, 2, 0.375, 0.25, 0.5), ("L0H0", 1, 2, 4.5, 0.0, 9.0), ("L0H2", 0, 2, -1.0, -1.0, -1.0),
    ]  # fmt: skip
    assert answer_of(rows).sentences[0] == (
        "Removed alone, L0H1 matters in 2 of 2 settings above chance, L0H0 in 1; without it the gold answer "
        "loses 0.25 to 0.50 nats on average."
    )


def test_where_no_unit_is_significant_that_is_said() -> None:
    rows = [*clean("recall", 0.9, 0.8, 0.95), *units_rows({("recall", 0): (9.0, 0.06, 9)})]
    assert answer_of(rows).sentences[0] == (
        "Of the units removed alone none is significant in the only setting above chance."
    )


@given(st.sets(st.sampled_from([*all_heads(LAYERS, HEADS), *all_ffns(LAYERS)]), max_size=MOST_NAMED))
def test_units_are_named_each_once_heads_first(units: set[Any]) -> None:
    text = units_text(sorted(map(str, units)))
    heads, _, ffns = text.partition("FFN") if "FFN" in text else (text, "", "")
    named = heads.replace(" and ", " ").split() + [f"L{layer}F" for layer in ffns.removeprefix("s").split()]
    assert sorted(named) == (sorted(map(str, units)) or ["no", "unit"])


def test_words_in_a_row() -> None:
    assert (listed([]), listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])) == (
        "", "a", "a and b", "a, b and c",
    )  # fmt: skip
    assert (span_text([1.2, 0.9]), span_text([0.0, 2.0])) == ("1", "0 to 2")
