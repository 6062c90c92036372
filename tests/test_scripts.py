"""The overnight scripts as they are started: what they print stays, twice is safe, configs are whole."""

import os
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from commands import PROCESS, invoke

from lowmem_icl.masks.files import check_fits, read_mask
from lowmem_icl.options import RunOptions, run_options
from lowmem_icl.session.folder import check_output
from lowmem_icl.session.prepare import prepare, with_store

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.toml")), ids=lambda path: path.name)
def test_every_config_is_one_that_a_run_takes(path: Path) -> None:
    options = run_options({"model": "facebook/opt-125m"}, path)
    assert options.resolved_shots == (0, 1, 5)
    told = tomllib.loads(path.read_text(encoding="utf-8"))
    assert "tasks" in told
    assert options.curves


def overnight(folder: Path, command: str, stores: Path) -> subprocess.CompletedProcess[str]:
    """Start the overnight script with the least that makes every table;
    `command` is what `lowmem-icl` runs.
    """
    config = folder / "night.toml"
    config.write_text(
        'tasks = ["recall"]\nshots = [0, 4]\nlimit = 4\ntrain-limit = 2\ncurves = ["heads"]\n'
        f'store-dir = "{stores}"\nexperiments = ["evaluate", "ablate"]\n',
        encoding="utf-8",
    )
    script = folder / "bin" / "lowmem-icl"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
    script.chmod(0o755)
    environment = {"PATH": f"{script.parent}:{os.environ['PATH']}", "RUNS": str(folder / "runs")}
    return subprocess.run(
        [SCRIPTS / "overnight.sh", config, "demo", "1"], capture_output=True, text=True, timeout=300,
        env=os.environ | environment, check=False,
    )  # fmt: skip


def test_a_night_ends_with_a_page_and_a_log_and_can_be_started_again(stores: Path, tmp_path: Path) -> None:
    first = overnight(tmp_path, f'exec {shlex.join(PROCESS)} "$@"', stores)
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "runs" / "demo"
    assert (folder / "report.html").is_file()
    written = (folder / "results.parquet").read_bytes()
    arguments = tmp_path / "arguments"
    again = overnight(tmp_path, f'echo "$@" >> {arguments}', stores)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (folder / "results.parquet").read_bytes() == written
    log = (folder / "overnight.log").read_text(encoding="utf-8")
    assert log.count("demo, 1 hours") == 2
    assert "accuracy by demonstrations" in log
    # What the script starts a second time, started here: it goes on in the same folder and changes nothing.
    planned, ran = (line.split() for line in arguments.read_text(encoding="utf-8").splitlines())
    assert (planned[0], ran[0]) == ("plan", "run")
    record = (folder / "run.json").read_bytes()
    assert invoke(*ran).exit_code == 0
    assert (folder / "results.parquet").read_bytes() == written
    assert (folder / "run.json").read_bytes() == record, "a finished run opens nothing again"


def night_by(folder: Path, of_plan: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """A night of OPT-66B where `lowmem-icl plan` does as told and all else nothing, and how it was called."""
    arguments, script = folder / "arguments", folder / "bin" / "lowmem-icl"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\necho "$@" >> {arguments}\n[ "$1" = plan ] && {of_plan}\nexit 0\n')
    script.chmod(0o755)
    environment = {"PATH": f"{script.parent}:{os.environ['PATH']}", "RUNS": str(folder / "runs")}
    night = subprocess.run(
        [SCRIPTS / "overnight_opt66b.sh", "--seed", "1"], capture_output=True, text=True, timeout=60,
        env=os.environ | environment | {"HOURS": "9"}, check=False,
    )  # fmt: skip
    return night, [line.split() for line in arguments.read_text(encoding="utf-8").splitlines()]


def test_a_plan_that_refuses_stops_the_night_with_its_exit_code(tmp_path: Path) -> None:
    night, asked = night_by(tmp_path, "{ echo 'does not fit' >&2; exit 3; }")
    assert night.returncode == 3
    assert night.stderr == "does not fit\n"
    assert [words[0] for words in asked] == ["convert", "plan"]


def test_where_nothing_is_ablated_the_preset_says_how_many_units_are_exact(tmp_path: Path) -> None:
    night, asked = night_by(tmp_path, """echo '{"exact_that_fits": null}'""")
    assert night.returncode == 0, night.stdout + night.stderr
    assert not any("--exact" in words for words in asked)


def test_how_many_units_are_exact_is_chosen_once_for_all_nights(tmp_path: Path) -> None:
    for fits in (7, 9):
        night, asked = night_by(tmp_path, f"echo '{{\"exact_that_fits\": {fits}}}'")
        assert night.returncode == 0, night.stdout + night.stderr
    assert [words[0] for words in asked] == ["convert", "plan", "plan", "run", "convert", "plan", "run"]
    assert "--exact" not in asked[1]
    for words in (asked[2], asked[3], asked[5], asked[6]):
        assert words[words.index("--exact") + 1] == "7"
        assert words[words.index("--hours") + 1] == "9"
        assert words[-2:] == ["--seed", "1"]
    # A run refuses a folder that holds something else.
    check_output(run_options({"out": str(tmp_path / "runs" / "opt-66b")}, None))


def test_a_mistake_stops_the_night_before_it_starts(stores: Path, tmp_path: Path) -> None:
    refused = invoke("plan", "--tasks", "nonsense", "--hours", 1)
    assert refused.exit_code == 2
    assert "nonsense" in refused.stderr
    result = overnight(
        tmp_path, f'echo "$1" >> {tmp_path}/calls; echo "no such task: nonsense" >&2; exit 2', stores
    )
    assert result.returncode == 2
    assert "nonsense" in result.stdout
    assert (tmp_path / "calls").read_text() == "plan\n"
    assert not (tmp_path / "runs" / "demo" / "run.json").exists()


def test_the_demo_masks_fit_the_demo_and_say_how_they_were_made(stores: Path) -> None:
    folder = SCRIPTS.parent / "masks" / "demo"
    masks = [read_mask(path) for path in sorted(folder.glob("*.json"))]
    assert len(masks) == 15 + 2 + 3 * 9, "greedy, certified, and three curves"
    prepared = prepare(RunOptions(tasks=("recall",), shots=(0,), limit=1, store_dir=stores))
    model = with_store(prepared).mask_model
    for mask in masks:
        assert check_fits(mask, model) is None
        assert mask.made["protocol"] == "corrected"
        assert mask.scores["before"]["acc"] > 0
