"""One process at a time in a folder: its lock, which goes where no session begins."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lowmem_icl.errors import InputError, InUse
from lowmem_icl.session.record import RUN_FILE
from lowmem_icl.system.files import existing_folder

LOCK_FILE = ".lock"
LOG_FILE = "run.log"
TRIES_TO_LOCK = 3
SECONDS_BETWEEN_TRIES = 0.05


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
def locked(folder: Path) -> Iterator[None]:
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
