"""One process at a time in a run's folder: its lock, which goes where no session begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lowmem_icl.errors import InputError, InUse
from lowmem_icl.session.record import RUN_FILE
from lowmem_icl.system.folder_lock import FolderLock, NoLocks

LOCK_FILE = ".lock"
LOG_FILE = "run.log"


def is_in_use(folder: Path) -> bool:
    """Tell whether a process holds a run's folder."""
    return FolderLock(folder, LOCK_FILE).is_taken()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, making it where it is not there yet; where no session begins in it,
    nothing is left of that.
    """
    lock, had_log = FolderLock(folder, LOCK_FILE), (folder / LOG_FILE).exists()
    record, log = (lock.path.with_name(name) for name in (RUN_FILE, LOG_FILE))
    with _taken(lock, folder):
        try:
            yield
        finally:
            if not record.exists():
                lock.remove(*([] if had_log else [log]))


def _taken(lock: FolderLock, folder: Path) -> IO[str]:
    """Return the lock file of a folder, open and locked."""
    try:
        return lock.take()
    except BlockingIOError as error:
        raise InUse(f"{folder} is in use by another process; wait for it or choose another --out") from error
    except NoLocks as error:
        raise InputError(f"--out {folder}: its disk takes no locks ({error.strerror})") from error
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}; choose another folder") from error
