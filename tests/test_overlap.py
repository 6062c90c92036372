"""Agreement of rankings: against scipy, against chance, against simulated documents and slow loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowmem_icl.experiments.overlap.measure import TOP_PERCENTS, overlap_records
from lowmem_icl.masks.rankings import RankingKey, mean_of_normalised
from lowmem_icl.statistics.agreement import (
    correlation_of_orders,
    kendall,
    spearman,
    top_membership,
    top_overlap,
)
from lowmem_icl.statistics.resampling import (
    RESAMPLES,
    DocumentRanking,
    DocumentScores,
    correlation_interval,
    split_half,
)

LAYERS, HEADS = 5, 12
UNITS = LAYERS * HEADS

seeds = st.integers(0, 2**32 - 1)


def documents_of(
    task: str, truth: np.ndarray, count: int, noise: float, rng: np.random.Generator
) -> DocumentScores:
    """Documents that measure true scores [U] with noise, each alone."""
    values = truth + noise * rng.normal(size=(count, len(truth)))
    return DocumentScores.of_mean(task, values, [str(number) for number in range(count)])


def score(scores: DocumentScores) -> np.ndarray:
    ratio: np.ndarray = scores.values.sum(0) / scores.sizes.sum(0)
    return ratio


@given(seeds)
def test_kendall_is_scipys(seed: int) -> None:
    one, other = np.random.default_rng(seed).integers(0, 6, (2, 12)).astype(float)
    if np.ptp(one) and np.ptp(other):
        assert kendall(one, other) == stats.kendalltau(one, other)[0]
    assert np.isnan(kendall(np.zeros(5), np.arange(5.0)))


@given(seeds)
def test_rows_of_a_pair_are_scipys(seed: int) -> None:
    one, other = np.random.default_rng(seed).integers(0, 9, (2, LAYERS, HEADS)).astype(float)
    rows = overlap_records({RankingKey("a", 0, "gradient"): one, RankingKey("b", 0, "gradient"): other})
    values = {(row["metric"], row.get("percent")): row["value"] for row in rows}
    assert values["spearman", None] == pytest.approx(stats.spearmanr(one.ravel(), other.ravel())[0])
    assert values["kendall", None] == pytest.approx(stats.kendalltau(one.ravel(), other.ravel())[0])
    percents = {percent for metric, percent in values if metric == "top_overlap"}
    assert percents == set(TOP_PERCENTS) == {10, 20, 30, 40, 50}


def test_chance_of_the_top_in_common_is_that_of_unrelated_rankings() -> None:
    rng = np.random.default_rng(0)
    found: dict[int, list[float]] = {}
    expected = {}
    for _ in range(150):
        one, other = rng.normal(size=(2, LAYERS, HEADS))
        rankings = {RankingKey("a", 0, "gradient"): one, RankingKey("b", 0, "gradient"): other}
        for row in overlap_records(rankings):
            if row["metric"] == "top_overlap":
                found.setdefault(row["percent"], []).append(row["value"])
                expected[row["percent"]] = row["chance"]
                assert row["count"] == UNITS * row["percent"] // 100
    for percent, values in found.items():
        assert expected[percent] == pytest.approx(percent / 100)
        assert np.mean(values) == pytest.approx(percent / 100, abs=4 * np.std(values) / np.sqrt(len(values)))


def test_the_papers_correlation_is_near_0_where_spearman_is_near_1() -> None:
    """paper.md §4: 4,608 exchangeable heads; under independence its standard deviation is 0.015."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=4608)
    other = one + 0.14 * rng.normal(size=4608)
    assert spearman(one, other) == pytest.approx(0.99, abs=0.003)
    assert abs(correlation_of_orders(one, other)) < 0.05
    layer = np.repeat(np.arange(64), 72) / 64
    trend, trended = layer + 0.3 * rng.normal(size=4608) + 0.15 * rng.normal(size=(2, 4608))
    assert 0.1 < correlation_of_orders(trend, trended) < spearman(trend, trended) - 0.1
    assert correlation_of_orders(one, one) == pytest.approx(1)


def test_orders_are_compared_as_the_papers_code_does() -> None:
    one, other = np.array([3.0, 1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.0, 3.0])
    # In ascending order stand units 1, 2, 0, 3 and units 0, 1, 3, 2.
    assert correlation_of_orders(one, other) == pytest.approx(stats.spearmanr([1, 2, 0, 3], [0, 1, 3, 2])[0])


