"""Whole runs as a user starts them: tables, masks and page."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from commands import invoke

from lowmem_icl.masks.files import read_mask
from lowmem_icl.session.record import record_text
from lowmem_icl.tables.schema import read_table
from lowmem_icl.tasks.catalogue import PAPER_TASKS


def test_a_run_leaves_what_the_contract_names(small_run: Path) -> None:
    for name in (
        "run.json",
        "results.parquet",
        "effects.parquet",
        "answers.parquet",
        "report.html",
        "run.log",
    ):
        assert (small_run / name).is_file(), name
    record = json.loads((small_run / "run.json").read_text())
    assert record["state"] == "finished"
    assert set(record["stages"]) == {"evaluate", "importance", "ablate", "prune", "induction", "overlap"}
    assert all(stage["seconds"] >= 0 for stage in record["stages"].values())
    results = read_table(small_run / "results.parquet", "results")
    assert set(results["experiment"]) == set(record["stages"])
    assert set(results["model"]) == {"demo"}
    splits = dict(
        results.filter(pl.col("task") == "recall")
        .group_by("experiment")
        .agg(pl.col("split").unique())
        .iter_rows()
    )
    assert splits["evaluate"] == splits["prune"] == ["validation"]
    assert splits["importance"] == splits["ablate"] == ["train"]


def test_every_unit_of_every_task_has_its_drops_and_the_mean_over_tasks_too(small_run: Path) -> None:
    ablate = read_table(small_run / "results.parquet", "results").filter(
        (pl.col("experiment") == "ablate")
        & (pl.col("procedure") == "single")
        & pl.col("metric").str.ends_with("_drop")
    )
    counts = ablate.group_by("task", "shots", "metric", "kind").len()
    assert set(counts.filter(pl.col("kind") == "head")["len"]) == {32}
    assert set(counts.filter(pl.col("kind") == "ffn")["len"]) == {4}
    assert len(counts) == 3 * 2 * 4 * 2, "two tasks and their mean, shot counts, metrics, kinds"
    assert set(ablate["metric"]) == {"gold_logprob_drop", "gold_prob_drop", "margin_drop", "acc_drop"}
    effects = read_table(small_run / "effects.parquet", "effects")
    means = effects.group_by("task", "shots", "kind", "layer", "head", "metric").agg(pl.col("value").mean())
    keys = ["task", "shots", "kind", "layer", "head", "metric"]
    of_tasks = ablate.filter(pl.col("task") != "aggregate")
    both = of_tasks.join(means, on=keys, nulls_equal=True, suffix="_effects")
    assert len(both) == len(of_tasks)
    np.testing.assert_allclose(both["value"], both["value_effects"], atol=1e-5)
    over_tasks = of_tasks.group_by(keys[1:]).agg(pl.col("value").mean(), pl.col("documents").sum())
    aggregate = ablate.filter(pl.col("task") == "aggregate").join(over_tasks, on=keys[1:], nulls_equal=True)
    assert len(aggregate) == len(over_tasks)
    np.testing.assert_allclose(aggregate["value"], aggregate["value_right"], atol=1e-12)
    assert (aggregate["documents"] == aggregate["documents_right"]).all()


def test_every_number_says_its_procedure_its_labels_and_how_units_were_removed(small_run: Path) -> None:
    results = read_table(small_run / "results.parquet", "results")
    procedures = {
        experiment: set(names)
        for experiment, names in results.group_by("experiment").agg(pl.col("procedure").unique()).iter_rows()
    }
    assert procedures == {
        "evaluate": {None},
        "importance": {None},
        "ablate": {"single", "top", "icl-effect"},
        "prune": {"curve-heads", "curve-ffns", "random", "greedy", "greedy-transfer"},
        "induction": {"scores", "capacity", "important-heads", "removal"},
        "overlap": {"pair", "reliability", "cross-shot"},
    }
    shown = results.filter(pl.col("shots") > 0)
    assert set(shown.filter(pl.col("experiment") == "evaluate")["labels"]) == {"right", "shuffled", "foreign"}
    assert set(shown.filter(pl.col("experiment") != "evaluate")["labels"]) == {"right"}
    assert results.filter(pl.col("shots").is_null() | (pl.col("shots") == 0))["labels"].null_count() == (
        len(results) - len(shown)
    )
    removed = pl.col("heads_removed").fill_null(0) + pl.col("ffns_removed").fill_null(0) > 0
    assert set(results.filter(removed)["ablation"]) == {"zero"}
    assert set(results.filter(~removed)["ablation"]) == {None}


def test_nothing_need_be_parsed_out_of_a_masks_name(small_run: Path) -> None:
    """What a mask was made for, how, and at which level stand in columns of their own."""
    results = read_table(small_run / "results.parquet", "results")
    prune = results.filter(pl.col("experiment") == "prune")
    fields = ("procedure", "method", "kind", "percent", "mask_task", "mask_shots", "mask")
    named = prune.filter(pl.col("mask").is_not_null() & (pl.col("mask") != "clean"))
    removing, drawn = (
        named.filter((pl.col("procedure") == "random") == is_drawn) for is_drawn in (False, True)
    )
    rows = removing.select(fields).unique().to_dicts()
    kinds = {"curve-heads": "heads", "curve-ffns": "ffns", "greedy": None, "greedy-transfer": None}
    assert {row["procedure"] for row in rows} == set(kinds)
    for row in rows:
        kind = kinds[row["procedure"]]
        level = f"-{kind}-{row['percent']}" if kind else ""
        assert (row["percent"] is None) == (kind is None)
        assert row["mask"] == f"{row['method']}{level}-{row['mask_task']}-{row['mask_shots']}shot"
        made = read_mask(small_run / "masks" / f"{row['mask']}.json").made
        assert (made["method"], made["shots"]) == (row["method"], [row["mask_shots"]])
        assert made["tasks"] == (
            ["recall", "knowledge"] if row["mask_task"] == "aggregate" else [row["mask_task"]]
        )
    for row in drawn.iter_rows(named=True):
        seed = results.filter(pl.col("experiment") == "evaluate")["seed"][0]
        assert row["mask"] == f"random-{row['kind']}s-{row['percent']}-draw{row['seed'] - seed}"
    # The clean run was made from nothing; tasks that each prune by their own ranking have no one mask.
    clean = prune.filter(pl.col("mask") == "clean")
    assert clean["mask_task"].null_count() == clean["mask_shots"].null_count() == len(clean) > 0
    own = prune.filter(pl.col("mask").is_null() & (pl.col("procedure") != "random"))
    assert set(own["task"]) == {"aggregate"}
    assert set(own["mask_task"]) == {None}
    assert (own["mask_shots"] == own["shots"]).all()
    evaluate = results.filter(pl.col("experiment") == "evaluate")
    for column in ("mask_task", "mask_shots", "percent", "count"):
        assert evaluate[column].null_count() == len(evaluate)
    assert set(results.filter(pl.col("count").is_not_null())["procedure"]) == {
        "top",
        "important-heads",
        "pair",
    }
    assert set(results.filter(pl.col("percent").is_not_null())["procedure"]) == {
        "curve-heads",
        "curve-ffns",
        "random",
        "capacity",
        "pair",
    }


def test_claims_and_in_context_effects_come_from_the_documents_of_the_drops(small_run: Path) -> None:
    results = read_table(small_run / "results.parquet", "results")
    ablate = results.filter(pl.col("experiment") == "ablate")
    effects = read_table(small_run / "effects.parquet", "effects").filter(
        pl.col("metric") == "gold_logprob_drop"
    )
    keys = ["task", "kind", "layer", "head"]
    at_none, at_four = (
        effects.filter(pl.col("shots") == shots).select(*keys, "document", "value") for shots in (0, 4)
    )
    paired = at_four.join(at_none, on=[*keys, "document"], nulls_equal=True, suffix="_none")
    expected = paired.group_by(keys).agg((pl.col("value") - pl.col("value_none")).mean().alias("expected"))
    in_context = ablate.filter((pl.col("metric") == "icl_effect") & (pl.col("task") != "aggregate"))
    assert set(in_context["shots"]) == {4}
    both = in_context.join(expected, on=keys, nulls_equal=True)
    assert len(both) == len(in_context) == 2 * 36
    np.testing.assert_allclose(both["value"], both["expected"], atol=1e-5)
    assert ((both["low"] <= both["value"]) & (both["value"] <= both["high"])).all()
    counts = dict(ablate.group_by("metric").len().iter_rows())
    # Two tasks and their mean: 36 units at each shot count, at 4 shots against none; the best 1, 3, 10 heads,
    # 1, 3 FFNs.
    assert (counts["q_value"], counts["icl_effect"], counts["icl_effect_acc"]) == (6 * 36, 3 * 36, 3 * 36)
    assert counts["documents_hurt"] == counts["documents_helped"] == counts["q_value"]
    # And the best 3, 5 of all units, of the mean over tasks too.
    assert counts["top_drop"] == 4 * 5 + 6 * 2
    assert ablate.filter(pl.col("metric") == "q_value")["value"].is_between(0, 1).all()


def test_rankings_are_compared_with_their_ceilings(small_run: Path) -> None:
    overlap = read_table(small_run / "results.parquet", "results").filter(pl.col("experiment") == "overlap")
    assert set(overlap["metric"]) == {
        "spearman", "kendall", "top_overlap", "spearman_of_order", "split_half", "cross_shot_spearman",
    }  # fmt: skip
    assert {"gradient", "attribution", "ablation", "icl_effect"} == set(overlap["method"])
    within = overlap.filter((pl.col("metric") == "spearman") & (pl.col("method") == pl.col("other_method")))
    assert (within["low"] <= within["value"]).all()
    assert (within["value"] <= within["high"]).all()
    normalised = read_table(small_run / "results.parquet", "results").filter(
        pl.col("metric") == "gradient_normalised"
    )
    sums = normalised.group_by("shots", "kind").agg(pl.col("value").sum())
    np.testing.assert_allclose(sums["value"], 1)
    page = (small_run / "report.html").read_text()
    for text in ("in-context effect", "split-half", "index vectors", "itself at 4 shots"):
        assert text in page, text


def test_answers_give_the_accuracies(small_run: Path) -> None:
    answers = read_table(small_run / "answers.parquet", "answers")
    best = answers.sort("logprob", descending=True).group_by("task", "shots", "document").first()
    accuracy = best.group_by("task", "shots").agg(pl.col("gold").mean().alias("value_answers"))
    results = read_table(small_run / "results.parquet", "results").filter(
        (pl.col("experiment") == "evaluate")
        & (pl.col("metric") == "acc")
        & (pl.col("task") != "aggregate")
        & (pl.col("labels").fill_null("right") == "right")
    )
    both = results.join(accuracy, on=["task", "shots"])
    assert len(both) == 4
    np.testing.assert_allclose(both["value"], both["value_answers"])


def test_masks_are_files_that_evaluate_takes_back(small_run: Path, stores: Path, tmp_path: Path) -> None:
    path = small_run / "masks" / "greedy-recall-4shot.json"
    mask = read_mask(path)
    assert (small_run.parent / "masks" / path.name).read_text() == path.read_text()
    result = invoke(
        "evaluate", "--mask", path, "--tasks", "recall,knowledge", "--shots", "0,4", "--limit", 16,
        "--store-dir", stores, "--out", tmp_path / "again", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    again = read_table(tmp_path / "again" / "results.parquet", "results").filter(
        (pl.col("mask") == mask.name)
        & (pl.col("task") == "recall")
        & (pl.col("shots") == 4)
        & (pl.col("metric") == "gold_logprob")
    )
    assert again["value"].item() == mask.scores["after"]["gold_logprob"], (
        "int8: bitwise the same in another run"
    )
    check_drops(tmp_path / "again", mask.name)
    shown = invoke(
        "evaluate", "--mask", path, "--tasks", "recall,knowledge", "--shots", "0,4", "--limit", 16,
        "--store-dir", stores, "--out", tmp_path / "again",
    )  # fmt: skip
    assert "finished on " in shown.stderr
    assert max(map(len, shown.stdout.splitlines()[:8])) <= 80
    assert shown.stdout.count(mask.name) == shown.stdout.count("  clean ") >= 4
    assert "chance 0.250" in shown.stdout
    # The folder says by itself what was removed, and what that costs, as the search's own record does.
    assert read_mask(tmp_path / "again" / "masks" / path.name).mask == mask.mask
    judged = read_table(tmp_path / "again" / "masks.parquet", "masks")
    own = judged.row(0, named=True)
    assert (own["mask"], own["mask_task"], own["task"], own["shots"]) == (mask.name, "recall", "recall", 4)
    assert own["loss"] == pytest.approx(mask.scores["loss"], abs=1e-12)
    assert own["verdict"] == mask.scores["verdict"]
    assert len(own["removed"]) == len(mask.mask)
    said = json.loads((tmp_path / "again" / "summary.json").read_text(encoding="utf-8"))["answer"]
    assert all(mask.name in sentence or "at chance" in sentence for sentence in said["sentences"])


def check_drops(folder: Path, mask: str) -> None:
    """A mask's drops are means of paired differences, which the answers give too."""
    results = read_table(folder / "results.parquet", "results")
    drops = results.filter((pl.col("metric") == "acc_drop") & (pl.col("task") != "aggregate"))
    assert len(drops) == 4
    answers = read_table(folder / "answers.parquet", "answers")
    right = (
        answers.sort("logprob", descending=True)
        .group_by("task", "shots", "mask", "document", maintain_order=True)
        .agg(pl.col("gold").first().cast(pl.Float64))
    )
    clean, masked = (right.filter(pl.col("mask") == name) for name in ("clean", mask))
    paired = clean.join(masked, on=["task", "shots", "document"])
    for row in drops.iter_rows(named=True):
        of_setting = paired.filter((pl.col("task") == row["task"]) & (pl.col("shots") == row["shots"]))
        assert row["value"] == pytest.approx((of_setting["gold"] - of_setting["gold_right"]).mean())
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]


