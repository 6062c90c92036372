"""Tasks out of domain have records of every experiment, and no part in what is said of all tasks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from played_work import ALL_CURVES, played, prepared_for

from lowmem_icl.experiments.order import run_stages
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.publish import Publisher
from lowmem_icl.session.result import StageResult


@dataclass(frozen=True)
class PlayedRun:
    """What a run was prepared with and what its stages ended with."""

    prepared: Prepared
    found: Mapping[str, StageResult]

    @property
    def results(self) -> pl.DataFrame:
        return pl.concat([result.results for result in self.found.values()])


@pytest.fixture(scope="module")
def run_with_lambada(tmp_path_factory: pytest.TempPathFactory) -> PlayedRun:
    """LAMBADA is out of domain: judged and ranked, and in no mean of scores, drops, curves, rankings or
    searches.
    """
    folder = tmp_path_factory.mktemp("data")
    (folder / "lambada").mkdir()
    rows = [json.dumps({"text": f"{' '.join(['the cat saw a dog'] * n)} wug"}) for n in range(1, 9)]
    (folder / "lambada" / "validation.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    prepared = prepared_for(
        tasks=("recall", "knowledge", "lambada"),
        data_dir=folder,
        shots=(0, 2),
        curves=ALL_CURVES,
        objective="gold_logprob",
    )
    found: dict[str, StageResult] = {}
    for stage, result, _ in run_stages(played(prepared), {}):
        found[stage.name] = result
    return PlayedRun(prepared, found)


def test_every_experiment_has_records_of_tasks_out_of_domain(run_with_lambada: PlayedRun) -> None:
    for name, result in run_with_lambada.found.items():
        assert "lambada" in set(result.results["task"]), name


@pytest.mark.parametrize(
    ("experiment", "procedure", "metrics"),
    [
        ("evaluate", None, ("acc", "gold_logprob", "gold_prob", "majority", "acc_label_effect")),
        ("ablate", "single", ("gold_logprob_drop", "gold_prob_drop", "acc_drop")),
        ("ablate", "icl-effect", ("icl_effect", "icl_effect_acc")),
        ("induction", "removal", ("acc", "gold_logprob", "acc_drop")),
        ("importance", None, ("gradient",)),
    ],
)
def test_means_over_tasks_leave_out_what_is_out_of_domain(
    run_with_lambada: PlayedRun, experiment: str, procedure: str | None, metrics: tuple[str, ...]
) -> None:
    kept = (
        "shots", "labels", "metric", "kind", "layer", "head", "percent", "heads_removed", "ffns_removed",
        "mask",
    )  # fmt: skip
    records = run_with_lambada.results.filter(
        (pl.col("experiment") == experiment)
        & pl.col("procedure").eq_missing(pl.lit(procedure))
        & pl.col("metric").is_in(metrics)
        & pl.col("method").ne_missing(pl.lit("random-median"))
    )
    expected = (
        records.filter(pl.col("task").is_in(["recall", "knowledge"]))
        .group_by(kept)
        .agg(pl.col("value").mean(), pl.col("documents").sum())
    )
    means = records.filter(pl.col("task") == "aggregate")
    both = means.join(expected, on=kept, nulls_equal=True, validate="1:1")
    assert len(both) == len(means) == len(expected) > 0
    np.testing.assert_allclose(both["value"], both["value_right"])
    assert (both["documents"] == both["documents_right"]).all()


def test_a_task_out_of_domain_is_pruned_by_its_own_ranking_and_prunes_no_other(
    run_with_lambada: PlayedRun,
) -> None:
    prune = run_with_lambada.results.filter(pl.col("experiment") == "prune")
    assert not set(prune.filter(pl.col("task") != "lambada")["mask_task"]) & {"lambada"}
    elsewhere = prune.filter((pl.col("procedure") == "greedy-transfer") & (pl.col("task") == "lambada"))
    assert set(elsewhere["mask_task"]) == {None, "lambada", "recall", "knowledge"}
    own = {"curve-heads", "curve-ffns", "cross-shot", "rescored", "greedy", "greedy-transfer"}
    assert set(prune.filter(pl.col("mask_task") == "lambada")["procedure"]) <= own
    assert not len(prune.filter((pl.col("procedure") == "transfer") & (pl.col("task") == "lambada")))
    means = prune.filter(pl.col("task") == "aggregate")
    counts = {shots: 2 * len(run_with_lambada.prepared.curves[0].documents) for shots in (0, 2)}
    curves = means.filter(
        pl.col("procedure").is_in(["curve-heads", "curve-ffns", "curve-combined", "random"])
    )
    judged = curves.filter(~pl.col("metric").str.starts_with("knee"))
    assert set(judged["documents"]) == set(counts.values())


def test_masks_and_rankings_of_all_tasks_leave_out_what_is_out_of_domain(
    run_with_lambada: PlayedRun, tmp_path: Path
) -> None:
    """A mask made for all tasks says which these are, and how many documents it was made from."""
    prepared, found = run_with_lambada.prepared, run_with_lambada.found
    opened: Any = SimpleNamespace(path=tmp_path)
    publisher = Publisher(prepared, opened, [], lambda folder, ends_as: None)
    shared = [made for made in found["prune"].masks if made.task == "aggregate"]
    assert {made.method for made in shared} >= {"greedy", "gradient", "ablation", "combined"}
    for made in shared:
        assert made.documents == 2 * len(prepared.train[0].documents), made.name
        assert publisher._mask_file(made).made["tasks"] == ["recall", "knowledge"]
    ranked = found["importance"].rankings | found["ablate"].rankings
    for key, documents in ranked.documents.items():
        if key.task == "aggregate":
            assert {member.task for member in documents.members} == {"recall", "knowledge"}
