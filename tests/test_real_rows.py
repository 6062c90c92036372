"""Real rows of the paper's 14 tasks with OPT's own tokenizer, through a small random model."""

import json
import shutil
from pathlib import Path

import oracles
import polars as pl
import pytest
from commands import invoke
from conftest import make_checkpoint, reference_model

from lowmem_icl.tables.schema import read_table
from lowmem_icl.tasks.catalogue import PAPER_TASKS


@pytest.fixture(scope="module")
def small_opt(opt_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("opt"), vocab_size=50272, hidden_size=16, word_embed_proj_dim=16,
        num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, max_position_embeddings=2048, init_std=0.1,
    )  # fmt: skip
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(opt_tokenizer / name, folder / name)
    return folder


def run_all_tasks(small_opt: Path, shared_data: Path, out: Path, *more: object) -> Path:
    result = invoke(
        "run", "--model", small_opt, "--data-dir", shared_data, "--train-limit", 2,
        "--store-dir", small_opt / "stores", "--out", out, "--quiet", *more,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def test_every_experiment_takes_real_rows_of_all_14_tasks(
    small_opt: Path, shared_data: Path, tmp_path: Path
) -> None:
    # Certificates take hundreds of documents more per task.
    few = ("--certify-limit", 0, "--curve-limit", 2, "--curve-levels", "half", "--random-draws", 1)
    out = run_all_tasks(small_opt, shared_data, tmp_path / "run", "--shots", 1, "--limit", 2, *few)
    results = read_table(out / "results.parquet", "results")
    for experiment in ("evaluate", "importance", "ablate", "prune", "overlap"):
        assert set(results.filter(pl.col("experiment") == experiment)["task"]) >= {*PAPER_TASKS}


def test_real_rows_of_all_14_tasks_are_evaluated(small_opt: Path, shared_data: Path, tmp_path: Path) -> None:
    run_all_tasks(
        small_opt, shared_data, tmp_path / "run", "--shots", "0,1", "--limit", 4, "--experiments", "evaluate"
    )
    results = read_table(tmp_path / "run" / "results.parquet", "results")
    evaluated = results.filter((pl.col("experiment") == "evaluate") & pl.col("metric").is_in(["acc", "em"]))
    foreign = evaluated.filter(pl.col("labels") == "foreign")
    right = evaluated.filter(pl.col("labels").fill_null("right") == "right")
    assert set(right["task"]) == {*PAPER_TASKS, "aggregate"}
    assert len(right) == 2 * 15
    assert set(foreign["task"]) == {*PAPER_TASKS} - {"wsc"}, (
        "its demonstrations all show yes; so no mean either"
    )
    gained = results.filter(pl.col("metric") == "acc_label_effect")
    assert set(gained["task"]) == {*foreign["task"], "aggregate"}
    assert set(gained["labels"]) == {"foreign"}
    warnings = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert [warning for warning in warnings if "labels" in warning] == [
        "task wsc: no control with foreign labels: all demonstrations show the same answer"
    ]
    answers = read_table(tmp_path / "run" / "answers.parquet", "answers")
    assert answers["logprob"].is_finite().all()
    assert answers.filter(pl.col("task") == "multirc")["document"].n_unique() > 4, (
        "a question's rows all count"
    )


def test_float32_answers_on_real_rows_equal_hugging_face(
    small_opt: Path, shared_data: Path, tmp_path: Path
) -> None:
    """Left-truncated 1-shot prompts among them; each option run alone through the whole model."""
    tasks = "winogrande,copa,multirc,record"
    arguments = (
        "--model", small_opt, "--data-dir", shared_data, "--shots", "1", "--store-dir", small_opt / "stores",
    )  # fmt: skip
    result = invoke(
        "run", *arguments, "--tasks", tasks, "--limit", 2, "--train-limit", 2, "--weights", "float32",
        "--experiments", "evaluate", "--out", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answers = read_table(tmp_path / "run" / "answers.parquet", "answers")
    model = reference_model(small_opt)
    checked = 0
    for task in tasks.split(","):
        entries = json.loads(
            invoke(
                "prompts", task, "--model", small_opt, "--data-dir", shared_data, "--shots", 1, "--count", 2,
                "--weights", "float32", "--store-dir", small_opt / "stores", "--json",
            ).stdout
        )  # fmt: skip
        for entry in entries[:4]:
            for index, option in enumerate(entry["options"]):
                path = [*option["context_ids"], *option["continuation_ids"]][:-1]
                expected = oracles.option_logprob(model, path, option["continuation_ids"])
                got = answers.filter(
                    (pl.col("task") == task)
                    & (pl.col("document") == entry["document"])
                    & (pl.col("option") == index)
                )["logprob"].item()
                assert got == pytest.approx(expected, abs=1e-4)
                checked += 1
    assert checked > 20