def test_the_tables_of_units_and_masks_hold_what_the_results_say(small_run: Path) -> None:
    results, units, masks = (
        read_table(small_run / f"{name}.parquet", name) for name in ("results", "units", "masks")
    )
    keys = ["task", "shots", "kind", "layer", "head"]
    for column, metric in {
        "drop": "gold_logprob_drop", "margin_drop": "margin_drop", "acc_drop_q_value": "acc_drop_q_value",
        "icl_effect_low": "icl_effect",
    }.items():  # fmt: skip
        own = results.filter((pl.col("experiment") == "ablate") & (pl.col("metric") == metric))
        bound = "low" if column.endswith("_low") else "value"
        both = own.join(units, on=keys, nulls_equal=True, suffix="_unit")
        assert len(both) == len(own) > 0
        assert (both[bound] == both[column]).all()
    # Every unit of every setting once: 2 tasks and their mean at 2 shot counts, 32 heads and 4 FFNs.
    assert len(units) == units.select(keys).n_unique() == 3 * 2 * 36
    assert units.group_by("task", "shots").agg(pl.col("rank").max())["rank"].to_list() == [36] * 6
    for row in masks.filter(pl.col("removed").is_not_null()).iter_rows(named=True):
        mask = read_mask(small_run / "masks" / f"{row['mask']}.json").mask
        assert row["removed"] == [str(unit) for unit in mask.units()]
        assert (len(mask.heads), len(mask.ffns)) == (row["heads_removed"], row["ffns_removed"])
    greedy = masks.filter(
        (pl.col("procedure") == "greedy")
        & (pl.col("method") == "greedy")
        & (pl.col("mask_task") == pl.col("task"))
    )
    for row in greedy.iter_rows(named=True):
        of_setting = units.filter((pl.col("task") == row["task"]) & (pl.col("shots") == row["shots"]))
        assert set(of_setting.filter("kept")["unit"]) == set(row["kept"])
    assert {path.stem for path in (small_run / "masks").glob("*.json")} == set(masks["mask"])


