"""Stops by Ctrl-C and SIGTERM, from the first instruction to the last: one line, and the exit code that says
which of them it was. Imports nothing heavy, since it is in force before anything else is imported.
"""

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOPPED_BY = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stopped(BaseException):
    """SIGTERM, turned into an exception so that what is being written is cleaned up."""


def end_at_once() -> None:
    """Have a signal end the process at once: before a command is at work and after it, nothing is lost."""
    for number in STOPPED_BY:
        signal.signal(number, _end)
    # Registered first, so called last: all is done and said. Python takes its own handlers away after that,
    # and a signal would end the process by itself, whichever thread met it.
    atexit.register(_ignore)


def _ignore() -> None:
    for number in STOPPED_BY:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"lowmem-icl: stopped\n")
    os._exit(STOPPED_BY[signal.Signals(number)])


@contextmanager
def raised(received: list[int]) -> Iterator[None]:
    """Have signals raise KeyboardInterrupt and Stopped, every one anew, and note the exit codes they ask for:
    other code may turn what is raised into errors of its own.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        received.append(STOPPED_BY[signal.Signals(number)])
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    earlier = {number: signal.signal(number, stop) for number in STOPPED_BY}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
