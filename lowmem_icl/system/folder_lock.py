"""One process at a time in a folder: a lock file, which goes with the folders that were made for it."""

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from lowmem_icl.system.files import existing_folder

TRIES = 3
SECONDS_BETWEEN_TRIES = 0.05


class NoLocks(OSError):
    """The disk of a folder takes no locks."""


class FolderLock:
    """The lock file `name` of a folder that is there or will be; what was there before it stays there."""

    def __init__(self, folder: Path, name: str) -> None:
        # Where this process works may change while it holds the folder.
        self.path = folder.absolute() / name
        self._before = self.path.parent

    def take(self) -> IO[str]:
        """Return the lock file, open and locked, its folder made where it is not there: closing it lets go.

        Raises BlockingIOError where another process holds it, NoLocks, or another OSError where it cannot be
        opened.
        """
        for left in reversed(range(TRIES)):
            try:
                return self._take()
            except (BlockingIOError, FileNotFoundError, FileExistsError):
                # Who only looks holds it for a moment, and who comes to nothing removes the folder again.
                if not left:
                    raise
            time.sleep(SECONDS_BETWEEN_TRIES)
        raise AssertionError("the last try returns or raises")

    def _take(self) -> IO[str]:
        # Another process may have made and removed it between two tries.
        self._before = min(self._before, existing_folder(self.path.parent), key=lambda path: len(path.parts))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.open("a+", encoding="utf-8")
        try:
            _lock(lock)
            if _is_at(lock, self.path):
                return lock
            # Who held it has deleted it meanwhile.
            raise BlockingIOError(errno.EAGAIN, "another process has just left", str(self.path))
        except BaseException:
            lock.close()
            raise

    def remove(self, *besides: Path) -> None:
        """Delete the lock file, files besides it, and the folders that were made, as far as they are empty.

        Called while it is still held: who waits for it sees that its file is gone.
        """
        with suppress(OSError):
            for path in (self.path, *besides):
                path.unlink(missing_ok=True)
            for made in self.path.parents:
                if made == self._before:
                    break
                made.rmdir()

    def is_taken(self) -> bool:
        """Tell whether a process holds it."""
        try:
            with self.path.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            # No lock file, or a disk without locks, where nobody can hold one.
            return False
        return False


def _lock(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise NoLocks(error.errno, error.strerror) from error


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
