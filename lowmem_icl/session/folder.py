"""A run's folder: who may work in it, its log, and run.json, where every session leaves a record."""

import datetime
import hashlib
import logging
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_icl import __version__
from lowmem_icl.errors import FULL, InputError, from_os_error
from lowmem_icl.options import RunOptions, shell_command
from lowmem_icl.session.identity import Identity, run_folder
from lowmem_icl.session.lock import LOCK_FILE, LOG_FILE, is_in_use, locked
from lowmem_icl.session.parts import Parts, set_aside
from lowmem_icl.session.record import RUN_FILE, RecordDamaged, record_text, run_record
from lowmem_icl.session.run_form import RUN_FORMAT, StageActuals, State
from lowmem_icl.system.files import (
    TRIED,
    clear_partials,
    existing_folder,
    is_partial,
    try_writing,
    write_text_atomic,
)
from lowmem_icl.system.machine import describe_machine, device_type, peak_resident_bytes, resolved_device
from lowmem_icl.system.visible import visible

if TYPE_CHECKING:
    from lowmem_icl.session.prepare import Prepared

logger = logging.getLogger("lowmem_icl")

OWN_FOLDERS = ("parts", "masks", "figures")
"""Of a run, within its folder."""
PACKAGES = ("torch", "transformers", "bitsandbytes", "optimum", "accelerate", "lm_eval", "polars", "numpy")


def check_output(options: RunOptions) -> Path:
    """Return a run's folder, checked as far as options go, before any long work.

    Raises InputError where it or --masks-dir cannot be written to, or it holds another run or something else.
    Weights and documents are compared by `open_folder`.
    """
    folder = run_folder(options)
    _check_writable("--out", folder)
    if options.masks_dir is not None:
        _check_writable("--masks-dir", options.masks_dir)
    if (folder / RUN_FILE).exists():
        try:
            earlier = Identity.model_validate(run_record(folder)["identity"])
        except RecordDamaged:
            # Whether the parts are this run's shows once weights and documents are known.
            return folder
        known = {
            "options": options.identity_values,
            "device": device_type(options.device),
            "version": __version__,
        }
        _refuse_differences(folder, earlier, earlier.model_copy(update=known))
    # A script may have begun to log what is printed there.
    elif folder.is_dir() and any(map(_is_foreign, folder.iterdir())):
        raise InputError(f"--out {folder} is not empty and holds no run; choose another folder")
    return folder


def _is_foreign(entry: Path) -> bool:
    """Tell whether no start of a run leaves a file of this name: not the lock, a log, or what it was writing
    when it was killed.
    """
    is_ours = entry.name == LOCK_FILE or entry.suffix == ".log" or is_partial(entry, RUN_FILE, TRIED)
    return not is_ours


def parts_of(folder: Path, identity: Identity | None = None) -> Parts:
    """Return the finished pieces of a run's work, none where it was not begun; without its identity they can
    only be counted.
    """
    sealed_as = "" if identity is None else hashlib.sha256(identity.model_dump_json().encode()).hexdigest()
    return Parts(folder / "parts", sealed_as)


def _check_writable(flag: str, folder: Path) -> None:
    try:
        existing = existing_folder(folder)
        if not existing.is_dir():
            raise InputError(f"{flag} {folder}: {existing} is a file; give a folder")
        try_writing(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise from_os_error(error) from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{flag} {folder}: cannot be written to ({reason}); choose another folder"
        ) from error


def _refuse_differences(folder: Path, earlier: Identity, identity: Identity) -> None:
    differences = identity.differences(earlier)
    if differences:
        raise InputError(
            f"--out {folder} holds another run: {'; '.join(differences)}; choose another --out, or "
            "give --fresh, which begins beside it"
        )


class RunFolder:
    """The folder of a run that this process works in.

    record: the content of run.json; session: this start's record in it; parts: the finished pieces of work;
    estimate: asked at every writing how many seconds the run will still take, where anybody knows.
    Nothing is written before `begin`, so that a start which comes to nothing leaves what there was.
    """

    def __init__(self, path: Path, identity: Identity, earlier: dict[str, Any] | None) -> None:
        self.path = path
        self.parts = parts_of(path, identity)
        self.record: dict[str, Any] = earlier or {"format": RUN_FORMAT, "sessions": []}
        self.session: dict[str, Any] = {}
        self.estimate: Callable[[], float] | None = None
        self._identity = identity

    def begin(self, options: RunOptions, prepared: "Prepared", plan: Mapping[str, Any]) -> None:
        """Begin a session and write it as running: if this process is killed, the next one sees that.

        plan: plain values for run.json.
        """
        sessions = self.record["sessions"]
        for earlier in sessions:
            if earlier["state"] == "running":
                earlier["state"] = "cut off"
        self.session = {
            "started": _now(),
            "finished": None,
            "state": "running",
            "error": None,
            "command": shell_command(["lowmem-icl", *sys.argv[1:]]),
            "versions": _versions(),
            "machine": describe_machine(resolved_device(options.device)),
            "plan": dict(plan),
            "stages": {},
            "warnings": [],
        }
        sessions.append(self.session)
        values = options.identity_values
        self.record |= {
            "started": sessions[0]["started"],
            "options": options.model_dump(mode="json"),
            "shots": values["shots"],
            "train_limit": values["train_limit"],
            "identity": self._identity.model_dump(),
            "model": _describe_model(prepared),
            "tasks": _describe_tasks(prepared),
        }
        self.write_record()

    def add_stage(self, name: str, actuals: StageActuals) -> None:
        """Note that a stage is over in this session; `write_record` writes it."""
        self.session["stages"][name] = actuals.model_dump()
        said = "finished in" if actuals.finished else "was cut after"
        logger.info("%s %s %.1f s", name, said, actuals.seconds)

    def write_record(
        self, *, warnings: Sequence[str] | None = None, fields: Mapping[str, Any] | None = None
    ) -> None:
        """Write run.json; warnings: all of this session so far; fields: what stages add at the top level."""
        if warnings is not None:
            self.session["warnings"] = list(warnings)
        self.session |= {
            "peak_resident_bytes": peak_resident_bytes(),
            "parts": {"reused": self.parts.reused, "made": self.parts.made},
        }
        if self.estimate is not None:
            # Who looks into the folder counts down from it.
            self.session["outlook"] = {"at": _now(), "seconds_left": round(self.estimate(), 1)}
        self.record |= {name: value for name, value in self.session.items() if name != "started"}
        self.record["stages"] = _total_stages(self.record["sessions"])
        self.record |= fields or {}
        # Last, because it grows.
        self.record["sessions"] = self.record.pop("sessions")
        write_text_atomic(self.path / RUN_FILE, record_text(self.record))

    def finish(self, state: State, error: Exception | None = None) -> None:
        """End the session in a state, and write it; error: what made it fail."""
        self.session |= {"state": state, "finished": _now()}
        if error is not None:
            self.session["error"] = f"{type(error).__name__}: {error}"
        self.write_record()


