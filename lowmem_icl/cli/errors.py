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

from lowmem_icl.cli.echo import complain
from lowmem_icl.cli.stops import STOPPED_BY, raised
from lowmem_icl.errors import DoesNotFit, InputError, LowmemIclError, from_os_error
from lowmem_icl.system.memory import check_room_for_libraries, ran_out_of_memory

CONTINUES = "; finished parts are kept, and the same command continues from there"

NO_MORE_MEMORY = (
    "the system gave no more memory; give a smaller --memory, or allow this process more (ulimit, container)"
)

P = ParamSpec("P")
R = TypeVar("R")


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
        received: list[int] = []
        try:
            check_room_for_libraries()
            with raised(received):
                return command(*arguments, **named)
        except typer.Exit:
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except BaseException as error:
            if received or isinstance(error, KeyboardInterrupt):
                # Whatever became of it on the way.
                _fail(stopped, received[0] if received else STOPPED_BY[signal.SIGINT])
            if isinstance(error, LowmemIclError):
                _fail(str(error), error.exit_code)
            if isinstance(error, OSError):
                told = from_os_error(error)
                _fail(str(told), told.exit_code)
            if ran_out_of_memory(error):
                _fail(NO_MORE_MEMORY, DoesNotFit.exit_code)
            if isinstance(error, EOFError):
                # Ours; typer takes it for a user who ended the input.
                raise RuntimeError(str(error)) from error
            raise

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


def _fail(message: str, code: int) -> NoReturn:
    complain(message)
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
