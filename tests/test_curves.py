"""Pruning curves: what their masks hold, their knees, and that a run's points are what an evaluation of the
mask says.
"""

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import invoke
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lowmem_icl.experiments.prune.measure import (
    certain_knee,
    control_records,
    knee,
    knee_records,
    point_fields,
)
from lowmem_icl.experiments.prune.points import (
    LEVELS,
    LEVELS_BY_NAME,
    CurveOptions,
    CurvePoint,
    CurveRankings,
    TaskShots,
    curve_points,
    transfer_donors,
)
from lowmem_icl.masks.files import read_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey, removed_count, with_ties_broken
from lowmem_icl.statistics.bands import LEAST_DRAWS
from lowmem_icl.statistics.intervals import CHANGE, mean_intervals
from lowmem_icl.tables.schema import read_table

LAYERS, HEADS = 4, 8
TASKS, SHOTS = ("a", "b", "c", "d"), (0, 1, 5)
OWN = TaskShots("a", 1)


def rankings(ffn_method: str = "ablation") -> CurveRankings:
    rng = np.random.default_rng(3)
    keys = [RankingKey(task, shots, "gradient") for task in (*TASKS, "aggregate") for shots in SHOTS]
    heads = {key: rng.random((LAYERS, HEADS)) for key in keys}
    ffns = {key._replace(method=ffn_method): rng.random(LAYERS) for key in keys}
    return CurveRankings(heads, ffns, ffn_method, TASKS)


def points_of(*curves: str, own: TaskShots = OWN) -> list[CurvePoint]:
    return list(curve_points(own, CurveOptions(curves, SHOTS, random_draws=3, seed=42), rankings()))


@pytest.mark.parametrize(
    ("units", "counts"),
    # The paper's own counts for OPT-66B.
    [
        (4608, [0, 460, 921, 1382, 1843, 2304, 2764, 3225, 3686, 4147]),
        (64, [0, 6, 12, 19, 25, 32, 38, 44, 51, 57]),
    ],
)
def test_a_percentage_is_rounded_down(units: int, counts: list[int]) -> None:
    assert [removed_count(percent, units) for percent in LEVELS] == counts


def test_levels_of_a_ranking_are_nested_and_hold_the_least_important() -> None:
    for curve in ("heads", "ffns"):
        by_curve: dict[TaskShots | None, list[CurvePoint]] = {}
        for point in points_of(curve):
            assert point.procedure == f"curve-{curve}"
            by_curve.setdefault(point.donor, []).append(point)
        assert set(by_curve) == {OWN, TaskShots("aggregate", 1)}
        for points in by_curve.values():
            assert [point.percent for point in points] == list(LEVELS)
            for one, other in itertools.pairwise(points):
                assert len(one.mask - other.mask) == 0
    own = rankings().heads[RankingKey("a", 1, "gradient")]
    half = next(p for p in points_of("heads") if p.percent == 50 and p.donor == OWN)
    kept = [
        own[layer, head]
        for layer in range(LAYERS)
        for head in range(HEADS)
        if (layer, head) not in half.mask.heads
    ]
    assert max(own[at] for at in half.mask.heads) < min(kept)


def test_the_grid_has_every_pair_and_the_edges_are_the_single_curves() -> None:
    grid = points_of("combined")
    assert len(grid) == 8 * 6
    heads = {p.percent: p.mask for p in points_of("heads") if p.donor == TaskShots("aggregate", 1)}
    assert {p.mask for p in grid if not p.mask.ffns} == {heads[percent] for percent in range(0, 80, 10)}


def test_donors_are_chosen_by_rank_correlation() -> None:
    scores = np.arange(LAYERS * HEADS, dtype=np.float64).reshape(LAYERS, HEADS)
    noise = np.random.default_rng(0).permutation(scores.ravel()).reshape(scores.shape)
    heads = dict(zip(TASKS, (scores, scores * 2 + 1, noise, -scores), strict=True))
    ours = CurveRankings({RankingKey(t, 0, "gradient"): s for t, s in heads.items()}, {}, "ablation", TASKS)
    assert transfer_donors(TaskShots("a", 0), ours) == {"gradient-highest": "b", "gradient-lowest": "d"}
    assert transfer_donors(TaskShots("mathqa", 0), ours) == {}, (
        "judged by its own and the aggregate's ranking only"
    )