@contextmanager
def open_folder(
    folder: Path, identity: Identity, *, announce: Callable[[str], None] = lambda text: None
) -> Iterator[RunFolder]:
    """Hold a run's folder for this process, log to its run.log, and end its session however the work ends.

    A session that is just left is finished; left by an error it has failed, by any other exception it was
    stopped. Raises InUse where another process holds the folder, InputError where it belongs to another run,
    naming every difference with both values.
    """
    with locked(folder):
        earlier = _earlier_record(folder, identity, announce)
        if earlier is not None:
            _refuse_differences(folder, Identity.model_validate(earlier["identity"]), identity)
        with _logged(folder):
            opened = RunFolder(folder, identity, earlier)
            announce(f"run folder {folder}")
            _clear_leftovers(folder)
            try:
                yield opened
            except BaseException as error:
                if opened.session:
                    # What ended the work is what is to be told, not that the disk is full.
                    with suppress(OSError):
                        if isinstance(error, Exception):
                            opened.finish("failed", error)
                        else:
                            opened.finish("stopped")
                raise
            if opened.session.get("state") == "running":
                opened.finish("finished")


def _earlier_record(
    folder: Path, identity: Identity, announce: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return what earlier sessions recorded, None where there is none.

    A damaged record is set aside where parts of the folder are this run's, which goes on from them; else the
    folder may be another run's, and RecordDamaged is raised.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return None
    try:
        return run_record(folder)
    except RecordDamaged as error:
        if not parts_of(folder, identity).holds_any():
            raise InputError(
                f"{path} is damaged, and no finished part says that the folder is this run's; choose another "
                "--out"
            ) from error
        kept = set_aside(path)
        announce(f"warning: {path} was damaged; it is set aside as {kept.name}, the finished parts are used")
        return None


def _clear_leftovers(folder: Path) -> None:
    """Delete what processes left that were killed; the lock says that nobody uses it."""
    for leftover in (folder / "parts").glob("residuals-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # No other folders within: --store-dir and --masks-dir may lie there, which other runs write into too.
    for place in (folder, *(folder / name for name in OWN_FOLDERS)):
        clear_partials(place, held=True)


def state_of(folder: Path, record: Mapping[str, Any]) -> State:
    """Return a run's state: what its record says, or that it was cut off, where that says that it is at work
    and nobody holds its lock.
    """
    state: State = record["state"]
    return "cut off" if state == "running" and not is_in_use(folder) else state


class _Visible(logging.Formatter):
    """Lines that a terminal can show, whatever the names in them hold."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line."""
        return visible(super().format(record))


class _LogFile(logging.FileHandler):
    """A log that takes what its disk takes: what matters is written by who says so where it fails."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Close the file, whatever was not written yet."""
        with suppress(OSError):
            super().close()


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Append what happens to run.log, with times in UTC."""
    handler = _LogFile(folder / LOG_FILE, encoding="utf-8", errors="backslashreplace")
    formatter = _Visible("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.info("started: %s", shell_command(["lowmem-icl", *sys.argv[1:]]))
    try:
        yield
        logger.info("finished")
    except BaseException as error:
        logger.info("ended early: %s %s", type(error).__name__, error)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    own = {"lowmem_icl": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


def _total_stages(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what every stage took in all sessions together."""
    totals: dict[str, StageActuals] = {}
    for session in sessions:
        for name, values in session["stages"].items():
            actuals = StageActuals.model_validate(values)
            totals[name] = totals[name] + actuals if name in totals else actuals
    return {name: total.model_dump() for name, total in totals.items()}


def _describe_model(prepared: "Prepared") -> dict[str, Any]:
    manifest = prepared.store.manifest
    return {
        **prepared.mask_model.model_dump(),
        "width": prepared.store.skeleton.width,
        "weights": manifest.weights,
        "store": str(prepared.store.folder),
        "quantisation": manifest.source.quantisation,
        "prompts": prepared.text_form.as_record(),
        "outliers": manifest.outliers.model_dump() if manifest.outliers else None,
    }


def _describe_tasks(prepared: "Prepared") -> list[dict[str, Any]]:
    return [
        {
            "task": task.task,
            "shots": task.shots,
            "split": task.split,
            "documents": len(task.documents),
            "train_documents": len(train.documents),
            "metric": task.metric,
            "chance": task.chance,
            "majority": task.majority,
        }
        for task, train in zip(prepared.evaluate, prepared.train, strict=True)
    ]
