"""Errors in Python's words: an option is named as its parameter is, without the dashes of its flag."""

import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from lowmem_icl.errors import LowmemIclError

FLAG = re.compile(r"(?<![\w-])--(?:no-(?=bos\b|label-drops\b))?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")

P = ParamSpec("P")
R = TypeVar("R")


def in_python(text: str) -> str:
    """Return a sentence with the flags of the command line named as parameters."""
    return FLAG.sub(lambda match: match[1].replace("-", "_"), text)


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
            raise type(error)(said) from error

    return called
