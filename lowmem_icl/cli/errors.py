"""What becomes of errors and stops on the command line: one line for people, an exit code for scripts."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import typer

from lowmem_icl.errors import LowmemIclError

STOPPED_BY = {signal.SIGINT: 130, signal.SIGTERM: 143}


P = ParamSpec("P")
R = TypeVar("R")


class _Stopped(BaseException):
    """SIGTERM, turned into an exception so that what is being written is cleaned up."""


def _fail(message: str, code: int) -> NoReturn:
    print(f"lowmem-icl: {message}", file=sys.stderr)
    raise typer.Exit(code)


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into one line and their exit code, and a stop into a word on how to go on."""

    @wraps(command)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> R:
        def stop(*_: object) -> NoReturn:
            raise _Stopped

        signal.signal(signal.SIGTERM, stop)
        _quiet_libraries()
        try:
            return command(*arguments, **named)
        except LowmemIclError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(
                "stopped; finished parts are kept, the same command goes on from there",
                STOPPED_BY[signal.SIGINT],
            )
        except _Stopped:
            _fail(
                "stopped; finished parts are kept, the same command goes on from there",
                STOPPED_BY[signal.SIGTERM],
            )
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return wrapped


def _quiet_libraries() -> None:
    """Keep other libraries' notes off the terminal; what concerns the user we say ourselves."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
