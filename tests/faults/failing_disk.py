"""A disk that fails, fills up, or on which the process dies, at the n-th thing that is asked of it.

Counted are, below one folder: opening for writing, making folders, writing, syncing, renaming and deleting,
by Python's own files; and what `shutil` copies past them. Or, where reading is to fail: opening for reading
and reading.
"""

import builtins
import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

HALF = 2
READING = ("unreadable", "short")
NO_PROCESS = 2**30


class Killed(BaseException):
    """The process ended here, as by kill -9: nothing after it happens, no cleaning up either."""


class Short(BaseException):
    """Half of what is read next is to come."""


class FailingDisk:
    """The things asked of it so far, by name, and which of them fails.

    fails_at: its number, from 0; how: "full" (that and every later one that takes room), "broken" (that one,
    once) or "killed" (that and everything later); "unreadable" (that reading, once) or "short" (that reading
    gives half of what was asked for).
    """

    def __init__(self, root: Path, fails_at: int | None = None, how: str = "full") -> None:
        self.root, self.fails_at, self.how = str(root), fails_at, how
        self.asked: list[str] = []

    @property
    def has_failed(self) -> bool:
        return self.fails_at is not None and len(self.asked) > self.fails_at

    @property
    def of_reading(self) -> bool:
        return self.how in READING

    def ask(self, what: str, path: object, *, takes_room: bool = True) -> None:
        """Count a thing, and raise what it fails with."""
        if not self.concerns(path) or self.of_reading != (what in ("read", "open to read")):
            return
        number = len(self.asked)
        if self.how != "killed" and not takes_room:
            return
        self.asked.append(f"{what} {os.fsdecode(path)[len(self.root) :]}")  # type: ignore[arg-type]
        if self.fails_at is None or number < self.fails_at:
            return
        if self.how == "killed":
            raise Killed(self.asked[-1])
        if self.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number == self.fails_at and self.how == "short":
            raise Short
        if number == self.fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def concerns(self, path: object) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.root)


class _RawFile(io.FileIO):
    """A file whose writes are asked for, and of which half is written where that fails."""

    def __init__(self, disk: FailingDisk, path: Any, mode: str, opener: Any) -> None:
        self._disk, self._path = disk, path
        super().__init__(path, mode, opener=opener)

    def write(self, content: Any) -> int:
        dead = self._disk.has_failed
        try:
            self._disk.ask("write", self._path)
        except BaseException:
            if not dead:
                super().write(memoryview(content).cast("B")[: len(memoryview(content).cast("B")) // HALF])
            raise
        return super().write(content)

    def readinto(self, buffer: Any) -> int:
        try:
            self._disk.ask("read", self._path)
        except Short:
            whole = memoryview(buffer).cast("B")
            return super().readinto(whole[: max(1, len(whole) // HALF)])
        return super().readinto(buffer)

    def readall(self) -> bytes:
        # Which asks again until all is there.
        with suppress(Short):
            self._disk.ask("read", self._path)
        return super().readall()


def _open(disk: FailingDisk, real: Callable[..., Any]) -> Callable[..., Any]:
    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        *texts: Any,
        opener: Any = None,
        **named_texts: Any,
    ) -> Any:
        if not disk.concerns(file) or disk.of_reading == bool(set(mode) & set("wxa+")):
            return real(file, mode, buffering, *texts, opener=opener, **named_texts)
        with suppress(Short):
            disk.ask("open to read" if disk.of_reading else "open", file)
        raw = _RawFile(disk, file, mode.replace("b", "").replace("t", ""), opener)
        if buffering == 0:
            return raw
        kind = io.BufferedReader if disk.of_reading else io.BufferedWriter
        buffered = (io.BufferedRandom if "+" in mode else kind)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *texts, **named_texts)

    return opened


@contextmanager
def failing(disk: FailingDisk) -> Iterator[FailingDisk]:
    """Let everything below the disk's folder go through it."""

    def named(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def asking(what: str, real: Callable[..., Any], *, takes_room: bool = True) -> Callable[..., Any]:
        def call(first: Any, *others: Any, **named_others: Any) -> Any:
            asked_of = first
            if isinstance(first, int) or named_others.get("dir_fd") is not None:
                # Of rmtree, by descriptors.
                asked_of = named(first if isinstance(first, int) else named_others["dir_fd"])
            disk.ask(what, asked_of, takes_room=takes_room)
            return real(first, *others, **named_others)

        return call

    real_preadv = os.preadv

    def read_at(descriptor: int, buffers: list[Any], *others: Any) -> int:
        try:
            disk.ask("read", named(descriptor))
        except Short:
            whole = memoryview(buffers[0]).cast("B")
            return real_preadv(descriptor, [whole[: max(1, len(whole) // HALF)]], *others)
        return real_preadv(descriptor, buffers, *others)

    with pytest.MonkeyPatch.context() as patch:
        real_open = io.open
        patch.setattr(os, "preadv", read_at)
        for module in (builtins, io):
            patch.setattr(module, "open", _open(disk, real_open))
        patch.setattr(os, "fsync", asking("fsync", os.fsync))
        patch.setattr(os, "sendfile", asking("copy", os.sendfile))
        patch.setattr(os, "replace", asking("rename", os.replace))
        patch.setattr(os, "rename", asking("rename", os.rename))
        patch.setattr(os, "mkdir", asking("mkdir", os.mkdir))
        for name in ("unlink", "remove", "rmdir"):
            patch.setattr(os, name, asking("unlink", getattr(os, name), takes_room=False))
        if disk.how == "killed":
            patch.setattr(psutil, "Process", partial(psutil.Process, os.getpid()))
            patch.setattr(os, "getpid", lambda: NO_PROCESS)
        # Of what is never named there is nothing that could be left.
        patch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
        yield disk


def points(asked: list[str]) -> list[int]:
    """Return the numbers of all things asked of a disk; of writes in a row the first and last."""
    return [
        number
        for number, thing in enumerate(asked)
        if not (0 < number < len(asked) - 1 and asked[number - 1] == thing == asked[number + 1])
    ]
