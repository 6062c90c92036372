"""What values options take: how they are read, checked and put in words, wherever they were given."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
              "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip

# Nobody gives so few bytes: gigabytes are meant.
LEAST_WITHOUT_UNIT = 10**6

LONGEST_SHOWN = 80


@dataclass(frozen=True)
class Form:
    """What values an option takes: a placeholder, what is expected in words, and any named choices."""

    placeholder: str
    expected: str
    choices: tuple[str, ...] = ()


def parse_size(value: Any) -> Any:
    """Return bytes from a number or a text such as 6GB or 500MiB; other values pass on to be refused."""
    if not isinstance(value, str):
        return value
    text = value.strip().upper()
    digits = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(digits) :].strip()
    try:
        size = int(float(digits) * SIZE_UNITS[unit])
    except (KeyError, OverflowError) as error:
        raise ValueError("not a size") from error
    if not unit and size < LEAST_WITHOUT_UNIT:
        raise ValueError("a unit is missing")
    return size


def shortened(text: str) -> str:
    """Return a text that is shown in an error, cut in the middle where it is very long."""
    half = LONGEST_SHOWN // 2
    return text if len(text) <= 2 * LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…{text[-half:]}"


def _parse_limit(value: Any) -> Any:
    """Return a fraction of documents for a number below 1; other values pass on to be taken as a count.

    1.0 is refused: all documents to some, one to lm-eval.
    """
    number = value
    if isinstance(value, str) and not value.strip().isdecimal():
        try:
            number = float(value)
        except ValueError:
            return value
    if not isinstance(number, float) or 0 < number < 1:
        return number
    if not number.is_integer() or number <= 1:
        raise ValueError("neither a count nor a fraction")
    return int(number)


def _split_list(value: Any) -> Any:
    if type(value) is int:
        return [value]
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("an item is listed twice")
    return values


def parse_path(value: Any) -> Any:
    """Return a path, `~` being the user's home; refuse an empty one, which would be the current folder."""
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ValueError("not a path")
    try:
        os.fsencode(value)
        return Path(value).expanduser()
    except (UnicodeEncodeError, RuntimeError) as error:
        # Half a character, or the home of a user who is not there.
        raise ValueError("not a path") from error


def _check_model(value: str) -> str:
    """Return a model's name; refuse one that can be no path either, as it is looked for on the disk first."""
    parse_path(value)
    return value


ModelName = Annotated[
    str, AfterValidator(_check_model), Form("TEXT", "a folder, a file or a model's id on the hub")
]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0), Form("SIZE", "a size such as 6GB or 500MiB")]
AnyPath = Annotated[Path, BeforeValidator(parse_path), Form("PATH", "a path")]
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"),
    Form("DEVICE", "auto, cpu, cuda or cuda:N", ("auto", "cpu", "cuda")),
]
Limit = Annotated[
    # A number below 1 is a fraction.
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)],
    BeforeValidator(_parse_limit),
    Form("N", "a whole number of at least 1, or a fraction such as 0.1"),
]
Count = Annotated[int, Field(ge=1)]
SmallCount = Annotated[int, Field(ge=1, le=1000)]
Listed = BeforeValidator(_split_list), AfterValidator(_without_repeats)
NotEmpty = Field(min_length=1)


def describe_form(annotation: Any, metadata: list[Any]) -> Form:
    """Return what values a type takes under the checks beside it; a `Form` among those has the last word."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_form(arguments[0], [*metadata, *arguments[1:]])
    if origin in (Union, UnionType):
        return describe_form(next(kind for kind in arguments if kind is not NoneType), metadata)
    for item in metadata:
        if isinstance(item, Form):
            return item
    if origin is Literal:
        if len(arguments) == 1:
            return Form(arguments[0], arguments[0], arguments)
        return Form("NAME", f"one of {', '.join(arguments)}", arguments)
    if origin is tuple:
        item = describe_form(arguments[0], [])
        expected = f"a comma-separated list without repeats, each item {item.expected}"
        return Form("LIST", expected, item.choices)
    if annotation is bool:
        return Form("", "true or false")
    return Form("TEXT", "a text") if annotation is str else _number_form(annotation, metadata)


def _number_form(kind: type, metadata: list[Any]) -> Form:
    """Return the form of a number, its bounds in words."""
    constraints = [
        part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{word} {getattr(constraint, name)}"
        for constraint in constraints
        for name, word in words.items()
        if hasattr(constraint, name)
    ]
    noun, placeholder = ("whole number", "N") if kind is int else ("number", "X")
    within = " and ".join(bounds)
    return Form(placeholder, f"a {noun} {'of ' if within.startswith('at') else ''}{within}")
