"""What a run refuses, in one line and before any work: bad input, folders of others, too little memory."""

import json
import shutil
import time
from pathlib import Path

import pytest
from commands import invoke, run_small


def test_a_folder_in_use_is_left_alone(small_run: Path, stores: Path, tmp_path: Path) -> None:
    import fcntl

    shutil.copytree(small_run, tmp_path / "copy")
    # Of a finished run nothing would be opened.
    (tmp_path / "copy" / "results.parquet").unlink()
    with (tmp_path / "copy" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_small(tmp_path / "copy", stores)
    assert result.exit_code == 75
    assert "in use by another process" in result.stderr


def bad(tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    return {
        "unknown task": (["--tasks", "recal"], "unknown task 'recal'; did you mean 'recall'"),
        "no config": (["--model", tmp_path / "empty"], "has no config.json"),
        "no folder": (["--model", "./nowhere"], "does not exist"),
        "tolerance": (["--tolerance", "2"], "--tolerance: expected a number above 0 and below 1, got '2'"),
        "limit": (
            ["--limit", "0"],
            "--limit: expected a whole number of at least 1, or a fraction such as 0.1, got '0'",
        ),
        "shots": (["--shots", "-1"], "each item a whole number of at least 0"),
        "shots twice": (["--shots", "1,1"], "--shots: expected a comma-separated list without repeats"),
        "memory": (["--memory", "lots"], "--memory: expected a size such as 6GB"),
        "experiment": (["--experiments", "guess"], "each item one of evaluate, importance"),
        "empty data": (["--tasks", "piqa", "--data-dir", tmp_path / "data"], "holds no rows"),
        "no data": (["--tasks", "piqa", "--data-dir", tmp_path / "none"], "does not exist"),
        "too many shots": (["--tasks", "recall", "--shots", "100"], "rows to draw demonstrations from"),
        "long option": (
            ["--tasks", tmp_path / "long.jsonl", "--shots", "0"],
            "an option has 600 tokens; expected 1 to 512",
        ),
        "foreign folder": (["--out", tmp_path / "foreign"], "not empty and holds no run"),
        "config": (["--config", tmp_path / "bad.toml"], "'colour' is not an option of a run"),
        "device": (["--device", "tpu"], "--device: "),
    }


@pytest.mark.parametrize("case", bad(Path()))
def test_bad_input_is_one_line_before_any_work(stores: Path, tmp_path: Path, case: str) -> None:
    for name in ("empty", "data/piqa", "foreign"):
        (tmp_path / name).mkdir(parents=True)
    for split in ("train", "validation"):
        (tmp_path / "data" / "piqa" / f"{split}.jsonl").write_text("")
    (tmp_path / "foreign" / "precious.txt").write_text("mine")
    (tmp_path / "bad.toml").write_text('colour = "red"\n')
    row = {"context": "a", "options": ["b" * 600, "c"], "gold": 0}
    (tmp_path / "long.jsonl").write_text((json.dumps(row) + "\n") * 4)
    arguments, message = bad(tmp_path)[case]
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    started = time.monotonic()
    result = invoke("run", "--store-dir", stores, "--quiet", *arguments, *out)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["precious.txt"]
    assert time.monotonic() - started < 60


def test_the_folder_of_another_run_is_refused_and_kept(small_run: Path, stores: Path) -> None:
    before = (small_run / "results.parquet").read_bytes()
    result = run_small(small_run, stores, "--tolerance", "0.2")
    assert result.exit_code == 2
    assert "holds another run: --tolerance: 0.01 in the folder, 0.2 asked for" in result.stderr
    assert (small_run / "results.parquet").read_bytes() == before


def test_too_little_memory_names_what_would_do(stores: Path, tmp_path: Path) -> None:
    result = run_small(tmp_path / "out", stores, "--memory", "1MB")
    assert result.exit_code == 3
    assert "the smallest that does is --memory" in result.stderr
    smallest = result.stderr.split("--memory ")[-1].strip()
    again = invoke(
        "plan",
        "--tasks",
        "recall",
        "--shots",
        "0",
        "--limit",
        16,
        "--store-dir",
        stores,
        "--memory",
        smallest,
    )
    assert again.exit_code == 0, again.output
