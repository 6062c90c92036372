"""A run's folder: its name, who may work in it, and what it may hold."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import polars as pl
import pytest
from conftest import without_documents
from run_sessions import identity, options_of, session

from lowmem_icl import __version__
from lowmem_icl.errors import InputError, InUse
from lowmem_icl.masks.mask import Mask
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.memory import plan_memory
from lowmem_icl.session.folder import check_output, open_folder
from lowmem_icl.session.identity import default_folder, run_folder
from lowmem_icl.session.record import run_record
from lowmem_icl.system import folder_lock
from lowmem_icl.tables.schema import TABLES, read_table, write_table


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    return lambda there: monkeypatch.setattr("torch.cuda.is_available", lambda: there)


def test_where_nothing_was_begun_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with pytest.raises(InputError, match="does not fit"), open_folder(folder, identity(options_of(folder))):
        raise InputError("it does not fit")
    assert list(tmp_path.iterdir()) == []
    # What was there before stays: a folder, and what a script logs.
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "run.log").write_text("mine\n")
    with pytest.raises(InputError, match="does not fit"), open_folder(kept, identity(options_of(kept))):
        raise InputError("it does not fit")
    assert [path.name for path in kept.iterdir()] == ["run.log"]
    session(kept)
    with pytest.raises(InputError, match="does not fit"), open_folder(kept, identity(options_of(kept))):
        raise InputError("it does not fit")
    assert run_record(kept)["state"] == "finished"


def test_a_lock_whose_file_was_deleted_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def take(lock: IO[str]) -> None:
        lock_file(lock)
        taken.append(lock.fileno())
        if len(taken) == 1:
            (tmp_path / ".lock").unlink()

    lock_file = folder_lock._lock
    monkeypatch.setattr(folder_lock, "_lock", take)
    session(tmp_path)
    assert len(taken) == 2
    assert run_record(tmp_path)["state"] == "finished"


def test_a_killed_session_is_recognised_by_the_next(tmp_path: Path) -> None:
    running: list[bytes] = []
    session(tmp_path, "evaluate", work=lambda opened: running.append((tmp_path / "run.json").read_bytes()))
    (tmp_path / "run.json").write_bytes(running[0])
    assert run_record(tmp_path)["state"] == "running"
    session(tmp_path, "ablate")
    record = run_record(tmp_path)
    assert [each["state"] for each in record["sessions"]] == ["cut off", "finished"]
    assert record["sessions"][0]["finished"] is None
    assert list(record["stages"]) == ["evaluate", "ablate"]


def test_a_start_that_comes_to_nothing_changes_nothing(tmp_path: Path) -> None:
    options = options_of(tmp_path / "run")
    with pytest.raises(InputError), open_folder(tmp_path / "run", identity(options)):
        raise InputError("the hours do not do")
    assert not (tmp_path / "run" / "run.json").exists()
    assert check_output(options) == tmp_path / "run"
    session(tmp_path / "run", "evaluate")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(InputError), open_folder(tmp_path / "run", identity(options)):
        raise InputError("the hours do not do")
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    # Killed while it wrote run.json for the first time, or tried the disk: the folder is still the run's.
    for name in (".run.json.17.partial", ".abc_d3fg.tried.0-17.partial"):
        (tmp_path / name).write_bytes(b"{")
    (tmp_path / ".lock").write_bytes(b"")
    assert check_output(options_of(tmp_path)) == tmp_path
    (tmp_path / "parts" / "residuals-1").mkdir(parents=True)
    (tmp_path / "parts" / ".one.npz.17.partial").write_bytes(b"half")
    # Stores and masks of --store-dir and --masks-dir within, which other runs may be writing at this moment.
    (tmp_path / "stores" / "layers").mkdir(parents=True)
    others = [tmp_path / "stores" / "layers" / ".000.17.partial", tmp_path / "stores" / ".a.17.partial"]
    for path in others:
        path.write_bytes(b"half")
    session(tmp_path)
    assert list((tmp_path / "parts").iterdir()) == []
    assert sorted(tmp_path.rglob(".*.partial")) == sorted(others)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InUse, match="in use by another process"):
            session(tmp_path)


def test_what_differs_is_named_with_both_values(tmp_path: Path) -> None:
    session(tmp_path)
    options = options_of(tmp_path, seed=43, shots="1,2", limit=8)
    changes = {
        "weights_digest": "x" * 64,
        "tasks_digest": "u" * 64,
        "masks": {"one": Mask(ffns=frozenset([1]))},
    }
    other = identity(options, device="cuda", **changes).model_copy(update={"version": "0.0.1"})
    with pytest.raises(InputError) as refused, open_folder(tmp_path, other):
        pass
    message = str(refused.value)
    for difference in (
        "--seed: 42 in the folder, 43 asked for",
        "--shots: 0,4,16 in the folder, 1,2 asked for",
        "--limit: the default in the folder, 8 asked for",
        "--train-limit: 32 in the folder, 8 asked for",
        "--device: cpu in the folder, cuda asked for",
        "the model's weights: digest wwwwwwwwwwww in the folder, digest xxxxxxxxxxxx asked for",
        "the tasks' rows: digest tttttttttttt in the folder, digest uuuuuuuuuuuu asked for",
        "the masks given: digest ",
        f"lowmem-icl's version: {__version__} in the folder, 0.0.1 asked for",
    ):
        assert difference in message
    assert message.endswith("; choose another --out, or give --fresh, which begins beside it")
    assert message.count(" in the folder") == 9


def test_options_are_compared_before_any_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session(tmp_path)
    assert check_output(options_of(tmp_path, memory="2GB", hours=1.0)) == tmp_path
    with pytest.raises(
        InputError, match=r"holds another run: --seed: 42 in the folder, 43 asked for; choose"
    ):
        check_output(options_of(tmp_path, seed=43))
    monkeypatch.setattr("lowmem_icl.session.folder.__version__", "9.9")
    with pytest.raises(InputError, match=rf"version: {__version__} in the folder, 9\.9 asked for"):
        check_output(options_of(tmp_path))


def test_a_folder_goes_by_the_resolved_device(tmp_path: Path, cuda: Callable[[bool], None]) -> None:
    cuda(False)
    auto, cpu = (RunOptions(device=device) for device in ("auto", "cpu"))
    assert default_folder(auto) == default_folder(cpu)
    session(tmp_path)
    assert check_output(options_of(tmp_path, device="auto")) == tmp_path
    cuda(True)
    assert default_folder(auto) == default_folder(RunOptions(device="cuda:1")) != default_folder(cpu)
    with pytest.raises(InputError, match="--device: cpu in the folder, cuda asked for"):
        check_output(options_of(tmp_path, device="auto"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo"),
        ("facebook/opt-125m", "opt-125m"),
        ("models/my model [v2]/", "my-model-v2"),
        ("x" * 300, "x" * 87),
        ("модель", "unnamed"),
        ("..", "unnamed"),
    ],
)
def test_default_folders_have_legal_names(model: str, name: str) -> None:
    folder = default_folder(RunOptions(model=model))
    assert folder.parent == Path("runs")
    assert folder.name.rpartition("-")[0] == name
    assert default_folder(RunOptions(model=model + "x")) != folder
    assert (
        default_folder(RunOptions(model=model), prefix="evaluate-", suffix="-ab").name
        == f"evaluate-{folder.name}-ab"
    )


def test_what_is_no_run_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "precious.txt").write_text("mine")
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "night.log").write_text("")
    (tmp_path / "hidden" / ".movie.partial" / "reel").mkdir(parents=True)
    for out, message in {
        "foreign": "is not empty and holds no run",
        "hidden": "is not empty and holds no run",
        "foreign/precious.txt": "is a file; give a folder",
        "foreign/precious.txt/run": "is a file; give a folder",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(InputError, match=f"--out .*{message}"):
            check_output(options_of(tmp_path / out))
    with pytest.raises(InputError, match=r"--masks-dir .* is a file"):
        check_output(options_of(tmp_path / "run", masks_dir=tmp_path / "foreign" / "precious.txt"))
    assert (
        check_output(options_of(tmp_path / "logged", masks_dir=tmp_path / "a" / "b")) == tmp_path / "logged"
    )
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["precious.txt"]
    assert not (tmp_path / "run").exists()


def test_no_path_is_a_pattern(tmp_path: Path) -> None:
    schema = TABLES["answers"]
    for name, rows in {"run [x]": 1, "g?": 2, "gX": 3, "*": 4}.items():
        frame = pl.DataFrame({column: [None] * rows for column in schema}, schema=schema)
        write_table(frame, "answers", tmp_path / name / "answers.parquet")
    for name, rows in {"run [x]": 1, "g?": 2, "gX": 3, "*": 4}.items():
        assert len(read_table(tmp_path / name / "answers.parquet", "answers")) == rows
    session(tmp_path / "run [y]", "evaluate")
    assert run_record(tmp_path / "run [y]")["state"] == "finished"


def test_spilled_residuals_are_planned_for_the_disk_they_go_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float_store: Any
) -> None:
    asked: list[Path] = []

    def free_bytes(folder: Path) -> int:
        asked.append(folder)
        return 10**12

    monkeypatch.setattr("lowmem_icl.planning.memory.free_bytes", free_bytes)
    for options in (RunOptions(out=tmp_path / "elsewhere"), RunOptions()):
        plan_memory(without_documents(float_store, options), 8)
        assert asked.pop() == run_folder(options)
    assert run_folder(RunOptions(out=tmp_path)) == tmp_path
