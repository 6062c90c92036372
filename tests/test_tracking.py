"""Runs that experiment trackers follow: what these are told, and that the run does not depend on them."""

import json
import re
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import polars as pl
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from commands import invoke, run_small
from polars.testing import assert_frame_equal
from synthetic_run import SyntheticRun

from lowmem_icl.options import RunOptions
from lowmem_icl.session.folder import RunFolder
from lowmem_icl.session.identity import Identity
from lowmem_icl.session.record import run_record
from lowmem_icl.session.run_form import StageActuals
from lowmem_icl.tracking import catalogue, run_tracking
from lowmem_icl.tracking.catalogue import TRACKERS
from lowmem_icl.tracking.metrics import stage_metrics
from lowmem_icl.tracking.run_tracking import RunTracking, _tell_options, plain_options
from lowmem_icl.tracking.worker import TrackerWorker

# What mlflow allows in names.
NAME = re.compile(r"[\w.\- :]+(/[\w.\- :]+)*")
ACTUALS = StageActuals(
    seconds=1.5, planned_seconds=1.0, read_bytes=7, planned_read_bytes=7, finished=True
)  # fmt: skip
FEW = ("--experiments", "evaluate,importance", "--tasks", "recall")


class FakeTracker(GeneralTracker):  # type: ignore[misc]
    """Keeps what it is told; `fails_at` and `hangs_at`: in which of its methods it does so."""

    name = "wandb"
    requires_logging_directory = False
    made: ClassVar[list[Any]] = []
    fails_at = hangs_at = ""
    released = threading.Event()

    def __init__(self, run_name: str, **keywords: Any) -> None:
        super().__init__()
        self.keywords = {"project": run_name, **keywords}
        self.told: list[Any] = []
        self.made.append(self)

    @property
    def tracker(self) -> "FakeTracker":
        return self

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **keywords: Any) -> None:
        self._do("log", (step, values))

    def finish(self) -> None:
        self._do("finish")

    def _do(self, what: str, value: Any = None) -> None:
        if what == "start":
            print("fake: hello")
            print("fake: hello", file=sys.stderr)
        if what == self.hangs_at:
            self.released.wait(10)
        if what == self.fails_at:
            raise SystemExit("the network\nis gone")
        self.told.append((what, value))

    def logged(self) -> dict[str, Any]:
        """Return the newest values by name."""
        return {
            name: number
            for what, value in self.told
            if what == "log"
            for name, number in value[1].items()
        }  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeTracker]]:
    """Have a fake in wandb's place."""

    class Fake(FakeTracker):
        made: ClassVar[list[Any]] = []
        released = threading.Event()

    entry = replace(
        catalogue.TRACKERS["wandb"],
        keywords=lambda folder, earlier: {"run_name": "p", "name": folder.name, "id": earlier},
        identify=lambda tracker: "id-1",
        note=lambda tracker, name, text, step: tracker.told.append(("note", (name, text))),
        save=lambda tracker, folder, step: tracker.told.append(("save", sorted(folder.glob("masks/*.json")))),
        end=lambda tracker, state: (tracker.finish(), tracker.told.append(("state", state)))[0],
        where=lambda tracker: "there",
    )
    monkeypatch.setattr(catalogue, "is_installed", lambda name: True)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(run_tracking, "TRACKERS", {"wandb": entry})
    monkeypatch.setattr(catalogue, "TRACKERS", {"wandb": entry})
    yield Fake
    Fake.released.set()


def opened_folder(folder: Path) -> RunFolder:
    folder.mkdir(exist_ok=True)
    identity = Identity(options={}, device="cpu", weights="", tasks="", masks="", version="")
    return RunFolder(folder, identity, {"started": "2026-01-01T00:00:00+00:00", "sessions": []})


def test_every_tracker_is_one_of_accelerates_and_an_extra() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    assert set(catalogue.TRACKERS) <= set(LOGGER_TYPE_TO_CLASS)
    for name in catalogue.TRACKERS:
        assert extras[name][0].startswith(name)
        assert RunOptions(track=(name,)).digest == RunOptions().digest  # type: ignore[arg-type]
        assert name in extras["track"][0]


def test_what_is_not_installed_or_not_known_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(catalogue, "is_installed", lambda name: False)
    for command in ("run", "evaluate"):
        mask = ["--mask", "masks/demo/greedy-recall-16shot.json"] if command == "evaluate" else []
        result = invoke(command, "--track", "tensorboard,mlflow", "--out", tmp_path / "out", *mask)
        assert result.exit_code == 2
        assert (
            "--track tensorboard: it is not installed; pip install 'lowmem-icl[tensorboard]'" in result.stderr
        )
    result = invoke("run", "--track", "wnadb", "--out", tmp_path / "out")
    assert "each item one of wandb, mlflow, tensorboard, trackio, got 'wnadb'" in result.stderr
    config = tmp_path / "a.yaml"
    config.write_text("track: [wandb, tensorboard]\n")
    assert "--track wandb: it is not installed" in invoke("run", "--config", config).stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_a_tracker_left_behind_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lefttracks").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not catalogue.is_installed("lefttracks")
    assert not catalogue.is_installed("no_such_package")
    assert catalogue.is_installed("accelerate")