def test_random_draws_are_nested_the_same_for_all_and_as_many_as_asked() -> None:
    points = points_of("random")
    assert points == points_of("random", own=TaskShots("b", 5))
    assert {point.seed for point in points} == {42, 43, 44}
    assert {point.percent for point in points} == {0, 30, 60, 90}
    for seed in (42, 43, 44):
        masks = [p.mask for p in points if p.seed == seed and p.kind == "head"]
        assert all(len(one - other) == 0 for one, other in itertools.pairwise(masks))
    half = CurveOptions(("random",), SHOTS, random_draws=3, seed=42, levels=LEVELS_BY_NAME["half"])
    assert {point.percent for point in curve_points(OWN, half, rankings())} == {0, 50}


def test_a_curve_whose_ranking_is_missing_is_left_out() -> None:
    every = ("heads", "ffns", "combined", "transfer", "cross-shot")
    nobody = TaskShots("mathqa", 1)
    assert {point.donor for point in points_of(*every, own=nobody)} == {TaskShots("aggregate", 1)}


def test_records_tell_whose_ranking_made_a_mask_without_its_name() -> None:
    """Procedure, percent, mask_task and mask_shots say all that the mask's name says."""
    points = points_of("heads", "ffns", "combined", "transfer", "cross-shot", "random")
    fields = [(point, point_fields(OWN, point)) for point in points]
    assert {record["procedure"] for _, record in fields} == {
        "curve-heads",
        "curve-ffns",
        "curve-combined",
        "transfer",
        "cross-shot",
        "random",
    }
    for point, record in fields:
        assert record["percent"] == point.percent
        made_by = (record["mask_task"], record["mask_shots"])
        if point.procedure == "random":
            assert record["seed"] in (42, 43, 44)
            assert made_by == (record["other_task"], record["other_shots"]) == (None, None)
            continue
        assert record["seed"] is None
        assert made_by == ((None, None) if record["mask"] == "clean" else point.donor)
        # Another ranking than the task's own is named also where its lowest level removes nothing.
        other = (record["other_task"], record["other_shots"])
        assert other == ((None, None) if point.donor == OWN else point.donor)
    transferred = [record for point, record in fields if point.procedure == "transfer"]
    assert {record["mask_task"] for record in transferred} <= {"b", "c", "d"}
    across = [record for point, record in fields if point.procedure == "cross-shot"]
    assert {(record["mask_task"], record["mask_shots"]) for record in across} == {("a", 0), ("a", 5)}


def test_a_knee_is_the_last_level_before_the_first_that_credibly_costs_more_than_a_point() -> None:
    levels = [0, 10, 20, 30, 40]
    lows = np.array([-0.02, 0.0, 0.01, 0.02, -0.01])
    assert knee(levels, lows) == 20, "a lucky level beyond does not count"
    assert knee(levels, np.full(5, -0.1)) == 40
    assert knee(levels, np.full(5, 0.011)) == 0
    assert knee(levels, np.array([-0.1, -0.1, np.nan, -0.1, -0.1])) == 10, "what is not known ends it"


def test_a_certain_knee_is_the_last_level_before_the_first_that_may_cost_more_than_a_point() -> None:
    levels = [0, 10, 20, 30, 40]
    assert certain_knee(levels, np.array([0.0, 0.01, 0.005, 0.011, 0.0])) == 20
    assert certain_knee(levels, np.full(5, 0.2)) == 0
    assert certain_knee(levels, np.array([0.0, np.nan, 0.0, 0.0, 0.0])) == 0


