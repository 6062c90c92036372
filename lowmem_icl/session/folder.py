"""A run's folder: who may work in it, its log, and run.json, where every session leaves a record."""

import datetime
import fcntl
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import ValidationError

from lowmem_icl import __version__
from lowmem_icl.errors import InputError, InUse
from lowmem_icl.options import RunOptions, shell_command
from lowmem_icl.session.identity import Identity, run_folder
from lowmem_icl.session.parts import Parts
from lowmem_icl.session.run_form import RUN_FORMAT, RunRecord, StageActuals, State
from lowmem_icl.system.files import existing_folder, write_text_atomic
from lowmem_icl.system.machine import describe_machine, device_type, peak_resident_bytes, resolved_device

if TYPE_CHECKING:
    from lowmem_icl.session.prepare import Prepared

logger = logging.getLogger("lowmem_icl")

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
LOG_FILE = "run.log"
TRIES_TO_LOCK = 3
SECONDS_BETWEEN_TRIES = 0.05
PACKAGES = ("torch", "transformers", "bitsandbytes", "optimum", "accelerate", "lm_eval", "polars", "numpy")


def run_record(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's run.json; raise InputError where there is none or it is malformed."""
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no run; give a run folder") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a run folder") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); {_REMEDY}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, str) and found.startswith("lowmem-icl-run/") and found != RUN_FORMAT:
        raise InputError(
            f"{path}: a run in another version's form ({found}, this one has {RUN_FORMAT}); read it with "
            "that version, or run again with another --out"
        )
    try:
        RunRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"]) or "content"
        raise InputError(f"{path}: {field_name}: {first['msg']}; {_REMEDY}") from error
    return dict(content)


_REMEDY = "put back the file as the run wrote it, or run again with another --out"


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
        earlier = Identity.model_validate(run_record(folder)["identity"])
        known = {
            "options": options.identity_values,
            "device": device_type(options.device),
            "version": __version__,
        }
        _refuse_differences(folder, earlier, earlier.model_copy(update=known))
    # A script may have begun to log what is printed there.
    elif folder.is_dir() and any(
        entry.suffix != ".log" for entry in folder.iterdir() if entry.name != LOCK_FILE
    ):
        raise InputError(f"--out {folder} is not empty and holds no run; choose another folder")
    return folder


def parts_of(folder: Path) -> Parts:
    """Return the finished pieces of a run's work, none where it was not begun."""
    return Parts(folder / "parts")


def _check_writable(flag: str, folder: Path) -> None:
    try:
        existing = existing_folder(folder)
        if not existing.is_dir():
            raise InputError(f"{flag} {folder}: {existing} is a file; give a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"{flag} {folder}: {existing} cannot be written to; choose another folder")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{flag} {folder}: {reason}; choose another folder") from error


def _refuse_differences(folder: Path, earlier: Identity, identity: Identity) -> None:
    differences = identity.differences(earlier)
    if differences:
        raise InputError(f"--out {folder} holds another run: {'; '.join(differences)}; choose another --out")


class RunFolder:
    """The folder of a run that this process works in.

    record: the content of run.json; session: this start's record in it; parts: the finished pieces of work;
    estimate: asked at every writing how many seconds the run will still take, where anybody knows.
    Nothing is written before `begin`, so that a start which comes to nothing leaves what there was.
    """

    def __init__(self, path: Path, identity: Identity, earlier: dict[str, Any] | None) -> None:
        self.path = path
        self.parts = parts_of(path)
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
        write_text_atomic(self.path / RUN_FILE, json.dumps(self.record, indent=1) + "\n")

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
    with _locked(folder):
        earlier = run_record(folder) if (folder / RUN_FILE).exists() else None
        if earlier is not None:
            _refuse_differences(folder, Identity.model_validate(earlier["identity"]), identity)
        with _logged(folder):
            opened = RunFolder(folder, identity, earlier)
            announce(f"run folder {folder}")
            # Left by a process that was killed; the lock says that nobody uses them.
            for leftover in opened.parts.folder.glob("residuals-*"):
                shutil.rmtree(leftover, ignore_errors=True)
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


def is_in_use(folder: Path) -> bool:
    """Tell whether a process holds a run's folder."""
    try:
        with (folder / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # No lock file, or a disk without locks, where no run can be.
        return False
    return False


def state_of(folder: Path, record: Mapping[str, Any]) -> State:
    """Return a run's state: what its record says, or that it was cut off, where that says that it is at work
    and nobody holds its lock.
    """
    state: State = record["state"]
    return "cut off" if state == "running" and not is_in_use(folder) else state


def _take(lock: IO[str]) -> None:
    """Lock a file, or raise BlockingIOError: who only looks whether it is in use holds it for a moment."""
    for _ in range(TRIES_TO_LOCK):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(SECONDS_BETWEEN_TRIES)
        else:
            return
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, making it where it is not there yet; where no session begins in it,
    nothing is left of that.
    """
    before, had_log = existing_folder(folder), (folder / LOG_FILE).exists()
    with _lock_of(folder):
        try:
            yield
        finally:
            if not (folder / RUN_FILE).exists():
                # Still locked: who waits for this lock sees that its file is gone.
                with suppress(OSError):
                    (folder / LOCK_FILE).unlink()
                    if not had_log:
                        (folder / LOG_FILE).unlink(missing_ok=True)
                    for made in (folder, *folder.parents):
                        if made == before:
                            break
                        made.rmdir()


def _lock_of(folder: Path) -> IO[str]:
    """Return the lock file of a folder, open and locked."""
    for _ in range(TRIES_TO_LOCK):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / LOCK_FILE).open("w")
        except OSError as error:
            raise InputError(f"--out {folder}: {error.strerror}; choose another folder") from error
        try:
            _take(lock)
            if _is_at(lock, folder / LOCK_FILE):
                return lock
        except BlockingIOError as error:
            lock.close()
            raise _in_use(folder) from error
        except OSError as error:
            lock.close()
            raise InputError(f"--out {folder}: its disk takes no locks ({error.strerror})") from error
        # Another start that came to nothing has deleted it meanwhile.
        lock.close()
    raise _in_use(folder)


def _in_use(folder: Path) -> InUse:
    return InUse(f"{folder} is in use by another process; wait for it or choose another --out")


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Append what happens to run.log, with times in UTC."""
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8", errors="backslashreplace")
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
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
