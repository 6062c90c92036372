"""The overnight scripts as they are started: what they print stays, twice is safe, configs are whole."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lowmem_icl.masks.files import check_fits, read_mask
from lowmem_icl.options import RunOptions, run_options
from lowmem_icl.session.prepare import prepare

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.toml")), ids=lambda path: path.name)
def test_every_config_is_one_that_a_run_takes(path: Path) -> None:
    options = run_options({"model": "facebook/opt-125m"}, path)
    assert options.resolved_shots == (0, 1, 5)
    told = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {"tasks", "curves"} <= told.keys()


def overnight(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    config = folder / "night.toml"
    config.write_text(
        f'tasks = ["recall", "knowledge"]\nshots = [0, 4]\nlimit = 8\ntrain-limit = 4\ncurves = ["heads"]\n'
        f'store-dir = "{folder / "stores"}"\nexperiments = ["evaluate", "importance", "ablate"]\n',
        encoding="utf-8",
    )
    command = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{command}:{os.environ['PATH']}", "RUNS": str(folder / "runs")}
    return subprocess.run(
        [SCRIPTS / "overnight.sh", config, "demo", "1", *more], capture_output=True, text=True, env=environment,
        timeout=300, check=False,
    )  # fmt: skip


def test_a_night_ends_with_a_page_and_a_log_and_can_be_started_again(tmp_path: Path) -> None:
    first = overnight(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "runs" / "demo"
    assert (folder / "report.html").is_file()
    written = (folder / "results.parquet").read_bytes()
    again = overnight(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (folder / "results.parquet").read_bytes() == written
    log = (folder / "overnight.log").read_text(encoding="utf-8")
    assert log.count("demo, 1 hours") == 2
    assert "accuracy by demonstrations" in log


def test_a_mistake_stops_the_night_before_it_starts(tmp_path: Path) -> None:
    result = overnight(tmp_path, "--tasks", "nonsense")
    assert result.returncode == 2
    assert "nonsense" in result.stdout
    assert not (tmp_path / "runs" / "demo" / "run.json").exists()


def test_the_demo_masks_fit_the_demo_and_say_how_they_were_made() -> None:
    folder = SCRIPTS.parent / "masks" / "demo"
    masks = [read_mask(path) for path in sorted(folder.glob("*.json"))]
    assert len(masks) == 15 + 3 * 9
    model = prepare(RunOptions(tasks=("recall",), shots=(0,), limit=1)).mask_model
    for mask in masks:
        assert check_fits(mask, model) is None
        assert mask.made["protocol"] == "corrected"
        assert mask.scores["before"]["acc"] > 0
