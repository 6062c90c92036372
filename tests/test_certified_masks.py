"""Certificates: valid tests of a mean loss, in a fixed order, on documents that no search has seen."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from commands import invoke
from numpy.typing import NDArray

from lowmem_icl.experiments.prune.certify import (
    MOST_TESTED,
    Certificate,
    certifiable,
    notes,
    path_masks,
)
from lowmem_icl.masks.files import MaskFile, read_mask
from lowmem_icl.masks.mask import Mask, all_heads
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.costs import planned_work
from lowmem_icl.session.prepare import prepare
from lowmem_icl.session.record import run_record
from lowmem_icl.session.work import SweepPart
from lowmem_icl.statistics.certificate import (
    LEVEL,
    cluster_means,
    documents_needed,
    p_value_of_loss,
    passed_in_order,
    verdict,
)
from lowmem_icl.tables.schema import read_table

SAMPLES = 4000
# Three standard errors of a rate of 5 % in so many samples.
MONTE_CARLO = 3 * np.sqrt(0.05 * 0.95 / SAMPLES)


def losses_at(tolerance: float, shape: str, rng: np.random.Generator, size: tuple[int, int]) -> NDArray[Any]:
    """Losses whose mean is exactly the tolerance, so that nothing may be certified."""
    if shape == "rare":
        return (rng.random(size) < tolerance).astype(np.float64)
    if shape == "gains and losses":
        return rng.choice([-1.0, 0, 1.0], size, p=[0.1, 0.8 - tolerance, 0.1 + tolerance])
    if shape == "uniform":
        return rng.uniform(-0.1, 0.1 + 2 * tolerance, size)
    if shape == "skewed":
        return rng.beta(0.05, 0.05 * (1 - tolerance) / tolerance, size)
    return np.where(rng.random(size) < 0.5, 2 * tolerance, 0.0)


@pytest.mark.parametrize("shape", ["rare", "gains and losses", "uniform", "skewed", "half the units"])
@pytest.mark.parametrize(("tolerance", "documents"), [(0.01, 320), (0.01, 700), (0.1, 40), (0.1, 400)])
def test_what_loses_the_tolerance_is_rarely_certified(shape: str, tolerance: float, documents: int) -> None:
    losses = losses_at(tolerance, shape, np.random.default_rng(1), (SAMPLES, documents))
    assert losses.max() <= 1
    assert losses.mean() == pytest.approx(tolerance, rel=0.06)
    assert (p_value_of_loss(losses, tolerance) <= LEVEL).mean() <= LEVEL + MONTE_CARLO


def test_the_p_value_is_the_inverse_of_the_largest_capital() -> None:
    """Betting by hand: capital after each document, the bets' shares added."""
    losses, tolerance = [0.0, -0.4, 0.9, 0.05, 0.0, 0.0, 0.0], 0.2
    capital = dict(zip((1, 0.5, 0.25, 0.125), (0.85, 0.05, 0.05, 0.05), strict=True))
    largest = 0.0
    for loss in losses:
        for bet in capital:
            capital[bet] *= 1 + bet / (1 - tolerance) * (tolerance - loss)
        largest = max(largest, sum(capital.values()))
    assert p_value_of_loss(np.array([losses]), tolerance) == pytest.approx([1 / largest])
    assert p_value_of_loss(np.array([1.0, 1.0]), tolerance) == 1, "all is lost on the largest bet"


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.03, 0.01, 0.001])
def test_as_many_documents_are_needed_as_certify_where_nothing_is_lost(tolerance: float) -> None:
    needed = documents_needed(tolerance)
    assert p_value_of_loss(np.zeros(needed), tolerance) <= LEVEL
    assert p_value_of_loss(np.zeros(needed - 1), tolerance) > LEVEL
    # No test does with fewer than the exact one for losses of 0 or 1.
    assert np.log(LEVEL) / np.log1p(-tolerance) <= needed <= 1.1 * np.log(LEVEL) / np.log1p(-tolerance) + 1


