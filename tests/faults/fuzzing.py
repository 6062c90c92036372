"""One input after another under one rule: taken, or refused in a short line that names it, within seconds;
nothing is written outside of the folder that is given.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lowmem_icl.errors import LowmemIclError
from lowmem_icl.system.visible import visible_line

LONGEST_SECONDS = 5.0
"""Of this process at work."""
LONGEST_WAIT = 20.0
"""By the clock: others may use the machine too."""
LONGEST_MESSAGE = 2_100
SHARE_OF_EACH = 0.02
"""Of generated inputs at least so many are taken, and as many refused: the grammar reaches both."""


@dataclass(frozen=True)
class Form:
    """A form of input: `write` puts a generated one into a folder and returns the file or folder that the
    tool is given, `place` puts given bytes there; `read` is the tool's own reading of it.

    names: what a refusal has to name at least one of, besides the path's own name.
    """

    write: Callable[[random.Random, Path], Path]
    read: Callable[[Path], Any]
    place: Callable[[bytes, Path], Path] | None = None
    names: tuple[str, ...] = ()


class TookTooLong(BaseException):
    """An input was at work for longer than anybody waits."""


class WroteOutside(BaseException):
    """Something was written where nothing was to be written."""


@dataclass
class Found:
    """What became of inputs."""

    counts: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0


_WRITING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_allowed: list[Path] = []
_written_outside: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what this process writes outside of the allowed folders, while there are any."""
    if not _allowed:
        return
    if event == "open":
        path, mode, flags = arguments
        is_writing = any(sign in (mode or "") for sign in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        paths = [path] if is_writing else []
    else:
        paths = [each for each in arguments[:2] if isinstance(each, str | bytes | os.PathLike)]
        paths = paths if event in _WRITING else []
    for path in paths:
        if isinstance(path, int) or os.fsdecode(path) == os.devnull:
            continue
        place = Path(os.path.abspath(os.fsdecode(path)))
        if not any(place.is_relative_to(folder) for folder in _allowed):
            _written_outside.append(f"{event} {str(place)[:300]}")


sys.addaudithook(_watch)


@contextmanager
def writing_only_in(*folders: Path) -> Iterator[None]:
    """Raise WroteOutside at the end where this process wrote elsewhere."""
    _written_outside.clear()
    _allowed[:] = folders
    try:
        yield
    finally:
        _allowed.clear()
    if _written_outside:
        raise WroteOutside("; ".join(_written_outside))


@contextmanager
def within_seconds(seconds: float) -> Iterator[None]:
    """Raise TookTooLong where it takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_taken(form: Form, path: Path, *writable: Path) -> bool:
    """Read an input and tell whether it was taken, not refused; raise AssertionError where it breaks the
    rule.

    writable: folders that may be written to.
    """
    began = time.process_time()
    try:
        with writing_only_in(*writable, path.parent), within_seconds(LONGEST_WAIT):
            try:
                form.read(path)
            finally:
                if time.process_time() - began > LONGEST_SECONDS:
                    raise TookTooLong(f"{time.process_time() - began:.1f} s of work")
    except LowmemIclError as error:
        told = visible_line(str(error))
        assert told
        assert "\n" not in told, told
        assert len(told) < LONGEST_MESSAGE, f"{len(told)} characters: {told}"
        assert any(name in told for name in (*form.names, path.name, visible_line(path.name))), told
        return False
    return True


def tried(form: Form, name: str, seeds: range, folder: Path, *writable: Path) -> Found:
    """Generate inputs, read each, and return how many were taken and refused and the longest time.

    Raises AssertionError with the seed of the first that breaks the rule.
    """
    found = Found()
    for seed in seeds:
        path = form.write(random.Random(f"{name} {seed}"), folder)
        began = time.monotonic()
        try:
            taken = is_taken(form, path, *writable)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            raise AssertionError(
                f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:3000]}"
            ) from error
        found.counts["taken" if taken else "refused"] += 1
        found.longest = max(found.longest, time.monotonic() - began)
    return found
