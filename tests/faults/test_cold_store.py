"""Two processes that need a store which is not there yet: one makes it, the other waits for it."""

import fcntl
import os
import subprocess
import time
from pathlib import Path

import pytest
from commands import PROCESS, invoke

from lowmem_icl.conversion.store_lock import LOCK_FILE, making_store
from lowmem_icl.errors import InUse
from lowmem_icl.system.files import clear_partials, partial_path

QUICK = ("--tasks", "recall", "--shots", "0", "--limit", "4", "--experiments", "evaluate")


@pytest.mark.parametrize("apart", [0.0, pytest.param(0.8, marks=pytest.mark.slow)])
def test_two_runs_make_one_store(apart: float, tmp_path: Path) -> None:
    started = []
    for number in range(2):
        command = [
            *PROCESS,
            "run",
            *QUICK,
            "--store-dir",
            tmp_path / "stores",
            "--out",
            tmp_path / str(number),
        ]
        started.append(
            subprocess.Popen(
                list(map(str, command)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
        time.sleep(apart)
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    (store,) = (tmp_path / "stores").glob("demo-*")
    assert (store / "manifest.json").is_file()
    assert not (store / LOCK_FILE).exists()


def test_who_does_not_wait_is_told_for_whom(tmp_path: Path) -> None:
    with (tmp_path / LOCK_FILE).open("w") as lock:
        lock.write("17")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = invoke("convert", "demo", tmp_path, "--no-wait")
        assert refused.exit_code == 75
        assert f"process 17, which makes {tmp_path}: 0 of 4 layers are there" in " ".join(
            refused.stderr.split()
        )
        with pytest.raises(InUse), making_store(tmp_path, 4, print, waits=False):
            pass


def test_only_what_dead_processes_wrote_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = partial_path(tmp_path / "one")
    monkeypatch.setattr(os, "getpid", lambda: 2**30)
    dead = partial_path(tmp_path / "one")
    for path in (mine, dead):
        path.touch()
    clear_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]
