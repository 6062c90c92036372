"""Files of a store compared with their digests, once per process; and what is said of one that is damaged."""

import shlex
from pathlib import Path

from lowmem_icl.errors import InputError
from lowmem_icl.model.digests import Digest, digest_of_file

MANIFEST = "manifest.json"
LAYERS = "layers"

FileState = tuple[int, int, int, int, int]
"""Device, number, size, and times of the last change of a file's bytes and of anything about it."""

_trusted: set[tuple[FileState, Digest]] = set()


def state_of(path: Path) -> FileState:
    """Return what changes when a file is written to."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_trusted(state: FileState, digest: Digest) -> bool:
    """Tell whether this process has read a file of this state, and found this digest."""
    return (state, digest) in _trusted


def accept(path: Path, state: FileState, found: Digest, expected: Digest) -> None:
    """Trust a file, whose state was `state` before it was read, if its digest is the expected one; else raise
    InputError.
    """
    if found != expected:
        raise damaged(path, "its bytes differ from the manifest's digest")
    _trusted.add((state, expected))


def check_file(path: Path, expected: Digest) -> None:
    """Compare a file with its digest, unless this process has done so; raise InputError where it differs."""
    try:
        state = state_of(path)
        if not is_trusted(state, expected):
            accept(path, state, digest_of_file(path, expected), expected)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from error


def store_of(path: Path) -> Path:
    """Return the folder of the store that a file is in."""
    inside = path.parent.name in (LAYERS, "tokenizer")
    return path.parent.parent if inside else path.parent


def damaged(path: Path, what: str) -> InputError:
    """Return the error for a file of a store: what is wrong, and the command that mends it."""
    folder = store_of(path)
    # What is not finished is mended by what makes it.
    mend = repair_command(folder) if (folder / MANIFEST).exists() else "convert again"
    return InputError(f"{path}: {what}; {mend}")


def repair_command(folder: Path) -> str:
    """Return the words that tell how a store is mended."""
    return f"mend the store: lowmem-icl convert --repair {shlex.quote(str(folder))}"


def distrust_all() -> None:
    """Forget what this process has found whole, as a new one has."""
    _trusted.clear()
