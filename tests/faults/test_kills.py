"""Processes killed at random moments, really: the same command goes on to what it would have been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent
SHARES = {"run": 0.4, "convert": 0.25, "evaluate": 0.2, "report": 0.15}
ALL_KILLS = int(os.environ.get("KILLS", "1000"))


def killed(command: str, kills: int, stores: Path) -> int:
    """Kill a command so many times; return how many times it was finished after that."""
    arguments = ("--command", command, "--kills", str(kills), "--stores", stores)
    found = subprocess.run(
        [sys.executable, FAULTS / "kills.py", *arguments],
        env=os.environ | {"PYTHONPATH": f"{FAULTS.parent}:{FAULTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["wrong"] == []
    assert told["kills"] >= kills
    return int(told["finished"])


@pytest.mark.parametrize(("command", "kills"), [("run", 2), ("convert", 2)])
def test_a_few_kills(command: str, kills: int, made: Path) -> None:
    assert killed(command, kills, made)


@pytest.mark.slow
@pytest.mark.parametrize("command", SHARES)
def test_a_thousand_kills(command: str, made: Path) -> None:
    assert killed(command, round(ALL_KILLS * SHARES[command]), made)