def test_the_true_knee_lies_between_the_two() -> None:
    """Of simulated curves, documents 0 or 1: the last level that truly costs at most a point."""
    rng, curves = np.random.default_rng(4), 400
    levels, truth = [0, 10, 20, 30, 40], np.array([0.0, 0.0, 0.005, 0.05, 0.4])
    beyond, short = 0, 0
    for _ in range(curves):
        documents = (rng.random((5, 600)) < truth[:, None]).astype(np.float64)
        intervals = mean_intervals(documents, [str(n) for n in range(600)], CHANGE)
        short += knee(levels, intervals.low) < 20
        beyond += certain_knee(levels, intervals.high) > 20
    assert short <= 0.05 * curves
    assert beyond <= 0.05 * curves


def test_knees_are_chosen_on_training_and_reported_on_evaluation_rows() -> None:
    def row(split: str, level: int, drop: float) -> dict[str, object]:
        return {
            "procedure": "curve-heads", "task": "a", "shots": 0, "method": "gradient", "kind": "head",
            "other_task": None, "other_shots": None, "percent": level, "metric": "acc_drop", "value": drop,
            "stderr": 0.02, "low": drop - 0.01, "high": drop + 0.008,
            "split": split, "documents": 8, "mask": f"m{level}",
            "mask_task": "a", "mask_shots": 0, "heads_removed": level, "ffns_removed": 0,
        }  # fmt: skip

    training = [row("train", level, drop) for level, drop in ((0, 0.0), (10, 0.0), (20, 0.005), (30, 0.3))]
    evaluation = [row("test", level, drop) for level, drop in ((0, 0.0), (10, 0.01), (20, 0.04), (30, 0.0))]
    chosen, cost, certain = knee_records(training, evaluation)
    assert (chosen["metric"], chosen["value"], chosen["split"]) == ("knee", 20, "test")
    assert (certain["metric"], certain["value"], certain["mask"]) == ("knee_certain", 10, "m10")
    assert (cost["metric"], cost["value"], cost["split"], cost["mask"]) == (
        "knee_acc_drop",
        0.04,
        "test",
        "m20",
    )
    for record in (chosen, cost):
        assert (record["procedure"], record["percent"]) == ("curve-heads", 20)
        assert (record["mask_task"], record["mask_shots"]) == ("a", 0)


def test_the_control_has_a_mean_and_a_band_for_the_next_draw() -> None:
    values = np.linspace(0.3, 0.7, 11)
    mean = {"procedure": "random", "task": "a", "shots": 0, "split": "test", "kind": "head", "percent": 50,
            "metric": "acc", "heads_removed": 16, "ffns_removed": 0, "documents": 8, "method": "random",
            "value": values.mean(), "stderr": 0.04, "chance": 0.5, "seed": None, "mask": None}  # fmt: skip
    draws = [
        mean | {"value": value, "stderr": 0.2, "seed": draw, "mask": f"m{draw}"}
        for draw, value in enumerate(values)
    ]
    (band,) = control_records([mean], draws)
    assert (band["procedure"], band["percent"], band["documents"]) == ("random", 50, 8)
    assert "seed" not in band
    assert "mask" not in band
    assert band["value"] == pytest.approx(values.mean())
    # Both sources: the documents' error of the mean, and the draws'.
    assert band["stderr"] ** 2 == pytest.approx(0.04**2 + values.var(ddof=1) / 11)
    reach = stats.t.ppf(0.975, 10) * values.std(ddof=1) * np.sqrt(1 + 1 / 11)
    assert (band["low"], band["high"]) == pytest.approx((0.5 - reach, 0.5 + reach))
    (wide,) = control_records([mean], [draw | {"value": 3 * draw["value"] - 1} for draw in draws])
    assert (wide["low"], wide["high"]) == (0, 1)
    (few,) = control_records([mean], draws[: LEAST_DRAWS - 1])
    assert np.isnan([few["low"], few["high"]]).all()
    assert np.isfinite(few["stderr"])
    (single,) = control_records([mean], draws[:1])
    assert np.isnan([single["stderr"], single["low"], single["high"]]).all()


def test_equal_scores_are_told_apart_by_the_second() -> None:
    order = with_ties_broken(np.array([0.0, 0.0, -1.0, 0.0]), np.array([3.0, 1.0, 9.0, 1.0]))
    np.testing.assert_array_equal(order, [3, 1, 0, 2])


