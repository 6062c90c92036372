"""Two processes that need a store which is not there yet: one makes it, the other waits for it."""

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from commands import PROCESS, invoke

from lowmem_icl.conversion.store_lock import CLAIM_FILE, LOCK_FILE, making_store
from lowmem_icl.errors import InUse
from lowmem_icl.session.lock import locked
from lowmem_icl.system import files
from lowmem_icl.system.files import clear_partials, partial_path
from lowmem_icl.system.folder_lock import FolderLock

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
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**30)
        dead = partial_path(tmp_path / "one")
        # In another container of the same name, where this number is another process's.
        patch.setattr(os, "readlink", lambda path: "pid:[1]")
        patch.setattr(files, "_HOST", files._processes_of())
        elsewhere, forgotten = partial_path(tmp_path / "one"), partial_path(tmp_path / "two")
    no_number = tmp_path / f".x.{files._HOST}-\u00b2.partial"
    for path in (mine, dead, elsewhere, forgotten, no_number):
        path.touch()
    for path in (mine, forgotten):
        os.utime(path, (0, 0))
    clear_partials(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, elsewhere, no_number}


def test_a_strangers_folder_is_left_as_it_is(tmp_path: Path) -> None:
    theirs = [".tmp-notes", ".thesis.partial/chapter", "data/.movie.partial", "layers/.tmp1", ".x.partial"]
    for name in theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    refused = invoke("convert", "demo", tmp_path)
    assert refused.exit_code == 2
    assert "is not empty and holds no unfinished conversion" in " ".join(refused.stderr.split())
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(theirs)
    # A folder in which nothing but such a file is: it looks as if a conversion had died there, and is none.
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / ".x.partial").write_text("mine")
    assert invoke("convert", "demo", tmp_path / "alone").exit_code == 2
    assert [path.name for path in (tmp_path / "alone").iterdir()] == [".x.partial"]


def test_what_a_dead_conversion_was_writing_is_deleted(tmp_path: Path) -> None:
    with making_store(tmp_path, 4, print):
        for name in (".converting.json.0-17.partial", ".abc_d3fg.tried.0-17.partial"):
            (tmp_path / name).write_text("{")
    with making_store(tmp_path, 4, print):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        (tmp_path / CLAIM_FILE).write_text("{}")
        places = [tmp_path, tmp_path / "layers", tmp_path / "tokenizer", tmp_path / "theirs"]
        for place in places:
            place.mkdir(exist_ok=True)
            for name in (".a.0-17.partial", ".tmp17"):
                (place / name).touch()
    with making_store(tmp_path, 4, print):
        left = list(tmp_path.rglob(".*"))
        assert sorted(left) == [tmp_path / "theirs" / name for name in (".a.0-17.partial", ".tmp17")]


def _of_store(folder: Path) -> AbstractContextManager[None]:
    return making_store(folder, 4, print)


@pytest.mark.parametrize("hold", [_of_store, locked])
def test_a_folder_that_was_there_stays_and_one_that_was_made_goes(
    hold: Callable[[Path], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with hold(Path("empty")):
        pass
    assert (tmp_path / "empty").is_dir()
    with hold(Path("new/one")):
        # Where the process works is its own affair.
        monkeypatch.chdir(tmp_path / "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("hold", [_of_store, locked])
def test_a_folder_that_goes_while_it_is_taken_is_made_again(
    hold: Callable[[Path], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another process that made it, came to nothing, and removed it between the making and the
    opening.
    """
    folder = tmp_path / "new"
    folder.mkdir()
    opened, tried = Path.open, list[Path]()

    def open_late(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.parent == folder and not tried:
            tried.append(path)
            folder.rmdir()
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", open_late)
    with hold(folder):
        assert tried
        assert folder.is_dir()
    assert not folder.exists()


def test_the_lock_of_a_process_that_died_when_all_was_done_is_cleared(made: Path, tmp_path: Path) -> None:
    (store,) = made.glob("demo-*-int8")
    shutil.copytree(store, tmp_path / "store")
    before = {path.name for path in store.iterdir()}
    lock = tmp_path / "store" / LOCK_FILE
    lock.write_text("123\n", encoding="ascii")
    (lock.parent / CLAIM_FILE).write_text("{}", encoding="ascii")
    with FolderLock(lock.parent, LOCK_FILE).take():
        assert invoke("convert", "demo", tmp_path / "store", "--quiet").exit_code == 0
        assert lock.exists()
    assert invoke("convert", "demo", tmp_path / "store", "--quiet").exit_code == 0
    assert {path.name for path in lock.parent.iterdir()} == before
    (lock.parent / CLAIM_FILE).write_text("{}", encoding="ascii")
    assert invoke("convert", "demo", tmp_path / "store", "--quiet").exit_code == 0
    assert {path.name for path in lock.parent.iterdir()} == before
