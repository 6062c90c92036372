"""Keeps off the terminal what some threads print: trackers tell people who and where they are."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

_muted: set[int] = set()


class _WithoutMuted:
    """A stream that takes what the muted threads write and drops it; all else goes on to `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        return len(text) if threading.get_ident() in _muted else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def streams_without_muted() -> Iterator[None]:
    """Let nothing of what muted threads print reach stdout and stderr."""
    stdout: Any = _WithoutMuted(sys.stdout)
    stderr: Any = _WithoutMuted(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield


@contextlib.contextmanager
def this_thread_muted() -> Iterator[None]:
    """Mute the thread that this is entered in."""
    _muted.add(threading.get_ident())
    try:
        yield
    finally:
        _muted.discard(threading.get_ident())