@given(seeds)
def test_a_top_with_ties_is_the_mean_over_random_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, count = rng.integers(0, 4, 6).astype(float), int(rng.integers(1, 7))
    found = np.zeros(6)
    orders = list(itertools.permutations(range(6)))
    for order in orders:
        found[sorted(order, key=lambda unit: -scores[unit])[:count]] += 1 / len(orders)
    np.testing.assert_allclose(top_membership(scores, count), found)


def test_chance_is_what_it_says_where_nine_of_ten_scores_are_zero() -> None:
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(300):
        one, other = (np.where(rng.random(200) < 0.1, rng.random(200), 0.0) for _ in range(2))
        found.setdefault("order", []).append(correlation_of_orders(one, other))
        for fraction in (0.05, 0.3, 0.5):
            shared = top_overlap(one, other, fraction)
            assert shared.chance == fraction
            found.setdefault(str(fraction), []).append(shared.value - shared.chance)
    for values in found.values():
        assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / np.sqrt(300))


def test_orders_with_ties_are_the_mean_over_random_orders() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.integers(0, 3, (2, 9)).astype(float)
    drawn = []
    for _ in range(4000):
        orders = [np.lexsort([rng.random(9), scores]) for scores in (one, other)]
        drawn.append(stats.spearmanr(*orders).statistic)
    assert correlation_of_orders(one, other) == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 63)


def test_each_tasks_scores_weigh_the_same_once_normalised() -> None:
    one, other = np.array([[1.0, 3.0]]), np.array([[300.0, 100.0]])
    np.testing.assert_allclose(mean_of_normalised([one, other]), [[0.5, 0.5]])
    np.testing.assert_allclose(mean_of_normalised([one, np.zeros((1, 2))]), [[0.125, 0.375]])


def test_a_ratio_of_sums_is_drawn_as_a_ratio() -> None:
    rng = np.random.default_rng(0)
    values, sizes = rng.random((6, 600)), rng.integers(3, 9, 6).astype(float)
    scores = DocumentScores("a", values.astype(np.float32), sizes[:, None], tuple("aabbcd"))
    counts = scores.bootstrap_counts(seed=1)
    assert counts.shape == (RESAMPLES, 6)
    assert (counts[:, 0] == counts[:, 1]).all(), "documents of a passage are drawn together"
    assert (counts[:, [0, 2, 4, 5]].sum(1) == 4).all()
    got = scores.weighted(counts)
    for resample in range(0, RESAMPLES, 50):
        drawn = np.repeat(np.arange(6), counts[resample].astype(int))
        np.testing.assert_allclose(got[resample], values[drawn].sum(0) / sizes[drawn].sum(), rtol=1e-5)


def test_the_same_documents_are_drawn_together_and_others_apart() -> None:
    values = np.zeros((4, 3))
    at_0 = DocumentScores.of_mean("a", values, ["0:1", "0:2", "0:3", "0:4"])
    at_5 = DocumentScores.of_mean("a", values, ["0:4", "0:3", "0:2", "0:1"])
    other = DocumentScores.of_mean("b", values, at_0.clusters)
    assert np.array_equal(at_0.bootstrap_counts(0), at_5.bootstrap_counts(0)[:, ::-1])
    assert not np.array_equal(at_0.bootstrap_counts(0), other.bootstrap_counts(0))
    assert not np.array_equal(at_0.bootstrap_counts(0), at_0.bootstrap_counts(1))


def test_intervals_cover_what_other_documents_give() -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(size=UNITS)
    related = 0.7 * truth + 0.7 * rng.normal(size=UNITS)
    values, intervals = [], []
    for _ in range(120):
        one, other = documents_of("a", truth, 32, 2, rng), documents_of("b", related, 32, 2, rng)
        values.append(spearman(score(one), score(other)))
        drawn = [DocumentRanking((scores,)).resampled(0) for scores in (one, other)]
        interval = correlation_interval(values[-1], *drawn)
        assert interval is not None
        intervals.append(interval)
    expected = np.mean(values)
    covered = np.mean([interval.low <= expected <= interval.high for interval in intervals])
    assert 0.88 <= covered <= 0.995
    assert np.mean([interval.stderr for interval in intervals]) == pytest.approx(np.std(values), rel=0.25)
    for value, interval in zip(values, intervals, strict=True):
        assert interval.low < value < interval.high


