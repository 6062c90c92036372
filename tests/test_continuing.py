"""Whole runs that were begun: what is left of them, and what continuing changes."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest
from commands import PROCESS, SMALL, UNDRAWN, invoke, run_small

from lowmem_icl.tables.schema import read_table


def test_plan_says_what_is_left_of_a_run_that_was_begun(
    small_run: Path, stores: Path, tmp_path: Path
) -> None:
    def planned(out: Path) -> dict[str, int]:
        result = invoke("plan", *SMALL, "--store-dir", stores, "--out", out, "--json")
        assert result.exit_code == 0, result.output
        return {stage["experiment"]: stage["operations"] for stage in json.loads(result.stdout)["stages"]}

    whole, left = planned(tmp_path / "new"), planned(small_run)
    assert whole.keys() == {"evaluate", "importance", "ablate", "prune", "induction"}
    assert not left
    assert not (tmp_path / "new").exists()


def test_a_run_never_writes_to_a_store(stores: Path, tmp_path: Path) -> None:
    def files() -> dict[str, tuple[int, int]]:
        kept = [path for path in stores.rglob("*") if path.is_file() and "texts" not in path.parts]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in kept}

    before = files()
    more = ("--experiments", "importance", "--limit", 2, "--train-limit", 2)
    assert run_small(tmp_path / "out", stores, *more).exit_code == 0
    assert before
    assert files() == before


def test_run_json_tells_what_each_session_did(small_run: Path) -> None:
    record = json.loads((small_run / "run.json").read_text())
    assert record["format"] == "lowmem-icl-run/2"
    (session,) = record["sessions"]
    for name in (
        "state",
        "finished",
        "command",
        "versions",
        "machine",
        "plan",
        "stages",
        "warnings",
        "parts",
    ):
        assert session[name] == record[name], name
    assert session["started"] == record["started"]
    assert session["parts"]["reused"] == 1, "prune starts from the clean evaluation"
    assert session["parts"]["made"] == len(list((small_run / "parts").glob("*.npz")))
    planned = {stage["experiment"]: stage for stage in record["plan"]["stages"]}
    for name, stage in session["stages"].items():
        assert set(stage) == {"seconds", "planned_seconds", "read_bytes", "planned_read_bytes", "finished"}
        expected = planned.get(name, {"seconds": 0.0, "read_bytes": 0})
        assert stage["planned_seconds"] == pytest.approx(expected["seconds"], abs=0.01)
        assert stage["planned_read_bytes"] == expected["read_bytes"]
    assert not list((small_run / "parts").glob("*.draft.npz"))


def test_int8_answers_are_bitwise_the_same_alone_and_with_others(
    small_run: Path, stores: Path, tmp_path: Path
) -> None:
    result = invoke(
        "run", "--tasks", "knowledge", "--shots", "4", "--limit", 16, "--train-limit", 8, "--experiments",
        "evaluate", "--memory", "400MB", "--store-dir", stores, "--out", tmp_path / "alone", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    alone = read_table(tmp_path / "alone" / "answers.parquet", "answers")
    together = read_table(small_run / "answers.parquet", "answers")
    same = together.filter((pl.col("task") == "knowledge") & (pl.col("shots") == 4))
    assert alone.equals(same)


def test_continuing_changes_nothing_and_makes_nothing_again(
    small_run: Path, stores: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_run, copy)
    before = {name: (copy / f"{name}.parquet").read_bytes() for name in ("results", "effects", "answers")}
    for part in [*(copy / "parts").glob("ablate*"), *(copy / "parts").glob("prune-0000[3-9]*")]:
        part.unlink()
    (copy / "report.html").unlink()
    result = run_small(copy, stores, "--masks-dir", small_run.parent / "masks")
    assert result.exit_code == 0, result.output
    assert {name: (copy / f"{name}.parquet").read_bytes() for name in before} == before
    parts = json.loads((copy / "run.json").read_text())["parts"]
    assert parts["reused"] > 0
    assert parts["made"] >= 2
    # Else it is finished, and nothing is opened.
    (copy / "report.html").unlink()
    result = run_small(copy, stores, "--masks-dir", small_run.parent / "masks")
    assert json.loads((copy / "run.json").read_text())["parts"]["made"] == 0
    assert len(json.loads((copy / "run.json").read_text())["sessions"]) == 3


def test_a_stopped_run_says_so_and_goes_on(small_run: Path, stores: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(small_run, out)
    # As if stopped earlier too: head scores are there, which take long and are not what this is about.
    for path in [*(out / "parts").iterdir(), *out.glob("*.parquet"), out / "report.html"]:
        if not path.name.startswith("induction"):
            path.unlink()
    start = (*PROCESS[:-1], f"{UNDRAWN}; {PROCESS[-1]}")
    command = [*start, "run", *SMALL, "--store-dir", str(stores), "--out", str(out), "--quiet"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not list((out / "parts").glob("prune-*.npz")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished parts are kept" in error
    assert set(read_table(out / "results.parquet", "results")["experiment"]) >= {"evaluate", "ablate"}
    assert (out / "report.html").is_file(), "what there is was written on the way out"
    assert invoke("status", out).stdout.splitlines()[1].startswith("state: stopped")
    assert run_small(out, stores).exit_code == 0
    ours, whole = (read_table(folder / "results.parquet", "results") for folder in (out, small_run))
    assert ours.equals(whole)


def test_a_fresh_run_begins_beside_the_one_there(stores: Path, tmp_path: Path) -> None:
    command = ("run", "--tasks", "recall", "--shots", "4", "--limit", "4", "--experiments", "evaluate")
    where = ("--store-dir", stores, "--out", tmp_path / "run")
    assert invoke(*command, *where).exit_code == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    result = invoke(*command, *where, "--fresh")
    assert result.exit_code == 0, result.output
    assert f"a fresh run in {tmp_path / 'run-2'}" in result.stderr.replace("\n", "")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    ours, others = (read_table(tmp_path / name / "results.parquet", "results") for name in ("run", "run-2"))
    assert ours.equals(others)
