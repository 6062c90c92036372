"""One process at a time makes a store; another one waits for it, and uses what it has made."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lowmem_icl.errors import InUse
from lowmem_icl.model.integrity import LAYERS
from lowmem_icl.model.store import is_store
from lowmem_icl.system.files import TRIED, clear_partials, is_partial, writes
from lowmem_icl.system.folder_lock import FolderLock, NoLocks

LOCK_FILE = "converting.lock"
CLAIM_FILE = "converting.json"
SECONDS_BETWEEN_TRIES = 0.1
SECONDS_BETWEEN_WORDS = 10.0


@contextmanager
def making_store(
    folder: Path, layers: int, announce: Callable[[str], None], *, waits: bool = True
) -> Iterator[None]:
    """Hold the folder of a store of so many layers while it is made, once nobody else does; where it is
    finished by then, nothing is held. What dead processes were writing of a store there is deleted.

    Says for whom it waits, and how far that is; raises InUse where it `waits` for nobody. Where no store was
    begun, nothing is left.
    """
    lock = FolderLock(folder, LOCK_FILE)
    held = _taken(lock, folder, layers, announce, waits)
    if held is None:
        yield
        return
    with held:
        if (folder / CLAIM_FILE).is_file() or all(map(is_of_lock, folder.iterdir())):
            _clear_leftovers(folder)
        try:
            yield
        finally:
            lock.remove()


def clear_dead_lock(folder: Path) -> None:
    """Delete what a process left of its hold that was killed when its store was finished."""
    lock = FolderLock(folder, LOCK_FILE)
    if lock.path.exists() or (folder / CLAIM_FILE).exists():
        with suppress(OSError), lock.take():
            lock.remove(folder / CLAIM_FILE)


def is_of_lock(entry: Path) -> bool:
    """Tell whether an entry of a store's folder may be there before a conversion has claimed it: the lock, or
    what a dead process was writing by then.
    """
    return entry.name == LOCK_FILE or is_partial(entry, CLAIM_FILE, TRIED)


def _clear_leftovers(folder: Path) -> None:
    """Delete what dead processes were writing where a store's files go; nobody else's folder is touched."""
    for place in (folder, folder / LAYERS, folder / "tokenizer"):
        clear_partials(place, held=True)
        # By safetensors' own writer, in earlier versions.
        for found in place.glob(".tmp*"):
            with suppress(OSError):
                found.unlink()


def _taken(
    lock: FolderLock, folder: Path, layers: int, announce: Callable[[str], None], waits: bool
) -> IO[str] | None:
    """Return the lock file, open and locked; None where the store is finished or its disk takes no locks."""
    said, said_at = "", -SECONDS_BETWEEN_WORDS
    while not is_store(folder):
        try:
            held = lock.take()
        except NoLocks:
            return None
        except BlockingIOError:
            there = f"{_layers_of(folder)} of {layers} layers are there"
            word = f"{_holder(lock.path)}, which makes {folder}: {there}"
            if not waits:
                raise InUse(f"--no-wait: {word}; wait for it or leave --no-wait out") from None
            if word != said and time.monotonic() - said_at >= SECONDS_BETWEEN_WORDS:
                announce(f"waiting for {word}")
                said, said_at = word, time.monotonic()
            time.sleep(SECONDS_BETWEEN_TRIES)
            continue
        except OSError:
            with writes(folder):
                raise
        if not is_store(folder):
            # Only for who waits: a full disk is told of where it matters.
            with suppress(OSError):
                os.ftruncate(held.fileno(), 0)
                os.write(held.fileno(), f"{os.getpid()}\n".encode())
            return held
        # Who held it has finished; this file was made after that one went.
        with held:
            lock.remove()
    return None


def _holder(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as lock:
            return f"process {lock.read(20).strip() or 'unknown'}"
    except OSError:
        return "another process"


def _layers_of(folder: Path) -> int:
    return sum(1 for _ in folder.glob(f"{LAYERS}/*.safetensors"))
