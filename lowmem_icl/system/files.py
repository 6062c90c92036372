"""Files that are whole or absent (written to a temporary file, then renamed), and the disks they are on."""

import errno
import glob
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LONGEST_STEM_BYTES = 200
"""Of a file's name that a temporary file's repeats; what it adds then fits into 255 bytes too."""
PARTIAL = ".partial"
TRIED = "tried"
"""What a file is called that is written to see what a folder's disk does."""
OLDEST_PARTIAL_SECONDS = 24 * 3600
"""Of a temporary file of processes that cannot be seen from here: nobody writes it any more."""


def _processes_of() -> str:
    """Return a name of the machine and of the processes that a number of one is of: containers may share the
    former and not the latter.
    """
    try:
        numbered = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbered = ""
    return hashlib.sha256(f"{platform.node()}{numbered}".encode()).hexdigest()[:8]


_HOST = _processes_of()


class NotWritten(OSError):
    """A file or folder cannot be written; `filename` is the one that was wanted, not a temporary one."""


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """Raise errors of the disk as NotWritten, naming this path, unless they name another file."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        if error.filename is not None and not _is_beside(error.filename, path):
            raise
        raise NotWritten(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def _is_beside(named: object, path: Path) -> bool:
    """Tell whether a name is of a path, of what is within it, of a folder it is in, or of its temporary."""
    if not isinstance(named, str | bytes):
        return True
    found, wanted = Path(os.fsdecode(named)), path
    return is_partial(found) or found == wanted or found in wanted.parents or wanted in found.parents


def try_writing(folder: Path) -> None:
    """Write a byte where a folder is or will be, and take it away again; raise NotWritten where it fails."""
    with writes(folder):
        place = existing_folder(folder)
        # What others tried here who died at it.
        _clear(found for found in place.glob(f".*{PARTIAL}") if is_partial(found, TRIED))
        with unnamed_file(place / TRIED) as tried:
            tried.write(b"x")
            tried.flush()


def unnamed_file(path: Path) -> IO[bytes]:
    """Return a file on the disk of a path that goes when it is closed; where the disk knows only files with a
    name, that is a temporary one's.
    """
    return tempfile.TemporaryFile(dir=path.parent, prefix=".", suffix=partial_path(path).name)


@contextmanager
def atomic_path(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on any error.

    Without `sync` a power cut may leave a broken file: for what is checked when it is read, and can be made
    again.
    """
    temporary = partial_path(path)
    with writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path.parent.glob(f"{glob.escape(_name_of_partials(path))}*{PARTIAL}"))
        try:
            yield temporary
            if sync:
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
            os.replace(temporary, path)
        except BaseException:
            # What went wrong is what is to be told.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def partial_path(path: Path) -> Path:
    """Return where a file or folder is written before it gets its name: beside it, by machine and process."""
    return path.with_name(f"{_name_of_partials(path)}{_HOST}-{os.getpid()}{PARTIAL}")


def _name_of_partials(path: Path) -> str:
    name = path.name
    if len(os.fsencode(name)) > LONGEST_STEM_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; rename it to `folder` on success, delete it on any error.

    Where another process has made `folder` meanwhile, that one stays.
    """
    temporary = partial_path(folder)
    with writes(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            try:
                os.replace(temporary, folder)
            except OSError:
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_partial(path: Path, *of: str) -> bool:
    """Tell whether a file has the name of one that was being written, beside its place; `of` one of these
    names, where some are given, with or without a random part before it.
    """
    if not of:
        return path.name.startswith(".") and path.name.endswith(PARTIAL)
    names = "|".join(map(re.escape, of))
    return re.fullmatch(rf"(\.\w{{8}})?\.({names})\..+{re.escape(PARTIAL)}", path.name) is not None


def clear_partials(folder: Path, *, held: bool = False, deep: bool = False) -> None:
    """Delete what dead processes were writing into a folder when they ended; what cannot be deleted stays.

    held: this process holds the folder's lock, so that nothing there is anybody's. deep: folders within, too.
    """
    _clear(folder.rglob(f".*{PARTIAL}") if deep else folder.glob(f".*{PARTIAL}"), held=held)


def _clear(found: Iterator[Path], *, held: bool = False) -> None:
    with suppress(OSError):
        for partial in list(found):
            with suppress(OSError):
                if held or _is_abandoned(partial):
                    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _is_abandoned(partial: Path) -> bool:
    """Tell whether the process that a temporary file's name states is dead; of processes that cannot be seen
    from here, and of names without one, age says it.
    """
    host, _, number = partial.name.removesuffix(PARTIAL).rpartition(".")[2].partition("-")
    if host == _HOST and number.isdecimal():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
        except OverflowError:
            # No number of a process.
            pass
        except OSError:
            return False
        else:
            return False
    return time.time() - partial.stat().st_mtime > OLDEST_PARTIAL_SECONDS


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def forget_pages(path: Path) -> None:
    """Ask the kernel to drop a file's pages, so that the next reader gets what the disk has."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def existing_folder(folder: Path) -> Path:
    """Return the absolute path of the folder, or of the nearest above it that exists: on the disk where the
    folder will be.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on or will be on."""
    return shutil.disk_usage(existing_folder(folder)).free