def test_a_run_tells_a_tracker_options_numbers_progress_masks_and_how_it_ended(
    tmp_path: Path, stores: Path, fake: type[FakeTracker]
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "followed"
    assert run_small(plain, stores, *FEW).exit_code == 0
    result = run_small(out, stores, *FEW, "--track", "wandb")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "fake" not in result.stdout
    (tracker,) = fake.made
    assert tracker.keywords == {"project": "p", "name": "followed", "id": None}
    kinds = [what for what, _ in tracker.told]
    assert (kinds[:2], kinds[-3:]) == (["start", "config"], ["save", "finish", "state"])
    assert tracker.told[-1] == ("state", "finished")
    config = tracker.told[1][1]
    assert (config["limit"], config["tasks"], config["shots"], config["bos"]) == (16, "recall", "0,4", "")
    results = pl.read_parquet(out / "results.parquet")
    logged = tracker.logged()
    for experiment in ("evaluate", "importance"):
        own = results.filter(pl.col("experiment") == experiment)
        assert stage_metrics(experiment, own).items() <= logged.items()
        assert {f"{experiment}/seconds", f"{experiment}/read_bytes"} <= set(logged)
    acc = results.filter(task="recall", shots=4, metric="acc", labels="right", mask="clean")["value"]
    assert logged["evaluate/recall/4-shot/acc"] == acc.item()
    assert {"progress/seconds", "progress/seconds_left"} <= set(logged)
    assert dict(value for what, value in tracker.told if what == "note")["evaluate/found"].startswith(
        "recall"
    )
    steps = [value[0] for what, value in tracker.told if what == "log"]
    assert steps == sorted(steps)
    # The run is the one it would have been.
    for table in ("results", "effects", "answers"):
        assert_frame_equal(
            pl.read_parquet(plain / f"{table}.parquet"), pl.read_parquet(out / f"{table}.parquet")
        )
    identity = run_record(out)["identity"]
    assert identity == run_record(plain)["identity"]
    assert run_record(out)["tracked"] == {"wandb": {"id": "id-1", "finished": True}}
    # Finished is finished; a run that was not tracked yet is told to the tracker, and one that was, goes on.
    assert run_small(out, stores, *FEW, "--track", "wandb").exit_code == 0
    assert len(fake.made) == 1
    assert run_small(plain, stores, *FEW, "--track", "wandb").exit_code == 0
    assert fake.made[-1].logged()["evaluate/recall/4-shot/acc"] == acc.item()
    (out / "report.html").unlink()
    assert run_small(out, stores, *FEW, "--track", "wandb").exit_code == 0
    assert fake.made[-1].keywords["id"] == "id-1"
    assert "config" not in [what for what, _ in fake.made[-1].told]


@pytest.mark.parametrize("fails_at", ["start", "config", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    fails_at: str, tmp_path: Path, fake: type[FakeTracker]
) -> None:
    fake.fails_at = fails_at
    told: list[str] = []
    tracking = RunTracking(["wandb"], opened_folder(tmp_path / "run"), told.append)
    tracking.begin(RunOptions())
    for _ in range(3):
        tracking.stage_over("evaluate", pl.DataFrame(), ACTUALS)
        tracking.recorded()
    tracking.end("finished", with_files=True, seconds=5)
    tracking.recorded()
    warned = [text for text in told if text.startswith("warning")]
    assert len(warned) == 1
    assert "tracking with wandb failed" in warned[0]
    assert "is gone" in warned[0]
    assert "\n" not in warned[0]
    assert (told[0] == "tracking with wandb: there") == (fails_at != "start")


@pytest.mark.parametrize("hangs_at", ["start", "log", "finish"])
def test_a_tracker_that_hangs_holds_up_nothing(
    hangs_at: str, tmp_path: Path, fake: type[FakeTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_tracking, "SECONDS_TO_OPEN", 0.2)
    fake.hangs_at = hangs_at
    told: list[str] = []
    opened = opened_folder(tmp_path / "run")
    began = time.monotonic()
    tracking = RunTracking(["wandb"], opened, told.append)
    tracking.begin(RunOptions())
    for _ in range(20):
        tracking.recorded()
    tracking.end("finished", with_files=True, seconds=0.2)
    assert time.monotonic() - began < 5
    assert "it did not end within 0 s" in told[-1]
    assert len([text for text in told if text.startswith("warning")]) == 1
    assert opened.record["tracked"]["wandb"]["finished"] is False


def test_an_earlier_run_that_is_gone_is_begun_anew(tmp_path: Path, fake: type[FakeTracker]) -> None:
    class Gone(fake):  # type: ignore[misc, valid-type]
        made = fake.made

        def start(self) -> None:
            if self.keywords["id"] == "gone":
                raise ValueError("no such run")

    LOGGER_TYPE_TO_CLASS["wandb"] = Gone
    tracker, identity = catalogue.open_tracker("wandb", tmp_path, "gone")
    assert (tracker.keywords["id"], identity) == (None, "id-1")


def test_a_tracker_that_fails_on_the_way_is_ended() -> None:
    ended: list[str] = []
    known = replace(
        TRACKERS["wandb"], end=lambda tracker, state: ended.append(state), where=lambda tracker: "here"
    )
    worker = TrackerWorker("wandb", known, lambda: (object(), "id"))

    def fail(known: object, tracker: object) -> None:
        raise ValueError("the network is gone")

    worker.ask(fail)
    worker.end("finished")
    assert worker.wait(10)
    assert (ended, worker.has_ended, str(worker.error)) == (["failed"], False, "the network is gone")


@pytest.mark.parametrize(("identity", "told"), [("old", []), ("new", [{"limit": 4}])])
def test_options_are_told_to_a_run_that_is_new_there(identity: str, told: list[dict[str, int]]) -> None:
    found: list[dict[str, int]] = []
    worker: Any = SimpleNamespace(identity=identity)
    tracker = SimpleNamespace(store_init_configuration=found.append)
    _tell_options(worker, "old", {"limit": 4}, TRACKERS["wandb"], tracker)
    assert found == told


def test_tensorboard_can_be_read_back(tmp_path: Path, stores: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    result = run_small(out, stores, *FEW, "--track", "tensorboard")
    assert result.exit_code == 0, result.output
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    results = pl.read_parquet(out / "results.parquet")
    wanted = {
        name: value
        for experiment in ("evaluate", "importance")
        for name, value in stage_metrics(experiment, results.filter(experiment=experiment)).items()
    }
    assert len(wanted) > 10
    for name, value in wanted.items():
        assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-6), name
    texts = {tag.removesuffix("/text_summary"): events.Tensors(tag) for tag in events.Tags()["tensors"]}
    assert {"answer", "evaluate/found", "importance/found"} <= set(texts)
    answer = json.loads((out / "summary.json").read_text())["answer"]["sentences"][0]
    assert answer in texts["answer"][0].tensor_proto.string_val[0].decode()
    (hyperparameters,) = out.glob("tensorboard/*/hparams.yml")
    assert "train_limit: 8" in hyperparameters.read_text()


def test_the_largest_run_has_a_few_hundred_numbers_with_names_that_all_trackers_take(
    opt66b_run: Path,
) -> None:
    results = pl.read_parquet(opt66b_run / "results.parquet")
    found: dict[str, float] = {}
    for (experiment,), records in results.group_by("experiment", maintain_order=True):
        found |= stage_metrics(str(experiment), records)
    assert 100 < len(found) < 1500, len(found)
    assert {name.partition("/")[0] for name in found} >= {"evaluate", "importance", "ablate", "prune"}
    for name in found:
        assert NAME.fullmatch(name), name
        assert len(name) <= 250
    value = results.filter(experiment="evaluate", task="piqa", shots=5, metric="acc", mask="clean")["value"]
    assert found["evaluate/piqa/5-shot/acc"] == value[0]


def test_names_of_files_and_masks_become_one_word_of_a_name(tmp_path: Path) -> None:
    task = "/rows/../[v2] данные: x?.jsonl"
    small = SyntheticRun(layers=2, heads=2, tasks=(task,), shots=(0,))
    results = pl.read_parquet(small.write(tmp_path / "run") / "results.parquet")
    for (experiment,), records in results.group_by("experiment", maintain_order=True):
        for name in stage_metrics(str(experiment), records):
            assert NAME.fullmatch(name), name
    nan = results.filter(experiment="evaluate").with_columns(value=pl.lit(float("nan")))
    assert stage_metrics("evaluate", nan) == {}
    assert stage_metrics("evaluate", results.clear()) == stage_metrics("no-experiment", results) == {}


def test_options_are_plain_values() -> None:
    values = plain_options(RunOptions(track=("wandb", "mlflow"), shots=(0, 4), limit=0.1, out=Path("x")))
    assert all(type(value) in (bool, int, float, str) for value in values.values())
    assert (values["track"], values["shots"], values["limit"], values["out"]) == (
        "wandb,mlflow",
        "0,4",
        0.1,
        "x",
    )


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_other_trackers_open_continue_and_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    opened = opened_folder(tmp_path / "run")
    (opened.path / "masks").mkdir()
    (opened.path / "masks" / "a.json").write_text("{}")
    (opened.path / "report.html").write_text("<p>page")
    told: list[str] = []
    identities = []
    for _ in range(2):
        tracking = RunTracking([name], opened, told.append)
        tracking.begin(RunOptions())
        tracking.stage_over("evaluate", pl.DataFrame(), ACTUALS)
        tracking.end("finished", with_files=True, seconds=60)
        assert opened.record["tracked"][name]["finished"], told
        identities.append(opened.record["tracked"][name]["id"])
    assert identities[0] == identities[1] is not None
    assert not [text for text in told if text.startswith("warning")]
