"""A run's folder: its name, who may work in it, and what run.json says of every session."""

import copy
import fcntl
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import polars as pl
import pytest
from conftest import without_documents
from rich.console import Console

from lowmem_icl import __version__
from lowmem_icl.cli.status import show_status
from lowmem_icl.errors import InputError, InUse
from lowmem_icl.masks.files import MaskModel
from lowmem_icl.masks.mask import Mask
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.memory import plan_memory
from lowmem_icl.report.status import status_of
from lowmem_icl.session.folder import RunFolder, check_output, open_folder
from lowmem_icl.session.identity import Identity, default_folder, identity_of, run_folder
from lowmem_icl.session.record import RecordDamaged, record_text, run_record
from lowmem_icl.session.run_form import StageActuals
from lowmem_icl.session.text_form import TextForm
from lowmem_icl.system import folder_lock
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tables.schema import TABLES, read_table, write_table

PLAN = {"stages": [{"experiment": name, "seconds": 2.0} for name in ("evaluate", "ablate")]}
STAGE = StageActuals(seconds=1.5, planned_seconds=2.0, read_bytes=100, planned_read_bytes=90, finished=True)
TASK = SimpleNamespace(
    task="recall", shots=4, split="validation", documents=[0, 1], metric="acc", chance=0.1, majority=0.2
)
PREPARED: Any = SimpleNamespace(
    store=SimpleNamespace(
        manifest=SimpleNamespace(
            weights="int8", outliers=None, source=SimpleNamespace(quantisation=None, notes=[])
        ),
        skeleton=SimpleNamespace(width=32),
        folder=Path("store"),
    ),
    mask_model=MaskModel(id="made", model_type="opt", layers=4, heads=8, digest="d" * 64),
    text_form=TextForm(bos=None, bos_by="family", chat_template=False),
    evaluate=(TASK,),
    train=(TASK,),
)


def options_of(folder: Path, **changes: Any) -> RunOptions:
    return RunOptions.model_validate({"out": folder, "device": "cpu"} | changes)


def identity(options: RunOptions, **changes: Any) -> Identity:
    fields = {"device": "cpu", "weights_digest": "w" * 64, "tasks_digest": "t" * 64, "masks": {}} | changes
    return identity_of(options, **fields)


def session(folder: Path, *stages: str, work: Callable[[RunFolder], None] = lambda opened: None) -> None:
    """Go through a session that finishes some stages and then does its work."""
    options = options_of(folder)
    with open_folder(folder, identity(options)) as opened:
        opened.begin(options, PREPARED, PLAN)
        for name in stages:
            opened.add_stage(name, STAGE)
            opened.write_record()
        work(opened)


def stop(opened: RunFolder) -> None:
    raise KeyboardInterrupt


def fail(opened: RunFolder) -> None:
    raise InputError("a part cannot be read")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    return lambda there: monkeypatch.setattr("torch.cuda.is_available", lambda: there)


def test_a_continued_run_keeps_its_history(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path, "evaluate", work=stop)
    first = run_record(tmp_path)
    assert (first["state"], first["error"], list(first["stages"])) == ("stopped", None, ["evaluate"])
    first["started"] = first["sessions"][0]["started"] = "2001-01-01T00:00:00+00:00"
    (tmp_path / "run.json").write_text(record_text(first))
    session(tmp_path, "evaluate", "ablate", work=lambda opened: opened.write_record(warnings=["slow"]))
    record = run_record(tmp_path)
    assert record["sessions"][0] == first["sessions"][0]
    assert [list(each["stages"]) for each in record["sessions"]] == [["evaluate"], ["evaluate", "ablate"]]
    assert [each["state"] for each in record["sessions"]] == ["stopped", "finished"]
    assert [each["warnings"] for each in record["sessions"]] == [[], ["slow"]]
    assert (record["state"], record["started"]) == ("finished", first["started"])
    assert record["finished"] == record["sessions"][1]["finished"] is not None
    assert record["stages"]["evaluate"] == (STAGE + STAGE).model_dump()
    assert record["stages"]["evaluate"]["seconds"] == 3.0
    assert record["stages"]["ablate"] == STAGE.model_dump()


def test_a_stage_of_an_earlier_session_stays_finished_while_a_later_one_begins(tmp_path: Path) -> None:
    session(tmp_path, "evaluate", work=lambda opened: opened.finish("out of time"))
    assert run_record(tmp_path)["state"] == "out of time"

    def look(opened: RunFolder) -> None:
        state = status_of(tmp_path)
        assert (state["state"], state["finished"]) == ("running", {"evaluate": 1.5})
        assert state["seconds_left_planned"] == 2.0

    session(tmp_path, work=look)