def test_split_halves_tell_what_as_many_other_documents_would_say() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=UNITS)
    for noise in (1, 4):
        pairs = [[score(documents_of("a", truth, 20, noise, rng)) for _ in range(2)] for _ in range(60)]
        again = np.mean([spearman(one, other) for one, other in pairs])
        told = [
            split_half(DocumentRanking((documents_of("a", truth, 20, noise, rng),)), 0) for _ in range(20)
        ]
        assert np.mean(told) == pytest.approx(again, abs=0.05)
    assert abs(split_half(DocumentRanking((documents_of("a", np.zeros(UNITS), 20, 1, rng),)), 0)) < 0.4
    alone = DocumentScores.of_mean("a", rng.random((4, UNITS)), ["one"] * 4)
    assert np.isnan(split_half(DocumentRanking((alone,)), 0))


def test_an_aggregate_is_ranked_as_the_mean_of_its_tasks() -> None:
    rng = np.random.default_rng(0)
    members = tuple(
        documents_of(task, rng.normal(size=UNITS) * size, 4, 1, rng) for task, size in (("a", 1), ("b", 100))
    )
    ones = [np.ones((1, 4))] * 2
    by_rank, by_score = (DocumentRanking(members, how).ranks(ones)[0] for how in ("ranks", "scores"))
    scores = [score(member) for member in members]
    ranks = np.mean([stats.rankdata(one) for one in scores], axis=0)
    assert np.array_equal(by_rank, stats.rankdata(ranks))
    assert np.array_equal(by_score, stats.rankdata(np.mean(scores, axis=0)))


def test_intervals_and_ceilings_stand_at_rankings_with_documents() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=UNITS)
    rankings, documents = {}, {}
    for task, shots, method in itertools.product("abc", (0, 1), ("gradient", "ablation")):
        key = RankingKey(task, shots, method)
        scores = documents_of(task, truth + 0.3 * rng.normal(size=UNITS), 12, 1, rng)
        rankings[key] = score(scores).reshape(LAYERS, HEADS)
        if task != "c":
            documents[key] = DocumentRanking((scores,))
    rows = list(overlap_records(rankings, documents, seed=1))
    assert rows == list(overlap_records(dict(reversed(rankings.items())), documents, seed=1)), (
        "order is no matter"
    )
    procedures = {"split_half": "reliability", "cross_shot_spearman": "cross-shot"}
    assert all(row["procedure"] == procedures.get(row["metric"], "pair") for row in rows)
    correlations = [row for row in rows if row["metric"] == "spearman"]
    for row in correlations:
        with_documents = row["method"] == row["other_method"] and "c" not in (row["task"], row["other_task"])
        assert ("low" in row) == with_documents
        if with_documents:
            assert row["low"] < row["value"] < row["high"]
    # Per method 3 pairs of tasks at 2 shot counts and 3 tasks at both; 6 across methods.
    assert len(correlations) == 2 * (2 * 3 + 3) + 6
    for row in rows:
        if row["metric"] in ("kendall", "top_overlap") and row["method"] == row["other_method"]:
            assert ("low" in row) == ("c" not in (row["task"], row["other_task"]))
            assert "low" not in row or row["low"] <= row["value"] <= row["high"]
    ceilings = [row for row in rows if row["metric"] == "split_half"]
    assert len(ceilings) == 8
    assert all(0.5 < row["value"] <= 1 and "other_task" not in row for row in ceilings)
    of_order = [row for row in rows if row["metric"] == "spearman_of_order"]
    assert len(of_order) == 2 * 9
    assert all(row["method"] == row["other_method"] for row in of_order)
    (mean,) = [row for row in rows if row["metric"] == "cross_shot_spearman" and row["method"] == "gradient"]
    by_task = [
        row["value"] for row in correlations
        if row["shots"] != row["other_shots"] and row["method"] == row["other_method"] == "gradient"
    ]  # fmt: skip
    assert (mean["task"], mean["shots"], mean["other_shots"]) == ("aggregate", 0, 1)
    assert mean["value"] == pytest.approx(np.mean(by_task))
    assert 3 * mean["stderr"] ** 2 == pytest.approx(np.var(by_task, ddof=1))
    reach = stats.t.ppf(0.975, 2) * mean["stderr"]
    assert -1 <= mean["low"] <= mean["value"] - reach
    assert min(1, mean["value"] + reach) <= mean["high"] <= 1
