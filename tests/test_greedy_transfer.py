"""Greedy masks on other tasks: every task under the masks of all, as a plain evaluation of each says."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import invoke
from played_work import last_results, played, prepared_for

from lowmem_icl.experiments.prune.greedy_transfer import expected_parts, transferred
from lowmem_icl.masks.files import read_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.planning.costs import planned_work
from lowmem_icl.session.result import MaskResult
from lowmem_icl.session.work import SweepPart
from lowmem_icl.tables.schema import ACCURACIES, read_table

TASKS = ("recall", "category", "knowledge")
FEW = ("--tasks", ",".join(TASKS), "--shots", "4")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """A run of searches alone."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    result = invoke(
        "run", *FEW, "--limit", 24, "--curve-limit", 10, "--train-limit", 6, "--labels", "right",
        "--experiments", "evaluate,prune", "--curves", "", "--certify-limit", 0, "--store-dir", stores,
        "--out", folder, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


def transfers(folder: Path) -> pl.DataFrame:
    results = read_table(folder / "results.parquet", "results")
    return results.filter(pl.col("procedure") == "greedy-transfer")


def test_every_task_is_judged_under_the_mask_of_every_task(searched: Path) -> None:
    records = transfers(searched).filter(pl.col("metric").is_in(ACCURACIES))
    pairs = records.filter(pl.col("mask") != "clean").select("mask_task", "task").rows()
    assert sorted(pairs) == sorted((donor, task) for donor in TASKS for task in TASKS)
    assert sorted(records.filter(pl.col("mask") == "clean")["task"]) == sorted(TASKS)
    assert set(records["documents"]) == {10}
    assert (records["experiment"] == "prune").all()
    # A mean over tasks of a mask would hold the task that it was made for.
    assert "aggregate" not in set(transfers(searched)["task"]) | set(transfers(searched)["mask_task"])


def test_a_transfer_is_what_an_evaluation_of_the_mask_says(
    searched: Path, stores: Path, tmp_path: Path
) -> None:
    names = [f"greedy-{task}-4shot" for task in TASKS]
    given = [part for name in names for part in ("--mask", searched / "masks" / f"{name}.json")]
    result = invoke(
        "evaluate", *given, *FEW, "--limit", 10, "--store-dir", stores, "--out", tmp_path / "alone", "--quiet"
    )
    assert result.exit_code == 0, result.output
    alone = read_table(tmp_path / "alone" / "results.parquet", "results").filter(
        (pl.col("task") != "aggregate") & (pl.col("labels") == "right")
    )
    records, keys = transfers(searched), ["task", "mask", "metric"]
    both = records.join(alone, on=keys, suffix="_alone")
    assert len(both) == len(alone) == len(records)
    for name in ("value", "low", "high", "chance", "documents", "heads_removed", "ffns_removed"):
        np.testing.assert_allclose(both[name].cast(float), both[f"{name}_alone"].cast(float), atol=1e-9)
    for name in names:
        removed = read_mask(searched / "masks" / f"{name}.json").mask
        of_mask = records.filter(pl.col("mask") == name)
        assert set(of_mask["heads_removed"]) == {len(removed.heads)}
        assert set(of_mask["ffns_removed"]) == {len(removed.ffns)}


@pytest.mark.parametrize("metric", ["acc", "gold_logprob", "gold_prob"])
def test_drops_are_paired_with_the_clean_run_on_the_same_documents(searched: Path, metric: str) -> None:
    records = transfers(searched)
    clean = records.filter((pl.col("mask") == "clean") & (pl.col("metric") == metric)).select(
        "task", pl.col("value").alias("clean")
    )
    left = records.filter((pl.col("mask") != "clean") & (pl.col("metric") == metric)).join(clean, on="task")
    drops = records.filter(pl.col("metric") == f"{metric}_drop").select("task", "mask", drop="value")
    both = left.join(drops, on=["task", "mask"])
    assert len(both) == len(TASKS) ** 2
    np.testing.assert_allclose(both["drop"], both["clean"] - both["value"], atol=1e-9)


def test_masks_that_remove_the_same_are_swept_once() -> None:
    prepared = prepared_for(shots=(0, 4))
    one, other = Mask(ffns=frozenset([1])), Mask(heads=frozenset([(0, 0)]))
    removed = {"recall": one, "knowledge": one, "repeat": Mask()}
    made = [
        MaskResult(f"greedy-{task}-{shots}", removed[task] if shots else other, "greedy", task, shots, 3)
        for task in removed
        for shots in (0, 4)
    ]
    others = [
        MaskResult("random", Mask(ffns=frozenset([2])), "random", "recall", 4, 3),
        MaskResult("all", Mask(ffns=frozenset([3])), "greedy", "aggregate", 4, 3),
    ]
    work = played(prepared)
    records = transferred(work, [*made, *others])
    (part,) = (part for part in work.asked if isinstance(part, SweepPart))
    assert {(job.task.shots, job.masks) for job in part.jobs} == {(0, (Mask(), other)), (4, (Mask(), one))}
    assert set(records["mask"]) == {"clean", *(mask.name for mask in made)}
    same = records.filter((pl.col("mask_task") != "repeat") & (pl.col("shots") == 4))
    assert (same.group_by("task", "metric").agg(pl.col("value").n_unique())["value"] == 1).all()
    nothing = records.filter((pl.col("mask") == "greedy-repeat-4") & pl.col("metric").str.ends_with("_drop"))
    assert set(nothing["value"]) == {0}


def test_a_plan_counts_them_once_per_task_and_after_all_else() -> None:
    prepared = prepared_for(experiments=("prune",), curves=())
    (part,) = expected_parts(prepared)
    assert {len(job.masks) for job in part.jobs} == {1 + 3}
    (pruning,) = planned_work(prepared)
    assert (pruning.parts[-1], pruning.last) == (part, part.name)
    assert expected_parts(prepared_for(tasks=("recall",))) == [], "a task alone has nothing to be judged on"


def test_searches_whose_masks_wait_to_be_judged_elsewhere_keep_these() -> None:
    prepared = prepared_for(experiments=("prune",), curves=())
    cut = last_results(played(prepared, no_time_for="prune-transfer"))["prune"]
    whole = last_results(played(prepared))["prune"]
    assert cut.unfinished
    assert not whole.unfinished
    assert cut.masks == whole.masks
    elsewhere = whole.results.filter(pl.col("procedure") == "greedy-transfer")
    assert len(elsewhere) > 0
    assert cut.results.equals(whole.results.head(len(cut.results)))
    assert len(whole.results) == len(cut.results) + len(elsewhere)
