"""Runs that are stopped, cut off or finished: what is written on the way out, and what is told afterwards."""

import fcntl
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from commands import invoke, run_small

from lowmem_icl.report.run_tables import read_run
from lowmem_icl.report.status import status_of
from lowmem_icl.session import publish
from lowmem_icl.session.publish import Publisher
from lowmem_icl.session.record import record_text
from lowmem_icl.session.result import StageResult
from lowmem_icl.system.time_limit import TimeIsUp, at_most
from lowmem_icl.tables.schema import empty_frame, read_table, write_table


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that may be written to."""
    folder = tmp_path / "copy"
    shutil.copytree(small_run, folder)
    return folder


def set_state(folder: Path, state: str) -> None:
    path = folder / "run.json"
    record = json.loads(path.read_text())
    record["state"] = record["sessions"][-1]["state"] = state
    path.write_text(record_text(record))


def test_a_finished_run_says_so_and_opens_nothing(
    copy: Path, small_run: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def refuse(*arguments: Any) -> Any:
        opened.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_icl.runner.run", refuse)
    same = ("--masks-dir", small_run.parent / "masks")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    again = run_small(copy, stores, *same)
    assert (again.exit_code, opened) == (0, [])
    assert "accuracy by demonstrations" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert json.loads(run_small(copy, stores, *same, "--json").stdout)["folder"] == str(copy)
    # Where something is missing or asked for anew it goes on.
    assert run_small(copy, stores, "--masks-dir", copy / "more").exit_code == 130
    (copy / "report.html").unlink()
    assert run_small(copy, stores, *same).exit_code == 130
    set_state(copy, "stopped")
    assert run_small(copy, stores, *same).exit_code == 130
    assert len(opened) == 3


def test_other_options_are_refused_whether_or_not_a_run_is_finished(copy: Path, stores: Path) -> None:
    refused = run_small(copy, stores, "--seed", 7)
    assert refused.exit_code == 2
    assert "--seed: 42 in the folder, 7 asked for" in refused.stderr


def test_status_tells_a_run_at_work_from_one_that_was_cut_off(copy: Path) -> None:
    set_state(copy, "running")
    assert status_of(copy)["state"] == read_run(copy).record["state"] == "cut off"
    assert "its process ended without a word" in invoke("status", copy).stdout
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status_of(copy)["state"] == "running"
        # Looking takes nothing away.
        assert status_of(copy)["state"] == "running"
    told = invoke("status", copy).stdout
    assert "costliest units alone so far" in told
    assert f"page: {copy}/report.html" in told


def publisher_of(folder: Path, write_page: Any, found: pl.DataFrame | None = None) -> Publisher:
    parts = SimpleNamespace(notes=[])
    opened: Any = SimpleNamespace(
        path=folder, parts=parts, finish=lambda state: None, write_record=lambda **_: None
    )
    prepared: Any = SimpleNamespace(options=SimpleNamespace(masks_dir=None))
    publisher = Publisher(prepared, opened, [], write_page)
    if found is not None:
        publisher.fold("evaluate", StageResult(results=found))
    return publisher


def ignore(text: str) -> None:
    pass


def keep_in(pages: list[Path]) -> Any:
    """Return what notes the folders of pages instead of writing these."""
    return lambda folder, ends_as: pages.append(folder)


def test_a_run_stopped_before_its_first_page_has_one(tmp_path: Path) -> None:
    pages: list[Path] = []
    publisher_of(tmp_path, keep_in(pages)).publish_stopped(ignore)
    assert pages == [tmp_path]
    assert read_table(tmp_path / "results.parquet", "results").is_empty()


def test_a_page_delays_a_stop_for_a_few_seconds_at_most_and_a_second_stop_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "SECONDS_TO_STOP", 0.1)
    began = time.monotonic()
    publisher_of(tmp_path, lambda folder, ends_as: time.sleep(60)).publish_stopped(ignore)
    assert time.monotonic() - began < 10

    def stop_again(folder: Path, ends_as: str | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publisher_of(tmp_path, stop_again).publish_stopped(ignore)


def test_a_stop_never_replaces_tables_by_ones_with_less(tmp_path: Path) -> None:
    def some(count: int) -> pl.DataFrame:
        row = {"experiment": "evaluate", "metric": "acc", "value": 0.5, "documents": 4}
        kinds = empty_frame("results").schema
        return pl.DataFrame([row | {"task": "t", "shots": 0}] * count, schema=kinds)

    write_table(some(3), "results", tmp_path / "results.parquet")
    pages: list[Path] = []
    publisher_of(tmp_path, keep_in(pages)).publish_stopped(ignore)
    publisher_of(tmp_path, keep_in(pages), some(2)).publish_stopped(ignore)
    assert pages == []
    publisher_of(tmp_path, keep_in(pages), some(3)).publish_stopped(ignore)
    assert pages == [tmp_path]


def test_what_takes_too_long_is_ended_and_what_does_not_is_not() -> None:
    with pytest.raises(TimeIsUp), at_most(0.05):
        time.sleep(60)
    with at_most(0.05):
        pass
    time.sleep(0.1)