def test_intervals_of_proportions_have_width_and_stay_within_their_bounds(small_run: Path) -> None:
    results = read_table(small_run / "results.parquet", "results")
    known = results.filter(
        pl.col("metric").is_in(["acc", "gold_prob"]) & pl.col("low").is_not_null()
        & pl.col("method").ne_missing("random") & pl.col("method").ne_missing("random-median")
    )  # fmt: skip
    assert known.filter((pl.col("low") < 0) | (pl.col("high") > 1)).is_empty()
    at_the_ends = known.filter((pl.col("metric") == "acc") & pl.col("value").is_in([0.0, 1.0]))
    assert len(at_the_ends)
    assert (at_the_ends["high"] - at_the_ends["low"] > 0).all()


def test_a_toml_file_gives_options_and_the_command_line_wins(stores: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'tasks = ["recall"]\nshots = [0]\nlimit = 4\nexperiments = "evaluate"\n'
    )
    out = tmp_path / "out"
    result = invoke(
        "run",
        "--config",
        tmp_path / "run.toml",
        "--limit",
        8,
        "--store-dir",
        stores,
        "--out",
        out,
        "--json",
        "--quiet",
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["accuracy"]
    assert (row["task"], row["shots"], row["documents"]) == ("recall", 0, 8)


def test_status_report_tasks_and_prompts_answer(small_run: Path, stores: Path, tmp_path: Path) -> None:
    state = json.loads(invoke("status", small_run, "--json").stdout)
    assert state["state"] == "finished"
    assert state["parts"] > 5
    assert invoke("status", tmp_path).exit_code == 2
    page = tmp_path / "both.html"
    assert invoke("report", small_run, small_run, "--out", page).exit_code == 0
    assert "compared" in page.read_text()
    listed = {entry["task"]: entry for entry in json.loads(invoke("tasks", "--json").stdout)}
    assert set(PAPER_TASKS) < set(listed)
    assert listed["record"]["metric"] == "em"
    assert listed["recall"]["rows"] == {"train": 320, "validation": 512}
    (entry, _) = json.loads(invoke("prompts", "recall", "--shots", 1, "--store-dir", stores, "--json").stdout)
    right = next(option for option in entry["options"] if option["gold"])
    assert entry["demonstrations"]
    assert len(right["context_ids"]) == 4
    assert invoke("prompts", "recall", "--shots", 1, "--store-dir", stores).stdout.count("→") == 2


def test_masks_are_listed_compared_combined_and_exported(small_run: Path, tmp_path: Path) -> None:
    folder = small_run / "masks"
    one, other = folder / "greedy-recall-4shot.json", folder / "gradient-recall-4shot.json"
    listed = json.loads(invoke("masks", "list", folder, "--json").stdout)
    assert {line["name"] for line in listed} == {path.stem for path in folder.glob("*.json")}
    assert "L3" in invoke("masks", "show", one).stdout
    (pair,) = json.loads(invoke("masks", "compare", one, other, "--json").stdout)
    assert 0 <= pair["jaccard"] <= 1
    combined = tmp_path / "both.json"
    assert invoke("masks", "combine", one, other, "--out", combined).exit_code == 0
    assert read_mask(combined).mask == read_mask(one).mask | read_mask(other).mask
    assert invoke("masks", "combine", one, other, "--out", combined).exit_code == 2
    assert [line["name"] for line in listed_masks(small_run, "--task", "recall", "--method", "greedy")] == [
        "greedy-recall-0shot",
        "greedy-recall-4shot",
    ]
    assert {tuple(line["shots"]) for line in listed_masks(folder, "--shots", 4)} == {(4,)}
    (greedy,) = (line for line in listed if line["name"] == one.stem)
    scores = read_mask(one).scores
    assert (greedy["accuracy_before"], greedy["accuracy_after"]) == (
        scores["before"]["acc"],
        scores["after"]["acc"],
    )
    assert "did you mean 'greedy'?" in invoke("masks", "list", folder, "--method", "gredy").stderr
    together = listed_masks(folder, "--task", "aggregate", "--method", "greedy")
    assert {Path(line["file"]) for line in together} == set(folder.glob("greedy-aggregate-*.json"))
    units = invoke("masks", "export", one).stdout.split()
    assert units == [str(unit) for unit in read_mask(one).mask.units()]
    assert invoke("masks", "show", small_run / "run.json").exit_code == 2


def listed_masks(folder: Path, *filters: object) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(invoke("masks", "list", folder, *filters, "--json").stdout)
    return listed


def test_the_page_is_whole_and_escapes_what_it_shows(small_run: Path, tmp_path: Path) -> None:
    page = (small_run / "report.html").read_text()
    assert "default-src 'none'" in page, "it may load nothing"
    shutil.copytree(small_run, tmp_path / "copy")
    record = json.loads((small_run / "run.json").read_text())
    record["warnings"], record["model"]["id"] = ["<script>alert(1)</script>"], "<b>bold</b>"
    (tmp_path / "copy" / "run.json").write_text(record_text(record))
    assert invoke("report", tmp_path / "copy").exit_code == 0
    spoiled = (tmp_path / "copy" / "report.html").read_text()
    assert spoiled.count("<script") == page.count("<script")
    assert "<b>bold" not in spoiled
