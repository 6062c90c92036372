"""Runs that stop by the clock and ablations that are screened: what is there is marked,
kept and gone on from.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from commands import invoke, run_small
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.ablate.measure import Estimates, screened
from lowmem_icl.experiments.ablate.sweeps import doubling_chunks, every_set_first, scored_so_far
from lowmem_icl.planning.hours import Deadlines
from lowmem_icl.planning.plan import Plan, make_plan
from lowmem_icl.session.work import OutOfTime, SweepPart, Work
from lowmem_icl.tables.schema import read_table
from lowmem_icl.tasks.documents import Document, TaskRows


@given(documents=st.integers(1, 300))
def test_chunks_start_small_and_hold_every_document_once(documents: int) -> None:
    chunks = doubling_chunks(documents)
    seen = [index for chunk in chunks for index in range(documents)[chunk]]
    assert seen == list(range(documents))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert sizes[:2] == [1, 1][: len(sizes)]
    assert all(size <= 16 for size in sizes)
    assert len(chunks) <= 6 + documents / 16


def dealt(sets: list[int | None], options: list[int] | None = None) -> TaskRows:
    """A task whose documents were dealt to these sets, with so many options each."""
    documents = tuple(
        Document(10 + number, [("", " a")] * count, (True,) * count, "", (), "", 0, {}, set_number)
        for number, (set_number, count) in enumerate(zip(sets, options or [2] * len(sets), strict=True))
    )
    return TaskRows("made", 2, "train", documents, "acc", ())


def test_ablations_begin_with_a_document_of_every_set() -> None:
    task = dealt([0, 0, 0, 1, 1, 2, 2, 2])
    swept = every_set_first(task)
    assert [document.index - 10 for document in swept.documents] == [0, 3, 5, 1, 2, 4, 6, 7]
    alone = dealt([None] * 5)
    assert every_set_first(alone) is alone


def test_what_is_scored_so_far_stands_in_the_order_of_the_task() -> None:
    task = dealt([0, 0, 1, 1, 2], [1, 2, 3, 1, 2])
    swept = every_set_first(task)
    # Swept: documents 0, 2, 4, then 1; each option's score says whose it is: document + option / 10.
    columns = [np.array([[0.0]]), np.array([[2.0, 2.1, 2.2]]), np.array([[4.0, 4.1, 1.0, 1.1]])]
    chunks = [Scores(values, values > 1, np.ones(values.shape, dtype=np.bool_)) for values in columns]
    done, scores = scored_so_far(task, swept, chunks)
    assert [document.index - 10 for document in done.documents] == [0, 1, 2, 4]
    assert scores.logprobs.tolist() == [[0.0, 1.0, 1.1, 2.0, 2.1, 2.2, 4.0, 4.1]]
    assert np.array_equal(scores.greedy, scores.logprobs > 1)
    only_first, _ = scored_so_far(task, swept, chunks[:2])
    assert [document.index - 10 for document in only_first.documents] == [0, 2]


@given(units=st.integers(1, 60), exact=st.integers(1, 70), seed=st.integers(0, 50))
def test_a_screen_takes_what_could_be_largest_and_a_tenth_by_chance(
    units: int, exact: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    by_document = rng.normal(0, 1, (4, units)) * rng.exponential(1, units)
    estimates = Estimates.of_documents(by_document, ["a", "b", "c", "d"])
    chosen, drawn = screened(estimates, exact, seed)
    assert len(chosen) == min(exact, units)
    assert sorted(set(chosen)) == list(chosen)
    if exact < units:
        assert len(drawn) == exact // 10
        assert set(drawn) <= set(chosen)
        bound = np.abs(estimates.value) + 2 * estimates.stderr
        by_size = sorted(set(chosen) - set(drawn))
        left = np.setdiff1d(np.arange(units), by_size)
        assert not len(by_size) or bound[by_size].min() >= bound[left].max()
    again, _ = screened(estimates, exact, seed)
    assert np.array_equal(again, chosen)


def test_one_document_or_one_cluster_leaves_every_estimate_uncertain() -> None:
    for values, clusters in (([[0.5, -0.2]], ["a"]), ([[0.25, -0.2], [0.75, -0.2]], ["a", "a"])):
        estimates = Estimates.of_documents(np.array(values), clusters)
        assert estimates.value.tolist() == [0.5, -0.2]
        assert np.isinf(estimates.stderr).all()


def test_a_screen_counts_documents_that_share_demonstrations_once() -> None:
    """Unit 0 differs between two sets of demonstrations, unit 1 as much between documents of a set."""
    clusters = ["set 0"] * 8 + ["set 1"] * 8
    by_document = np.stack([np.repeat([1.0, -1.0], 8), np.tile([1.0, -1.0], 8)], axis=1)
    estimates = Estimates.of_documents(by_document, clusters)
    assert estimates.stderr[0] == pytest.approx(1.0), "two observations, not sixteen"
    assert estimates.stderr[1] == pytest.approx(0)
    chosen, _ = screened(estimates, 1, seed=0)
    assert chosen.tolist() == [0]


def test_a_screened_run_marks_what_is_estimated_and_says_how_far_that_agrees(
    small_run: Path, stores: Path, tmp_path: Path
) -> None:
    out = tmp_path / "screened"
    more = ("--experiments", "importance,ablate,overlap")
    result = run_small(out, stores, "--screen", "attribution", "--exact", 20, *more)
    assert result.exit_code == 0, result.output
    screened_rows, whole_rows = (
        read_table(folder / "results.parquet", "results").filter(pl.col("experiment") == "ablate")
        for folder in (out, small_run)
    )
    keys = ["task", "shots", "kind", "layer", "head"]
    drops = screened_rows.filter(pl.col("metric") == "gold_logprob_drop")
    assert set(drops.group_by("task", "shots").len()["len"]) == {36}, "every unit has a number"
    means, drops = (
        drops.filter(of_mean) for of_mean in (pl.col("task") == "aggregate", pl.col("task") != "aggregate")
    )
    assert set(drops.group_by("task", "shots").agg(pl.col("exact").sum())["exact"]) == {20}
    by_unit = drops.group_by(keys[1:]).agg(pl.col("exact").all(), pl.col("value").mean())
    both = means.join(by_unit, on=keys[1:], nulls_equal=True)
    assert len(both) == len(means) == 2 * 36
    assert (both["exact"] == both["exact_right"]).all(), "a mean that has an estimate in it is one"
    assert not both["exact"].all()
    np.testing.assert_allclose(both["value"], both["value_right"])
    assert set(both.filter(pl.col("exact"))["method"]) == {"ablation"}
    assert set(both.filter(~pl.col("exact"))["method"]) == {"attribution"}
    exact, estimated = drops.filter(pl.col("exact")), drops.filter(~pl.col("exact"))
    assert set(exact["method"]) == {"ablation"}
    assert set(estimated["method"]) == {"attribution"}
    both = exact.join(whole_rows.filter(pl.col("metric") == "gold_logprob_drop"), on=keys, nulls_equal=True)
    assert (both["value"] == both["value_right"]).all(), "exact ones are those of a whole run"
    importance = read_table(out / "results.parquet", "results").filter(pl.col("metric") == "attribution")
    both = estimated.join(importance, on=keys, nulls_equal=True)
    assert len(both) == len(estimated)
    assert (both["value"] == both["value_right"]).all()
    others = screened_rows.filter(pl.col("metric").is_in(["acc_drop", "gold_prob_drop", "margin_drop"]))
    assert others["exact"].all()
    agreement = screened_rows.filter(pl.col("metric") == "estimate_spearman")
    assert set(agreement.filter(pl.col("method") == "attribution")["count"]) == {20}
    assert set(agreement.filter(pl.col("method") == "attribution-drawn")["count"]) <= {2}
    assert agreement["value"].is_between(-1, 1).all()
    effects = read_table(out / "effects.parquet", "effects")
    assert effects.select(keys).n_unique() == len(exact)
    page = (out / "report.html").read_text()
    assert "estimated" in page
    units = read_table(out / "results.parquet", "results").filter(pl.col("method") == "ablation")
    overlap = units.filter(pl.col("experiment") == "overlap")
    assert set(overlap["percent"].drop_nulls()) == {10, 20, 30, 40, 50}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--exact", "5"), "expected with --screen attribution"),
        (("--screen", "attribution", "--experiments", "ablate"), "its estimates come from importance"),
        (("--hours", "0"), "--hours: expected a number above 0"),
        (("--demonstration-sets", "0"), "--demonstration-sets: expected a whole number of at least 1"),
    ],
)
def test_options_that_make_no_sense_are_told(
    stores: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run_small(tmp_path / "out", stores, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_out_of_time_keeps_whole_chunks_and_the_same_command_goes_on(
    small_run: Path, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiments = ["evaluate", "importance", "ablate", "prune", "overlap"]
    out, more = tmp_path / "run", ("--experiments", ",".join(experiments))
    checks, at_work = 0, ""
    patient, swept = Work.check_time, Work.sweep

    def noted(self: Work, part: SweepPart) -> list[Scores]:
        nonlocal at_work
        at_work = part.name
        return swept(self, part)

    def impatient(self: Work) -> None:
        nonlocal checks
        checks += at_work.startswith("ablate")
        # Two checks per chunk: before it and behind its only wave.
        if at_work.startswith("ablate") and checks == 5:
            raise OutOfTime
        patient(self)

    monkeypatch.setattr(Work, "sweep", noted)
    monkeypatch.setattr(Work, "check_time", impatient)
    result = run_small(out, stores, "--hours", 10, *more)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "run.json").read_text())
    assert record["state"] == "out of time"
    cut, waiting = record["warnings"][-2:]
    assert "ablate: the time was over after 2 of 8 documents per task" in cut
    assert "prune: waits for the ablations to finish" in waiting, "its masks depend on all of them"
    finished = {name: stage["finished"] for name, stage in record["stages"].items()}
    assert finished == {name: name not in ("ablate", "prune") for name in experiments}
    assert read_table(out / "results.parquet", "results").filter(experiment="prune").is_empty()
    ablate = read_table(out / "results.parquet", "results").filter(pl.col("experiment") == "ablate")
    assert set(ablate.filter(pl.col("task") != "aggregate")["documents"]) == {2}
    assert "overlap" in record["stages"], "what follows is done with what there is"
    effects = read_table(out / "effects.parquet", "effects")
    assert effects.filter((pl.col("task") == "recall") & (pl.col("shots") == 0))["document"].n_unique() == 2
    monkeypatch.setattr(Work, "check_time", patient)
    assert run_small(out, stores, "--hours", 5, *more).exit_code == 0, "hours belong to no run"
    assert json.loads((out / "run.json").read_text())["state"] == "finished"
    ours, whole = (read_table(folder / "results.parquet", "results") for folder in (out, small_run))
    assert ours.equals(whole.filter(pl.col("experiment").is_in(experiments)))


def test_hours_that_do_not_do_for_the_basis_are_told(stores: Path, tmp_path: Path) -> None:
    result = run_small(tmp_path / "out", stores, "--hours", "0.000001")
    assert result.exit_code == 3
    assert "evaluate and importance alone take about" in result.stderr


def test_shared_demonstrations_run_and_intervals_cluster_by_set(stores: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    result = invoke(
        "run", "--tasks", "knowledge", "--shots", "16", "--limit", 64, "--train-limit", 8, "--demonstrations",
        "shared", "--demonstration-sets", 4, "--experiments", "evaluate,ablate", "--store-dir", stores,
        "--out", out, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    results = read_table(out / "results.parquet", "results")
    assert set(results["demonstrations"]) == {"shared"}
    assert results.filter(pl.col("metric") == "acc")["stderr"].is_finite().all()
    record = json.loads((out / "run.json").read_text())
    alone = json.loads(
        invoke(
            "plan", "--tasks", "knowledge", "--shots", "16", "--limit", 64, "--train-limit", 8,
            "--experiments", "evaluate,ablate", "--store-dir", stores, "--json",
        ).stdout
    )  # fmt: skip
    ours, theirs = (sum(stage["operations"] for stage in plan["stages"]) for plan in (record["plan"], alone))
    assert ours < 0.75 * theirs


def test_with_shared_demonstrations_every_set_comes_early_and_results_stay_as_they_are(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> Path:
        result = invoke(
            "run", "--tasks", "knowledge", "--shots", "0,4", "--limit", 16, "--train-limit", 12,
            "--demonstrations", "shared", "--demonstration-sets", 3, "--experiments", "ablate",
            "--store-dir", stores, "--out", tmp_path / name, "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return tmp_path / name

    patient = Work.sweep

    def impatient(self: Work, part: SweepPart) -> list[Scores]:
        if part.name == "ablate-000004":
            raise OutOfTime
        return patient(self, part)

    monkeypatch.setattr(Work, "sweep", impatient)
    out = run("interleaved")
    early = read_table(out / "effects.parquet", "effects").filter(shots=4, metric="gold_logprob_drop")
    monkeypatch.setattr(Work, "sweep", patient)
    assert run("interleaved") == out, "the same command goes on"
    monkeypatch.setattr("lowmem_icl.experiments.ablate.sweeps.every_set_first", lambda task: task)
    ours, plain = (
        read_table(folder / "effects.parquet", "effects") for folder in (out, run("in the order of the task"))
    )
    assert ours.drop("value").equals(plain.drop("value")), "documents stand as they did"
    np.testing.assert_allclose(ours["value"], plain["value"], atol=1e-4)
    documents = plain.filter(shots=4, metric="gold_logprob_drop", kind="ffn", layer=0)["document"].to_list()
    # Of twelve documents in three sets each has four.
    assert early["document"].unique(maintain_order=True).to_list() == [
        documents[number] for number in (0, 1, 4, 8)
    ]


def test_planning_takes_of_the_hours(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments: dict[str, float] = {}

    def planned(*given: Any, **named: Any) -> Plan:
        moments["planning"] = time.monotonic()
        return make_plan(*given, **named)

    def deadlines(plan: Plan, started: float) -> Deadlines:
        moments["started"] = started
        return Deadlines(plan, started)

    monkeypatch.setattr("lowmem_icl.runner.make_plan", planned)
    monkeypatch.setattr("lowmem_icl.runner.Deadlines", deadlines)
    told = run_small(tmp_path / "run", stores, "--experiments", "evaluate", "--hours", 5)
    assert told.exit_code == 0, told.output
    assert moments["started"] <= moments["planning"]
