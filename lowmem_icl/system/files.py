"""Files that are whole or absent (written to a temporary file, then renamed), and the disks they are on."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_STEM_BYTES = 220
"""Of a file's name that a temporary file's repeats; what it adds then fits into 255 bytes too."""


@contextmanager
def atomic_path(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on any error.

    Without `sync` a power cut may leave a broken file: for what is checked when it is read, and can be made
    again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if len(os.fsencode(name)) > LONGEST_STEM_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    temporary = path.with_name(f".{name}.{os.getpid()}.partial")
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; rename it to `folder` on success, delete it on any error.

    Where another process has made `folder` meanwhile, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name[:LONGEST_STEM_BYTES]}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if not folder.exists():
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_partial(path: Path) -> bool:
    """Tell whether a file has the name of one that was being written, beside its place."""
    return path.name.startswith(".") and path.name.endswith(".partial")


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
    """Return the folder, or the nearest above it that exists: on the disk where the folder will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return folder


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on or will be on."""
    return shutil.disk_usage(existing_folder(folder)).free