def test_status_counts_down_from_what_the_run_estimated_last(tmp_path: Path) -> None:
    def look(opened: RunFolder) -> None:
        opened.estimate = lambda: 300.0
        opened.write_record()
        assert 290 < status_of(tmp_path)["seconds_left"] <= 300
        opened.record["outlook"]["at"] = a_minute_ago
        write_text_atomic(tmp_path / "run.json", record_text(opened.record))
        assert 230 < status_of(tmp_path)["seconds_left"] <= 240
        opened.estimate = lambda: 10.0
        opened.record["outlook"]["seconds_left"] = 10.0
        write_text_atomic(tmp_path / "run.json", record_text(opened.record))
        late.append(status_of(tmp_path))
        raise KeyboardInterrupt

    a_minute_ago = (datetime.now(UTC) - timedelta(minutes=1)).isoformat(timespec="seconds")
    late: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path, "evaluate", work=look)
    output = StringIO()
    show_status(late[0], Console(file=output))
    assert "time left: unknown, it takes longer than planned" in output.getvalue()
    stopped = status_of(tmp_path)
    assert (stopped["state"], stopped["seconds_left"]) == ("stopped", 10.0)


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


def test_an_error_is_kept_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a part"):
        session(tmp_path, work=fail)
    record = run_record(tmp_path)
    assert (record["state"], record["error"]) == ("failed", "InputError: a part cannot be read")
    assert "ended early: InputError" in (tmp_path / "run.log").read_text()
    output = StringIO()
    show_status(status_of(tmp_path), Console(file=output))
    assert "error: InputError: a part cannot be read\n" in output.getvalue()
    session(tmp_path)
    assert run_record(tmp_path)["error"] is None


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


DAMAGED = {
    b"": "not JSON",
    b'{"format": "lowmem-icl-run/2", "state"': "not JSON",
    b"[" * 100_000: "not JSON",
    '{"state": "é"}'.encode("latin-1"): "not JSON",
    b"[]": "content: Input should be",
    b"null": "content: Input should be",
    b"{}": "format: Field required",
    b'{"format": ["lowmem-icl-run/1"]}': "format: Input should be",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_a_malformed_record_is_an_error_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    for attempt in (run_record, status_of):
        with pytest.raises(
            RecordDamaged, match=rf"run\.json: {DAMAGED[content]}.*run the same command again"
        ):
            attempt(tmp_path)
    # Nothing says that the folder is this run's.
    assert check_output(options_of(tmp_path)) == tmp_path
    with pytest.raises(InputError, match=r"no finished part says that .*; choose another --out$"):
        session(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == content


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    content = b'{"format": "lowmem-icl-run/1"}'
    (tmp_path / "run.json").write_bytes(content)
    for attempt in (run_record, status_of, lambda folder: check_output(options_of(folder)), session):
        with pytest.raises(InputError, match=r"in another version's form .*; read it .*another --out$"):
            attempt(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == content


def test_a_run_goes_on_from_its_parts_where_its_record_is_damaged(tmp_path: Path) -> None:
    def make(opened: RunFolder) -> None:
        opened.parts.get_or_make("evaluate", lambda draft: {"a": np.arange(3)})

    session(tmp_path, "evaluate", work=make)
    whole, record = (tmp_path / "run.json").read_bytes(), run_record(tmp_path)
    for position in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        (tmp_path / "run.json").write_bytes(flipped)
        try:
            read = run_record(tmp_path)
        except InputError:
            continue
        # The digest's own name was hit, and nothing else.
        assert record.items() <= read.items()
    told: list[str] = []
    options = options_of(tmp_path)
    with open_folder(tmp_path, identity(options), announce=told.append) as opened:
        opened.begin(options, PREPARED, PLAN)
        opened.parts.get_or_make("evaluate", lambda draft: pytest.fail("made twice"))
    assert "set aside as run.json.bad, the finished parts are used" in told[0]
    assert run_record(tmp_path)["state"] == "finished"
    # Another run's parts are no reason to go on.
    (tmp_path / "run.json").write_bytes(b"")
    other = options_of(tmp_path, seed=43)
    with pytest.raises(InputError, match="no finished part"), open_folder(tmp_path, identity(other)):
        pass


def test_there_must_be_a_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run; give a run folder"):
        run_record(tmp_path)
    (tmp_path / "run.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        run_record(tmp_path)


def spoiled(content: Any) -> Iterator[Any]:
    """Yield copies of a JSON value with one value somewhere in it left out or of another type."""
    keys = list(content) if isinstance(content, dict) else range(len(content))
    for key in keys:
        value = content[key]
        others: tuple[Any, ...] = ([], {}, "text", None, -1, True)
        for other in others:
            if type(other) is not type(value):
                changed = copy.copy(content)
                changed[key] = other
                yield changed
        changed = copy.copy(content)
        del changed[key]
        yield changed
        if isinstance(value, dict | list):
            for inner in spoiled(value):
                changed = copy.copy(content)
                changed[key] = inner
                yield changed


def test_an_edited_record_is_read_or_refused_but_no_traceback(tmp_path: Path) -> None:
    def estimate(opened: RunFolder) -> None:
        opened.estimate = lambda: 7.0

    session(tmp_path, "evaluate")
    session(tmp_path, "evaluate", "ablate", work=estimate)
    record, refused = run_record(tmp_path), 0
    options = options_of(tmp_path)
    for changed in spoiled(record):
        (tmp_path / "run.json").write_text(record_text(changed))
        try:
            json.dumps(status_of(tmp_path))
            check_output(options)
        except InputError:
            refused += 1
    assert refused > 100


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