def test_documents_of_a_cluster_are_one() -> None:
    values = np.array([[0.0, 1.0, 0.5, 0.2], [4.0, 2.0, 0.0, 1.0]])
    means = cluster_means(values, ["b", "a", "b", "c"])
    np.testing.assert_allclose(means, [[0.25, 1.0, 0.2], [2.0, 2.0, 1.0]])


def test_a_sequence_ends_at_its_first_failure() -> None:
    assert passed_in_order([]) == passed_in_order([0.06, 0.0]) == passed_in_order([float("nan")]) == 0
    assert passed_in_order([0.05, 0.01, 0.2, 0.0]) == 2
    masks = path_masks(all_heads(1, 4))
    assert Certificate(masks, (0.01, 0.05, 0.06, 0.01), 300).mask == masks[1]
    assert Certificate(masks, (0.5,), 300).mask == Mask()


@pytest.mark.parametrize("units", [1, 3, 16, 17, 150])
def test_masks_to_test_are_nested_evenly_spaced_and_end_with_the_path(units: int) -> None:
    removed = all_heads(15, 10)[:units]
    masks = path_masks(removed)
    assert len(masks) == min(units, MOST_TESTED)
    assert set(masks[-1].units()) == set(removed)
    for smaller, larger in itertools.pairwise(masks):
        assert len(smaller - larger) == 0
        assert len(larger - smaller) in (units // len(masks), units // len(masks) + 1)
    assert path_masks([]) == ()


def test_a_verdict_needs_an_interval_on_one_side() -> None:
    assert verdict(-0.01, 0.01, 0.01) == "holds"
    assert verdict(0.011, 0.05, 0.01) == "fails"
    assert verdict(0.01, 0.05, 0.01) == verdict(None, None, 0.01) == "cannot tell"


RUN = (
    "--tasks", "recall,knowledge", "--shots", "0,4", "--limit", 16, "--train-limit", 8, "--tolerance", 0.1,
    "--certify-limit", 40, "--experiments", "prune",
)  # fmt: skip


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """Folder of a run with certificates, small."""
    folder = tmp_path_factory.mktemp("certified") / "run"
    result = invoke("run", *RUN, "--store-dir", stores, "--out", folder, "--quiet")
    assert result.exit_code == 0, result.output
    return folder


def masks_of(folder: Path) -> dict[str, MaskFile]:
    return {path.stem: read_mask(path) for path in (folder / "masks").glob("*.json")}


def test_documents_that_certify_have_not_been_searched_on(stores: Path) -> None:
    prepared = prepare(options_of(stores))
    assert len(prepared.certify) == len(prepared.train) == 4
    for searched, further in zip(prepared.train, prepared.certify, strict=True):
        assert (searched.task, searched.shots, searched.split) == (further.task, further.shots, further.split)
        prompts = {tuple(document.options) for document in searched.documents}
        assert not prompts & {tuple(document.options) for document in further.documents}
        indices = {document.index for document in searched.documents}
        assert not indices & {document.index for document in further.documents}
        assert len(searched.documents) == 8
        if further.shots:
            assert len(further.documents) == 40
    without = prepare(options_of(stores, certify_limit=0))
    assert without.certify == ()
    for plain, same in zip(without.train, prepared.train, strict=True):
        assert [document.index for document in plain.documents] == [
            document.index for document in same.documents
        ], "the search's documents are the same"


def test_documents_of_shared_demonstrations_are_too_few(stores: Path) -> None:
    prepared = prepare(options_of(stores, tasks=("knowledge",), demonstrations="shared", shots=(4,)))
    assert [len(task.documents) for task in prepared.certify] == [0], "all sets have been searched on"
    (note,) = notes(prepared)
    assert "knowledge 0" in note
    assert f"needs {documents_needed(0.1)}" in note


def test_certified_masks_lie_on_the_path_and_say_what_they_cost(searched: Path) -> None:
    masks, record = masks_of(searched), run_record(searched)
    results = read_table(searched / "results.parquet", "results")
    certificates = {(of["task"], of["shots"]): of for of in record["certificates"]}
    # At 0 shots `recall` has too few prompts.
    assert set(certificates) == {("knowledge", 0), ("recall", 4), ("knowledge", 4), ("aggregate", 4)}
    assert any(of["certified_units"] for of in certificates.values())
    for (task, shots), certificate in certificates.items():
        name = f"certified-{task}-{shots}shot"
        assert (name in masks) == (certificate["certified_units"] > 0)
        passed = [p <= LEVEL for p in certificate["p_values"]]
        assert all(passed[:-1][: -(-len(passed) // 4) * 4 - 4]), "nothing is tested after a failure"
        if name not in masks:
            continue
        mask, greedy = masks[name], masks[f"greedy-{task}-{shots}shot"]
        assert len(mask.mask) == certificate["certified_units"] in certificate["units"]
        assert len(mask.mask - greedy.mask) == 0
        judged = results.filter((pl.col("mask") == name) & (pl.col("task") == task))
        assert set(judged["method"]) == {"certified"}
        assert {"acc", "gold_prob", "gold_prob_drop"} <= set(judged["metric"])


def test_every_mask_says_whether_its_loss_keeps_the_tolerance(searched: Path) -> None:
    for name, mask in masks_of(searched).items():
        scores = mask.scores
        assert (scores["objective"], scores["tolerance"]) == ("gold_prob", 0.1)
        lost = scores["before"]["gold_prob"] - scores["after"]["gold_prob"]
        assert scores["loss"] == pytest.approx(lost, abs=1e-9), name
        low, high = scores["interval"] or (None, None)
        assert scores["verdict"] == verdict(low, high, 0.1)
        assert scores["interval"] is None or low <= scores["loss"] <= high
        assert scores["documents"] == (32 if "aggregate" in name else 16)
        assert not any(metric.endswith("_drop") for metric in scores["after"])


def test_the_same_command_again_changes_nothing(searched: Path, stores: Path) -> None:
    before, record = masks_of(searched), run_record(searched)
    parts = {path: path.stat().st_mtime_ns for path in (searched / "parts").glob("prune-certify*")}
    assert parts
    again = invoke("run", *RUN, "--store-dir", stores, "--out", searched, "--quiet")
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert masks_of(searched) == before
    assert run_record(searched)["certificates"] == record["certificates"]


def test_plans_and_runs_say_what_certificates_need(searched: Path, stores: Path) -> None:
    planned = invoke("plan", *RUN, "--store-dir", stores)
    assert planned.exit_code == 0, planned.output
    needed = documents_needed(0.1)
    assert f"a certificate of tolerance 0.1 needs at least {needed} training documents" in planned.stdout
    assert "possible for 4 of 6 searches" in planned.stdout
    (lacking,) = (text for text in run_record(searched)["warnings"] if "too few training documents" in text)
    assert "recall" in lacking
    assert "knowledge" not in lacking
    assert lacking in planned.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"certify_limit": 0}, ""),
        ({"objective": "gold_logprob"}, "has no bound"),
        ({"certify_limit": 10}, "needs"),
    ],
)
def test_no_certificate_is_tried_where_none_can_come(
    stores: Path, changes: dict[str, object], said: str
) -> None:
    prepared = prepare(options_of(stores, shots=(4,), **changes))
    assert certifiable(prepared) == []
    assert said in " ".join(notes(prepared))
    assert bool(notes(prepared)) == bool(said)
    planned = [part for work in planned_work(prepared) for part in work.parts]
    assert not [part for part in planned if "certify" in part.label]


def test_certificates_are_counted_with_all_their_masks(stores: Path) -> None:
    prepared = prepare(options_of(stores, shots=(4,)))
    planned = [part for work in planned_work(prepared) for part in work.parts if "certify" in part.label]
    # Of each task its own path's and that of both tasks together, 4 masks a sweep, and the clean run.
    assert len(planned) == 4
    masks = [len(job.masks) for part in planned if isinstance(part, SweepPart) for job in part.jobs]
    assert masks == [5] * 8


def options_of(stores: Path, **changes: object) -> RunOptions:
    fields = {
        "tasks": "recall,knowledge", "shots": (0, 4), "limit": 16, "train_limit": 8, "tolerance": 0.1,
        "certify_limit": 40, "experiments": ("prune",), "store_dir": stores,
    }  # fmt: skip
    return RunOptions.model_validate(fields | changes)
