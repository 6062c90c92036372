"""Errors in Python's words: an option is named as its parameter is, without the dashes of its flag."""

import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from lowmem_icl import errors
from lowmem_icl.errors import LowmemIclError
from lowmem_icl.options import FLAGS

FLAG = re.compile(r"(?<![\w/.-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
COMMAND = re.compile(r"\b(?:lowmem-icl|lm-eval|pip) [^;`]*")
"""What is to be typed into a shell stays as it is."""
OTHER_PARAMETERS = ("task",)
"""Those that are no options of a run."""

P = ParamSpec("P")
R = TypeVar("R")


def in_python(text: str) -> str:
    """Return a sentence with the flags of the command line named as parameters; `--no-bos` is `bos=False`."""
    pieces, end = [], 0
    for command in COMMAND.finditer(text):
        pieces += [FLAG.sub(_parameter, text[end : command.start()]), command[0]]
        end = command.end()
    return "".join([*pieces, FLAG.sub(_parameter, text[end:])])


def _public_kind(error: LowmemIclError) -> type[LowmemIclError]:
    """Return the kind of an error that users know, which is made of a sentence alone."""
    return next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)


def _parameter(flag: re.Match[str]) -> str:
    name = flag[1].replace("-", "_")
    if name in FLAGS or name in OTHER_PARAMETERS:
        return name
    opposite = name.removeprefix("no_")
    return f"{opposite}=False" if opposite in FLAGS else flag[0]


def python_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Raise a function's errors, of the same class, in Python's words."""

    @wraps(function)
    def called(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except LowmemIclError as error:
            said = in_python(str(error))
            if said == str(error):
                raise
            raise _public_kind(error)(said) from error

    return called