@pytest.fixture(scope="module")
def paper_run(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """A run of all curves, small."""
    folder = tmp_path_factory.mktemp("curves")
    result = invoke(
        "run", "--tasks", "recall,category,knowledge", "--shots", "0,4", "--limit", 24, "--train-limit", 8,
        "--curve-limit", 16, "--experiments", "evaluate,importance,ablate,prune", "--random-draws", 2,
        # Certificates take hundreds of documents more per task.
        "--certify-limit", 0,
        "--rescore", "--curves", "heads,ffns,combined,transfer,cross-shot,random", "--direction", "up",
        "--order", "joint", "--store-dir", stores, "--out", folder / "run", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


def test_every_curve_is_there_with_all_its_levels(paper_run: Path) -> None:
    rows = read_table(paper_run / "run" / "results.parquet", "results").filter(
        pl.col("experiment") == "prune"
    )
    curves = rows.filter(pl.col("percent").is_not_null() & (pl.col("metric") == "acc"))
    levels = {(method, kind): set(of["percent"]) for (method, kind), of in curves.group_by("method", "kind")}
    every = set(LEVELS)
    assert levels["gradient", "head"] == levels["rescored", "head"] == levels["ablation", "ffn"] == every
    assert levels["gradient-highest", "head"] == levels["gradient-lowest", "head"] == {10, 30, 50, 70, 90}
    assert levels["combined", None] == set(range(0, 80, 10))
    assert levels["random", "head"] == levels["random", "ffn"] == {0, 30, 60, 90}
    donors = curves.filter(pl.col("method") == "gradient-highest")
    assert (donors["task"] != donors["other_task"]).all()
    other_shots = curves.filter((pl.col("method") == "gradient") & (pl.col("other_shots") != pl.col("shots")))
    assert set(other_shots["other_shots"]) == {0, 4}
    assert set(rows.filter(pl.col("metric") == "knee")["task"]) == {
        "recall",
        "category",
        "knowledge",
        "aggregate",
    }
    assert set(curves["documents"].drop_nulls()) == {16, 48}


def test_a_point_is_what_an_evaluation_of_its_mask_says(
    paper_run: Path, stores: Path, tmp_path: Path
) -> None:
    name = "gradient-heads-50-recall-4shot"
    result = invoke(
        "evaluate", "--mask", paper_run / "run" / "masks" / f"{name}.json", "--tasks", "recall", "--shots", 4,
        "--limit", 16, "--store-dir", stores, "--out", tmp_path / "alone", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    alone = read_table(tmp_path / "alone" / "results.parquet", "results").filter(pl.col("mask") == name)
    together = read_table(paper_run / "run" / "results.parquet", "results").filter(
        (pl.col("mask") == name) & (pl.col("task") == "recall") & (pl.col("shots") == 4)
        & pl.col("other_task").is_null() & (pl.col("experiment") == "prune")
    )  # fmt: skip
    for metric in ("acc", "gold_logprob", "gold_prob"):
        (expected,), (got,) = (
            frame.filter(pl.col("metric") == metric)["value"].to_list() for frame in (alone, together)
        )
        assert got == pytest.approx(expected, abs=1e-9)
    mask = read_mask(paper_run / "run" / "masks" / f"{name}.json")
    assert len(mask.mask.heads) == 16
    assert mask.scores["after"]["acc"] == pytest.approx(
        together.filter(pl.col("metric") == "acc")["value"][0]
    )


def test_the_controls_error_counts_documents_and_draws(paper_run: Path) -> None:
    rows = read_table(paper_run / "run" / "results.parquet", "results").filter(
        (pl.col("procedure") == "random") & (pl.col("metric") == "gold_prob") & (pl.col("percent") == 60)
        & (pl.col("task") == "recall") & (pl.col("kind") == "head") & (pl.col("shots") == 4)
    )  # fmt: skip
    draws, mean = (rows.filter(pl.col("mask").is_not_null()), rows.filter(pl.col("mask").is_null()))
    assert len(draws) == 2
    spread = float(draws["value"].to_numpy().std(ddof=1)) / np.sqrt(2)
    assert mean["value"].to_list() == pytest.approx([draws["value"].mean()])
    (stderr,) = mean["stderr"].to_list()
    assert spread < stderr <= np.hypot(spread, draws["stderr"].to_numpy().max())


def test_mask_files_of_curves_say_what_is_lost_and_whether_the_task_is_at_chance(paper_run: Path) -> None:
    results = read_table(paper_run / "run" / "results.parquet", "results")
    clean = results.filter((pl.col("experiment") == "evaluate") & (pl.col("labels").is_null()))
    marked = set()
    for path in (paper_run / "run" / "masks").glob("gradient-heads-50-*-0shot.json"):
        scores = read_mask(path).scores
        assert scores["loss"] == pytest.approx(scores["before"]["gold_prob"] - scores["after"]["gold_prob"])
        assert scores["verdict"] in ("holds", "fails", "cannot tell")
        (task,) = (name for name in ("recall", "category", "knowledge", "aggregate") if name in path.stem)
        if scores.get("at_chance"):
            marked.add(task)
    accuracies = clean.filter((pl.col("metric") == "acc") & (pl.col("task") != "aggregate"))
    majority = dict(clean.filter(pl.col("metric") == "majority").select("task", "value").iter_rows())
    expected = {
        row["task"]
        for row in accuracies.iter_rows(named=True)
        if row["low"] <= max(row["chance"], majority[row["task"]])
    }
    assert marked - {"aggregate"} == expected
    assert expected
    assert expected < set(accuracies["task"])


def test_rescoring_starts_like_the_plain_curve_and_then_goes_its_own_way(paper_run: Path) -> None:
    masks = paper_run / "run" / "masks"

    def removed(method: str, percent: int) -> Mask:
        return read_mask(masks / f"{method}-heads-{percent}-recall-4shot.json").mask

    assert removed("rescored", 10) == removed("gradient", 10)
    for percent in LEVELS[1:-1]:
        assert len(removed("rescored", percent) - removed("rescored", percent + 10)) == 0


def test_drops_in_the_effects_are_those_of_the_results(paper_run: Path) -> None:
    effects = read_table(paper_run / "run" / "effects.parquet", "effects").filter(
        (pl.col("experiment") == "prune") & (pl.col("metric") == "gold_logprob_drop")
    )
    keys = ["task", "shots", "split", "mask"]
    means = effects.unique([*keys, "document"]).group_by(keys).agg(pl.col("value").mean().alias("mean"))
    results = read_table(paper_run / "run" / "results.parquet", "results").filter(
        (pl.col("experiment") == "prune") & (pl.col("metric") == "gold_logprob_drop")
    )
    both = results.join(means, on=keys)
    assert len(both) > 100
    np.testing.assert_allclose(both["value"], both["mean"], atol=1e-5)


def test_the_page_shows_curves_grid_and_knees(paper_run: Path) -> None:
    page = (paper_run / "run" / "report.html").read_text()
    for text in ("Pruning curves", "certain knee", "with heads and FFNs removed together", 'id="plot-grid"'):
        assert text in page


def test_every_mask_that_a_row_names_is_a_file(paper_run: Path) -> None:
    rows = read_table(paper_run / "run" / "results.parquet", "results")
    named = set(rows.filter(pl.col("experiment") == "prune")["mask"].drop_nulls()) - {"clean"}
    files = {path.stem for path in (paper_run / "run" / "masks").glob("*.json")}
    assert named
    assert named <= files


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_knee_of_half_the_levels_is_at_most_one_step_before(data: st.DataObject) -> None:
    increases = st.lists(st.floats(0, 0.006), min_size=len(LEVELS) - 1, max_size=len(LEVELS) - 1)
    losses = np.cumsum([0.0, *data.draw(increases)])
    half = LEVELS_BY_NAME["half"]
    of_half = losses[[LEVELS.index(level) for level in half]]
    assert knee(half, of_half) <= knee(LEVELS, losses) <= knee(half, of_half) + 10
