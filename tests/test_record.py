"""What run.json says of every session, read back whole, damaged or edited."""

import copy
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from run_sessions import PLAN, PREPARED, STAGE, fail, identity, options_of, session, stop

from lowmem_icl.cli.status import show_status
from lowmem_icl.errors import InputError
from lowmem_icl.report.status import status_of
from lowmem_icl.session.folder import RunFolder, check_output, open_folder
from lowmem_icl.session.record import RecordDamaged, record_text, run_record
from lowmem_icl.system.files import write_text_atomic


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
