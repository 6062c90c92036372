"""A run as trackers follow it: its options, what stages find as they end, how far it is, page and masks.

Nothing a run does depends on it. A tracker that fails is named once, and the run goes on without it.
"""

import contextlib
import datetime
import logging
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from typing import Any

import polars as pl

from lowmem_icl import __version__
from lowmem_icl.options import RunOptions
from lowmem_icl.report.findings.first_results import first_result
from lowmem_icl.session.folder import RunFolder
from lowmem_icl.session.publish import Follower, Untold
from lowmem_icl.session.run_form import StageActuals, State
from lowmem_icl.tracking.catalogue import TRACKERS, KnownTracker, open_tracker
from lowmem_icl.tracking.metrics import stage_metrics
from lowmem_icl.tracking.muted import streams_without_muted
from lowmem_icl.tracking.worker import TrackerWorker

logger = logging.getLogger("lowmem_icl")

SECONDS_TO_OPEN = 30.0
SECONDS_TO_END = 120.0
SECONDS_TO_STOP = 3.0
SECONDS_OF_SILENCE = 2.0


class RunTracking:
    """Tells trackers of a run. Every method returns at once but `begin`, which waits a while for a tracker to
    open, and `end`.
    """

    def __init__(self, names: Sequence[str], opened: RunFolder, announce: Callable[[str], None]) -> None:
        self._opened, self._announce = opened, announce
        self._folder = opened.path
        self._began = time.monotonic()
        self._first_start = datetime.datetime.fromisoformat(opened.record["started"])
        self._tracked: MutableMapping[str, Any] = opened.record.setdefault("tracked", {})
        self._earlier = earlier = {name: self._tracked.get(name, {}).get("id") for name in names}
        for name in names:
            self._tracked[name] = {"id": earlier[name], "finished": False}
        self._workers = [
            TrackerWorker(name, TRACKERS[name], partial(open_tracker, name, self._folder, earlier[name]))
            for name in names
        ]
        self._named: set[str] = set()

    def begin(self, options: RunOptions) -> None:
        """Tell the options, to trackers that do not know the run yet."""
        values = plain_options(options) | {"version": __version__}
        for worker in self._workers:
            worker.ask(partial(_tell_options, worker, self._earlier[worker.name], values))
        deadline = time.monotonic() + SECONDS_TO_OPEN
        for worker in self._workers:
            worker.is_open.wait(max(0.0, deadline - time.monotonic()))
            if worker.identity is not None:
                self._announce(f"tracking with {worker.name}: {worker.where}")
        self._note()

    def stage_over(self, stage: str, results: pl.DataFrame, actuals: StageActuals) -> None:
        """Tell what a stage has found and taken."""
        self._ask(partial(_tell_stage, stage, results, actuals, self._step()))

    def recorded(self) -> None:
        """Tell how far the run is; called whenever run.json was written."""
        self._note()
        progress = {"progress/seconds": round(time.monotonic() - self._began, 1)}
        if self._opened.estimate is not None:
            progress["progress/seconds_left"] = round(self._opened.estimate(), 1)
        step = self._step()
        self._ask(lambda known, tracker: tracker.log(progress, step=step))

    def end(self, state: State, *, with_files: bool, seconds: float) -> None:
        """Give page and masks away, end all trackers, and wait for them so many seconds."""
        if with_files:
            step = self._step()
            self._ask(lambda known, tracker: known.save(tracker, self._folder, step))
        for worker in self._workers:
            worker.end(state)
        late = self._late(min(seconds, SECONDS_OF_SILENCE))
        if late and seconds > SECONDS_OF_SILENCE:
            self._announce(f"waiting for {', '.join(late)} to take the rest, {seconds:.0f} s at most …")
            late = self._late(seconds - SECONDS_OF_SILENCE)
        for name in late:
            self._warn(name, f"it did not end within {seconds:.0f} s")
        self._note()

    def _late(self, seconds: float) -> list[str]:
        """Return the trackers that have not ended after so many seconds."""
        deadline = time.monotonic() + seconds
        # All are waited for, not as long as the first that is late.
        return [
            worker.name for worker in self._workers if not worker.wait(max(0.0, deadline - time.monotonic()))
        ]

    def _ask(self, call: Callable[[KnownTracker, Any], None]) -> None:
        for worker in self._workers:
            if worker.error is None:
                worker.ask(call)

    def _note(self) -> None:
        """Keep what continuing needs, and name trackers that have failed."""
        for worker in self._workers:
            if worker.identity is not None:
                self._tracked[worker.name] = {"id": worker.identity, "finished": worker.has_ended}
            if worker.error is not None:
                self._warn(worker.name, " ".join(f"{type(worker.error).__name__}: {worker.error}".split()))

    def _warn(self, name: str, reason: str) -> None:
        if name not in self._named:
            self._named.add(name)
            shown = reason if len(reason) <= 300 else f"{reason[:300]}…"
            logger.warning("tracking with %s: %s", name, reason)
            self._announce(
                f"warning: tracking with {name} failed ({shown}); the run goes on without it, and tells it "
                "the rest when it is run again"
            )

    def _step(self) -> int:
        """Return the seconds since the run was first started: they grow from session to session."""
        now = datetime.datetime.now(datetime.UTC)
        return max(0, int((now - self._first_start).total_seconds()))


@contextlib.contextmanager
def tracked(options: RunOptions, opened: RunFolder, announce: Callable[[str], None]) -> Iterator[Follower]:
    """Have the trackers that options name follow a run whose session has begun, until this is left: then they
    are given page and masks, and ended as the run did.
    """
    if not options.track:
        yield Untold()
        return
    with streams_without_muted():
        tracking = RunTracking(options.track, opened, announce)
        tracking.begin(options)
        try:
            yield tracking
        except BaseException as error:
            failed = isinstance(error, Exception)
            tracking.end("failed" if failed else "stopped", with_files=False, seconds=SECONDS_TO_STOP)
            raise
        state: State = opened.record["state"]
        tracking.end(state, with_files=True, seconds=SECONDS_TO_END)
        opened.write_record()


def plain_options(options: RunOptions) -> dict[str, bool | int | float | str]:
    """Return options as all trackers take them: lists comma-separated, "" for those not given."""
    return {
        name: ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else value
        for name, value in options.model_dump(mode="json").items()
    }


def _tell_options(
    worker: TrackerWorker, earlier: str | None, values: dict[str, Any], known: KnownTracker, tracker: Any
) -> None:
    # Where an earlier run is gone the tracker has begun another.
    if worker.identity != earlier:
        tracker.store_init_configuration(values)


def _tell_stage(
    stage: str, results: pl.DataFrame, actuals: StageActuals, step: int, known: KnownTracker, tracker: Any
) -> None:
    took = {
        f"{stage}/seconds": actuals.seconds,
        f"{stage}/planned_seconds": actuals.planned_seconds,
        f"{stage}/read_bytes": float(actuals.read_bytes),
    }
    tracker.log(stage_metrics(stage, results) | took, step=step)
    found = first_result(stage, results)
    if found:
        known.note(tracker, f"{stage}/found", found, step)
