"""What becomes of errors and stops on the command line: one line for people, an exit code for scripts."""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import typer

from lowmem_icl.errors import InputError, LowmemIclError

STOPPED_BY = {signal.SIGINT: 130, signal.SIGTERM: 143}
CONTINUES = "; finished parts are kept, and the same command continues from there"

P = ParamSpec("P")
R = TypeVar("R")


class _Stopped(BaseException):
    """SIGTERM, turned into an exception so that what is being written is cleaned up."""


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors and stops of a command into one line and their exit code."""
    return _reporting(command, "stopped")


def reports_errors_and_continues(command: Callable[P, R]) -> Callable[P, R]:
    """As `reports_errors`, for commands that continue where they were stopped: the line says so."""
    return _reporting(command, f"stopped{CONTINUES}")


def _reporting(command: Callable[P, R], stopped: str) -> Callable[P, R]:
    @wraps(command)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> R:
        _quiet_libraries()
        _print_any_name()
        try:
            with _sigterm_raises():
                return command(*arguments, **named)
        except LowmemIclError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(stopped, STOPPED_BY[signal.SIGINT])
        except _Stopped:
            _fail(stopped, STOPPED_BY[signal.SIGTERM])
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return wrapped


@contextmanager
def names_argument(flag: str, argument: str) -> Iterator[None]:
    """Raise errors about a flag as being about the argument that a command takes in its place."""
    try:
        yield
    except InputError as error:
        named = str(error)
        if not named.startswith((f"{flag}:", f"{flag} ")):
            raise
        raise InputError(argument + named.removeprefix(flag)) from error


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def stop(*_: object) -> NoReturn:
        raise _Stopped

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _fail(message: str, code: int) -> NoReturn:
    print("lowmem-icl: " + message.replace("\n", " "), file=sys.stderr)
    raise typer.Exit(code)


def _print_any_name() -> None:
    """Let stdout print names of files that are not UTF-8, escaped, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Keep other libraries' notes off the terminal; what concerns the user we say ourselves."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
