"""Induction heads: capacity, agreement with importance, random draws, and what their removal costs."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import invoke
from demo_scores import DemoScores
from scipy import stats

from lowmem_icl.experiments.induction import measure as induction
from lowmem_icl.masks.files import read_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey
from lowmem_icl.options import RunOptions
from lowmem_icl.statistics.detection import area_under_curve, r_precision, rank_correlation
from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.schema import read_table


def test_capacity_retained_equals_the_loop() -> None:
    rng = np.random.default_rng(0)
    scores, ranking = rng.random((5, 6)), rng.permutation(30).reshape(5, 6).astype(float)
    ranked = {RankingKey("recall", 4, "gradient"): ranking}
    ours, drawn = induction.capacity_blocks("copying", scores, ranked, seed=0)
    for block, method in ((ours, "gradient"), (drawn, "random")):
        assert (block["procedure"], block["other_method"], block["method"]) == ("capacity", "copying", method)
        assert "mask" not in block
    assert (ours["task"], ours["shots"]) == ("recall", 4)
    flat, order = scores.ravel(), np.argsort(ranking.ravel())
    for percent, value, removed in zip(ours["percent"], ours["value"], ours["heads_removed"], strict=True):
        count = 30 * percent // 100
        assert removed == count
        assert value == pytest.approx(sum(flat[index] for index in order[count:]) / flat.sum(), abs=1e-12)
    assert (ours["value"][0], ours["value"][-1]) == (1, 0)
    assert np.abs(drawn["value"] - drawn["chance"]).max() < 0.05
    assert (drawn["low"] <= drawn["chance"] + 1e-12).all()
    assert (drawn["chance"] <= drawn["high"] + 1e-12).all()
    mask = Mask(frozenset([(0, 0), (4, 5)]))
    record = induction.capacity_of_mask("copying", scores, mask)
    assert record["value"] == pytest.approx(1 - (scores[0, 0] + scores[4, 5]) / scores.sum())
    assert record["chance"] == pytest.approx(28 / 30)
    assert (record["procedure"], record["heads_removed"], record["ffns_removed"]) == ("capacity", 2, 0)


def test_important_heads_are_compared_with_as_many_as_there_are_induction_heads() -> None:
    prefix = np.zeros((2, 5))
    prefix[0, 1], prefix[1, 4], prefix[1, 0] = 0.9, 0.4, 0.29
    ranking = np.arange(10.0).reshape(2, 5)
    records = {
        record["metric"]: record
        for record in induction.important_heads_records(prefix, {RankingKey("a", 1, "gradient"): ranking})
    }
    assert set(records) == {"induction_spearman", "induction_precision", "induction_auc"}
    for record in records.values():
        assert (record["procedure"], record["other_method"]) == ("important-heads", "prefix_matching")
        assert (record["task"], record["shots"], record["method"]) == ("a", 1, "gradient")
    assert records["induction_spearman"]["count"] is None
    # Two heads reach 0.3; of the two most important ones one is among them.
    assert (records["induction_precision"]["count"], records["induction_precision"]["value"]) == (2, 0.5)
    # It is more important than all 8 others, the other one than 1 of them.
    assert records["induction_auc"]["value"] == pytest.approx(9 / 16)
    none = induction.important_heads_records(prefix * 0.1, {RankingKey("a", 1, "gradient"): ranking})
    assert [record["metric"] for record in none] == ["induction_spearman"]


def test_a_score_has_its_mean_over_sequences_and_their_variance() -> None:
    by_sequence = np.random.default_rng(0).random((5, 2, 3))
    table = frame("results", induction.score_blocks("copying", "output", by_sequence))
    assert set(table["procedure"]) == {"scores"}
    assert set(table["documents"]) == {5}
    of_metric = {
        metric: table.filter(pl.col("metric") == metric).sort("layer", "head")
        for metric in ("copying", "copying_variance")
    }
    variance = by_sequence.var(0, ddof=1).ravel()
    np.testing.assert_allclose(of_metric["copying"]["value"], by_sequence.mean(0).ravel())
    np.testing.assert_allclose(of_metric["copying_variance"]["value"], variance)
    np.testing.assert_allclose(of_metric["copying"]["stderr"], np.sqrt(variance / 5))
    alone = frame("results", induction.score_blocks("copying", "output", by_sequence[:1]))
    assert alone.filter(pl.col("metric") == "copying")["stderr"].is_nan().all()


def test_the_band_of_random_draws_is_over_draws_of_one_task_and_metric() -> None:
    values = np.linspace(0, 0.5, 20)
    records = [
        {"task": task, "shots": 4, "metric": metric, "mask": f"induction-random-{draw:02d}", "seed": 42}
        | {"procedure": "removal", "method": "random", "value": value + shift, "stderr": 0.1}
        for task, metric, shift in (("a", "acc", 0.0), ("b", "acc", 0.25), ("a", "acc_drop", -0.5))
        for draw, value in enumerate(values, start=1)
    ]
    bands = list(induction.band_records(records))
    assert [(band["task"], band["metric"]) for band in bands] == [
        ("a", "acc"),
        ("b", "acc"),
        ("a", "acc_drop"),
    ]
    for band, shift in zip(bands, (0.0, 0.25, -0.5), strict=True):
        assert (band["method"], band["mask"]) == ("random-median", "induction-random")
        assert (band["procedure"], band["stderr"]) == ("removal", None)
        assert band["value"] == pytest.approx(0.25 + shift)
        reach = stats.t.ppf(0.975, 19) * values.std(ddof=1) * np.sqrt(1 + 1 / 20)
        lowest = 0 if band["metric"] == "acc" else -1
        expected = np.clip([0.25 + shift - reach, 0.25 + shift + reach], lowest, 1)
        assert (band["low"], band["high"]) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("count", [1, 3, 17, 39])
def test_detection_measures_equal_scipys(count: int) -> None:
    rng = np.random.default_rng(count)
    scores = rng.integers(0, 25, (10, 4)).astype(float)
    members = rng.permutation(np.arange(40) < count).reshape(10, 4)
    area = area_under_curve(scores, members)
    expected = stats.mannwhitneyu(scores[members], scores[~members]).statistic / (count * (40 - count))
    assert area.value == pytest.approx(expected)
    precise = r_precision(scores, members)
    drawn = []
    for _ in range(2000):
        top = np.lexsort([rng.random(40), -scores.ravel()])[:count]
        drawn.append(members.ravel()[top].mean())
    assert precise.value == pytest.approx(np.mean(drawn), abs=1e-9 + 4 * np.std(drawn) / np.sqrt(2000))
    assert (area.chance, precise.chance) == (0.5, count / 40)
    for measure in (area, precise):
        if min(flags.any(1).sum() for flags in (members, ~members)) < 5:
            assert np.isnan([measure.low, measure.high]).all(), "few layers tell nothing of others"
        else:
            assert 0 <= measure.low <= measure.value <= measure.high <= 1
            assert measure.high - measure.low > 0.05
    other = rng.random((10, 4))
    ranks = rank_correlation(scores, other)
    assert ranks.value == pytest.approx(stats.spearmanr(scores.ravel(), other.ravel()).statistic)
    assert ranks.low < ranks.value < ranks.high


def test_the_jackknife_leaves_out_layers() -> None:
    scores, other = np.random.default_rng(0).normal(size=(2, 6, 3))
    parts = []
    for layer in range(6):
        kept = [row for row in range(6) if row != layer]
        parts.append(np.arctanh(stats.spearmanr(scores[kept].ravel(), other[kept].ravel()).statistic))
    stderr = np.sqrt(5 / 6 * np.sum((np.array(parts) - np.mean(parts)) ** 2))
    found = rank_correlation(scores, other)
    width = np.arctanh(found.high) - np.arctanh(found.low)
    assert width == pytest.approx(2 * stats.t.ppf(0.985, 5) * stderr)
    assert np.isnan(rank_correlation(scores[:2], other[:2]).low), "two layers tell nothing of others"


def test_a_perfect_score_finds_all() -> None:
    scores = np.arange(20.0).reshape(4, 5)[:, ::-1]
    members = np.zeros((4, 5), dtype=bool)
    members[3] = True
    assert area_under_curve(scores, members).value == 1
    assert area_under_curve(-scores, members).value == 0
    assert r_precision(scores, members).value == 1
    assert rank_correlation(scores, scores).value == pytest.approx(1)
    assert np.isnan(area_under_curve(scores, scores > 99).value)
    assert np.isnan(r_precision(scores, scores > 99).value)
    spread = np.arange(20.0).reshape(4, 5).T
    found = area_under_curve(spread, spread >= 15)
    assert found.value == found.high == 1
    assert 0.3 < found.low < 0.95


def test_random_draws_are_of_the_same_layers_and_spare_the_circuit() -> None:
    prefix, previous = np.zeros((4, 8)), np.zeros((4, 8))
    prefix[1, :2], prefix[2, 3], prefix[1, 7] = 0.9, 0.8, 0.35
    previous[1, 4] = previous[2, 0] = 0.5
    removed = Mask(frozenset([(1, 0), (1, 1), (2, 3)]))
    assert induction.top_induction_heads(prefix).heads == removed.heads | {(1, 7)}
    draws = induction.random_draws(removed, prefix, previous, seed=3)
    assert len(draws) == 20
    assert len(set(draws)) > 10
    for mask in draws:
        assert sorted(layer for layer, _ in mask.heads) == [1, 1, 2]
        assert not mask.heads & {(1, 0), (1, 1), (2, 3), (1, 7), (1, 4), (2, 0)}
    assert draws == induction.random_draws(removed, prefix, previous, seed=3)
    crowded = np.full((1, 8), 0.9)
    assert len(induction.top_induction_heads(crowded)) == 2, "at most a quarter"
    assert induction.random_draws(Mask(frozenset([(0, 0)])), crowded, np.zeros((1, 8)), 0) == []


def test_the_demos_induction_heads_are_what_recall_needs(small_run: Path, demo_scores: DemoScores) -> None:
    rows = read_table(small_run / "results.parquet", "results").sort("layer", "head")
    prefix, previous = (
        rows.filter(pl.col("metric") == metric)["value"].to_numpy().reshape(4, 8)
        for metric in ("prefix_matching", "previous_token")
    )
    assert prefix.max() >= 0.9
    removed = induction.top_induction_heads(prefix)
    assert 1 <= len(removed) <= prefix.size / 4
    (without,) = demo_scores.accuracy("recall", 16, removed)
    assert abs(without - 0.25) <= 0.05
    draws = induction.random_draws(removed, prefix, previous, seed=42)
    assert len(draws) == 20
    clean, *random = demo_scores.accuracy("recall", 16, Mask(), *draws)
    assert clean - np.median(random) < 0.1


def induction_records(folder: Path) -> pl.DataFrame:
    return read_table(folder / "results.parquet", "results").filter(pl.col("experiment") == "induction")


def test_a_run_has_every_score_of_every_head(small_run: Path) -> None:
    record = json.loads((small_run / "run.json").read_text())
    assert record["induction"] == {
        "sequences": 100, "base_tokens": [25, 120], "base_tokens_wanted": [25, 223], "drawable_ids": 483,
        "drawable_ids_ordered_by": "ids",
    }  # fmt: skip
    rows = induction_records(small_run)
    for metric in ("prefix_matching", "copying", "previous_token", "duplicate_token"):
        scores = rows.filter(pl.col("metric") == metric)
        assert len(scores) == len(rows.filter(pl.col("metric") == f"{metric}_variance")) == 32
        assert set(scores["kind"]) == {"head"}
        assert set(scores["documents"]) == {100}
        variance = rows.filter(pl.col("metric") == f"{metric}_variance")["value"].to_numpy()
        np.testing.assert_allclose(scores["stderr"].to_numpy(), np.sqrt(variance / 100))
    assert len(rows.filter(pl.col("metric") == "copying_eigenvalues")) == 32
    procedures = dict(rows.group_by("procedure").agg(pl.col("metric").unique()).iter_rows())
    assert set(procedures) == {"scores", "capacity", "important-heads", "removal"}
    assert set(procedures["capacity"]) == {"capacity_retained"}
    assert set(procedures["important-heads"]) == {
        "induction_spearman",
        "induction_precision",
        "induction_auc",
    }


def test_a_run_has_the_capacity_that_every_mask_and_ranking_leaves(small_run: Path) -> None:
    rows = induction_records(small_run)
    under_masks = rows.filter((pl.col("procedure") == "capacity") & pl.col("mask").is_not_null())
    masks = {path.stem for path in (small_run / "masks").glob("*.json")}
    pruned = {name for name in masks if not name.startswith("induction-")}
    assert set(under_masks["mask"]) == pruned
    assert len(under_masks) == 2 * len(pruned), "of two capacities"
    assert (under_masks["mask_task"] == under_masks["task"]).all()
    assert (under_masks["mask_shots"] == under_masks["shots"]).all()
    assert under_masks["percent"].null_count() == len(under_masks)
    curves = rows.filter((pl.col("procedure") == "capacity") & pl.col("percent").is_not_null())
    assert set(curves["metric"]) == {"capacity_retained"}
    keys = curves.filter(pl.col("method") == "gradient").select("task", "shots", "other_method").unique()
    assert len(keys) == 3 * 2 * 2, "two tasks and the aggregate, two shot counts, two capacities"
    assert set(curves["method"]) == {"gradient", "attribution", "ablation", "icl_effect", "random"}


def test_a_run_has_how_well_rankings_find_induction_heads(small_run: Path) -> None:
    rows = induction_records(small_run)
    areas = rows.filter(pl.col("metric") == "induction_auc")
    assert set(areas["chance"]) == {0.5}
    assert areas["low"].null_count() == len(areas), "the demo's induction heads are all of one layer"
    assert set(areas["count"]) == {
        int((rows.filter(pl.col("metric") == "prefix_matching")["value"] >= induction.HEAD_SCORE).sum())
    }


def test_a_run_has_what_removing_induction_heads_costs(small_run: Path) -> None:
    rows = induction_records(small_run)
    effects = rows.filter(pl.col("mask").is_not_null() & (pl.col("metric") == "acc"))
    assert set(effects["shots"]) == {4}
    assert set(effects["task"]) == {"recall", "knowledge", "aggregate"}
    assert len(effects.filter(pl.col("method") == "random")) == 20 * 3
    median = effects.filter((pl.col("mask") == "induction-random") & (pl.col("task") == "recall"))
    drawn = effects.filter((pl.col("method") == "random") & (pl.col("task") == "recall"))["value"]
    assert median["value"].item() == pytest.approx(drawn.median())
    costs = rows.filter((pl.col("metric") == "acc_drop") & (pl.col("task") == "recall"))
    assert len(costs) == 1 + 20 + 1
    clean, without = (
        effects.filter((pl.col("mask") == name) & (pl.col("task") == "recall"))["value"].item()
        for name in ("clean", "induction-heads")
    )
    assert costs.filter(pl.col("method") == "induction")["value"].item() == pytest.approx(clean - without)
    mask = read_mask(small_run / "masks" / "induction-heads.json")
    assert mask.made["method"] == "induction"
    assert len(mask.mask) == effects.filter(pl.col("method") == "induction")["heads_removed"][0]


def test_a_runs_page_tells_of_induction_heads(small_run: Path) -> None:
    page = (small_run / "report.html").read_text()
    assert "Induction heads" in page
    assert "reach a prefix-matching score" in page
    assert "previous-token heads left out" in page
    for plot in ("scores", "removal", "prefix-capacity", "copying-capacity"):
        assert f'id="plot-{plot}"' in page


def test_induction_reads_nothing_that_stays_in_memory(small_run: Path) -> None:
    stage = json.loads((small_run / "run.json").read_text())["stages"]["induction"]
    assert stage["read_bytes"] == stage["planned_read_bytes"] == 0, "importance has read what stays in memory"


def test_options_of_copying_are_checked(tmp_path: Path) -> None:
    told = invoke("run", "--copying-with", "norm,noise", "--out", tmp_path / "run")
    assert told.exit_code == 2
    assert "--copying-with" in told.stderr
    assert RunOptions(copying_with="norm, softmax").copying_with == ("norm", "softmax")  # type: ignore[arg-type]
