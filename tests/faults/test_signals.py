"""A stop at any moment ends with one line and the exit code of its signal, and keeps what is finished."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import HASTE, SMALL, UNDRAWN, run_small

from lowmem_icl.tables.schema import read_table

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
ENTRY = "from lowmem_icl.cli.entry import main; main()"
# Says that it has begun: before, Python starts, where nothing of ours is in force.
STARTED = "import os; from lowmem_icl.cli.stops import end_at_once; end_at_once(); os.write(1, b'.')"
# In haste, which has to be imported first.
HASTY_ENTRY = f"{STARTED}; {HASTE}; {UNDRAWN}; {ENTRY}"


def stopped(
    command: Sequence[str], signals: Sequence[int], after: float, between: float = 0.05
) -> tuple[int, str]:
    """Run a command, send it signals from a moment on, and return its exit code and stderr."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == "."
    time.sleep(after)
    for number in signals:
        if process.poll() is None:
            process.send_signal(number)
        time.sleep(between)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def check(code: int, said: str, signals: Sequence[int]) -> None:
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("lowmem-icl: ")]
    if code == 0:
        # It was over already.
        assert lines == []
        return
    assert code in {CODES[signal.Signals(number)] for number in signals}, said
    assert len(lines) == 1, said
    assert lines[0].startswith("lowmem-icl: stopped"), said


def moments(count: int, longest: float, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [longest * rng.random() ** 2 for _ in range(count)]


@pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)
def test_a_stop_while_libraries_are_imported(number: int) -> None:
    command = [sys.executable, "-c", f"{STARTED}; {ENTRY}", "tasks"]
    for after in moments(3, 1.0, seed=int(number)):
        check(*stopped(command, [number], after), [number])


@pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)
def test_a_stop_when_all_is_over_changes_nothing(number: int) -> None:
    """While Python takes itself down, after its handlers of signals are gone."""
    late = f"class Late: __del__ = lambda self: os.kill(os.getpid(), {int(number)})"
    command = [sys.executable, "-c", f"{STARTED}\n{late}\nlate = Late()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_storms(seed: int, stores: Path, tmp_path: Path) -> None:
    """One to three signals, of both kinds, anywhere in a run that continues after each."""
    rng = random.Random(seed)
    command = [sys.executable, "-c", HASTY_ENTRY]
    command += ["run", *SMALL, "--store-dir", str(stores), "--out", str(tmp_path / "run"), "--quiet"]
    signals = [rng.choice(list(CODES)) for _ in range(rng.choice((1, 1, 2, 3)))]
    check(*stopped(command, signals, moments(1, 20.0, seed)[0], between=rng.random()), signals)


@pytest.mark.slow
def test_what_was_stopped_goes_on_to_the_same_tables(small_run: Path, stores: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", HASTY_ENTRY]
    command += ["run", *SMALL, "--store-dir", str(stores), "--out", str(out), "--quiet"]
    for after, signals in ((4.0, [signal.SIGTERM]), (8.0, [signal.SIGINT, signal.SIGINT])):
        check(*stopped(command, signals, after), signals)
    assert run_small(out, stores).exit_code == 0
    ours, whole = (read_table(folder / "results.parquet", "results") for folder in (out, small_run))
    assert ours.equals(whole)
