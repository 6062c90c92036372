"""One process at a time makes a store; another one waits for it, and uses what it has made."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lowmem_icl.errors import InUse
from lowmem_icl.model.store import is_store
from lowmem_icl.system.files import clear_partials, existing_folder, is_partial, writes

LOCK_FILE = "converting.lock"
SECONDS_BETWEEN_TRIES = 0.1
SECONDS_BETWEEN_WORDS = 10.0


@contextmanager
def making_store(
    folder: Path, layers: int, announce: Callable[[str], None], *, waits: bool = True
) -> Iterator[None]:
    """Hold the folder of a store of so many layers while it is made, once nobody else does; where it is
    finished by then, nothing is held. What dead processes were writing there is deleted.

    Says for whom it waits, and how far that is; raises InUse where it `waits` for nobody. Where no store was
    begun, nothing is left.
    """
    before = existing_folder(folder)
    lock = _lock_of(folder, layers, announce, waits)
    if lock is None:
        yield
        return
    with lock:
        clear_partials(folder, held=True, deep=True)
        clear_library_partials(folder)
        try:
            yield
        finally:
            # Still locked: who waits for this lock sees that its file is gone.
            with suppress(OSError):
                (folder / LOCK_FILE).unlink(missing_ok=True)
                for made in (folder, *folder.parents):
                    if made == before:
                        break
                    made.rmdir()


def clear_library_partials(folder: Path) -> None:
    """Delete what earlier versions were writing by safetensors' own writer when they ended."""
    for found in [*folder.glob(".tmp*"), *folder.glob("layers/.tmp*")]:
        with suppress(OSError):
            found.unlink()


def is_of_lock(entry: Path) -> bool:
    """Tell whether an entry of a store's folder is the lock, or was being written by a dead process."""
    return entry.name == LOCK_FILE or is_partial(entry)


def _lock_of(folder: Path, layers: int, announce: Callable[[str], None], waits: bool) -> IO[str] | None:
    """Return the lock file, open and locked; None where the store is finished or its disk takes no locks."""
    path, said, said_at = folder / LOCK_FILE, "", -SECONDS_BETWEEN_WORDS
    while not is_store(folder):
        with writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            word = f"{_holder(lock)}, which makes {folder}: {_layers_of(folder)} of {layers} layers are there"
            lock.close()
            if not waits:
                raise InUse(f"--no-wait: {word}; wait for it or leave --no-wait out") from None
            if word != said and time.monotonic() - said_at >= SECONDS_BETWEEN_WORDS:
                announce(f"waiting for {word}")
                said, said_at = word, time.monotonic()
            time.sleep(SECONDS_BETWEEN_TRIES)
            continue
        except OSError:
            lock.close()
            return None
        if _is_at(lock, path) and not is_store(folder):
            # Only for who waits: a full disk is told of where it matters.
            with suppress(OSError):
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"{os.getpid()}\n".encode())
            return lock
        # Who held it has finished or given up.
        lock.close()
    return None


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return f"process {lock.read(20).strip() or 'unknown'}"


def _layers_of(folder: Path) -> int:
    return sum(1 for _ in folder.glob("layers/*.safetensors"))


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
