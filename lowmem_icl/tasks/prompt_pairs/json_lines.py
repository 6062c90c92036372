"""Files of JSON lines by hand or by other tools, read strictly: what is wrong is named by line and field."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lowmem_icl.errors import InputError
from lowmem_icl.tasks.row_files import json_object, read_text

LARGEST_FILE_BYTES = 256 << 20
MOST_LINES = 100_000


@dataclass(frozen=True)
class JsonLine:
    """One object of a file: its line, counted from 1, and its fields."""

    path: Path
    number: int
    fields: dict[str, Any]

    def refuse(
        self, field: str, expected: str, got: object, what_to_do: str = "correct the line"
    ) -> NoReturn:
        """Raise InputError that names file, line and field, what was expected and got, and what to do."""
        shown = repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise InputError(
            f"{self.path}, line {self.number}: '{field}': expected {expected}, got {shown}; {what_to_do}"
        )

    def value(self, field: str, expected: str) -> Any:
        """Return a field's value; raise InputError where the field is missing."""
        if field not in self.fields:
            raise InputError(
                f"{self.path}, line {self.number}: field '{field}' is missing, expected {expected}; add it"
            )
        return self.fields[field]

    def text(self, field: str, *, may_be_empty: bool = False) -> str:
        """Return a field that is a text of Unicode characters."""
        expected = "a text" if may_be_empty else "a text that is not empty"
        return self.checked_text(field, self.value(field, expected), expected)

    def checked_text(self, field: str, value: object, expected: str) -> str:
        """Return a value that is a text, which may be empty only where that is expected."""
        if not isinstance(value, str) or (not value and "not empty" in expected):
            self.refuse(field, expected, value)
        try:
            value.encode()
        except UnicodeEncodeError:
            self.refuse(field, "a text of whole characters", value, "it holds half of a surrogate pair")
        return value

    def items(self, field: str, expected: str) -> list[Any]:
        """Return a field that is a list with at least one item."""
        value = self.value(field, expected)
        if not isinstance(value, list) or not value:
            self.refuse(field, expected, value)
        return value

    def token_ids(self, field: str, vocabulary: int) -> tuple[int, ...]:
        """Return a field that is a list of token ids of a vocabulary."""
        values = self.items(field, "a list of token ids")
        for value in values:
            if type(value) is not int or not 0 <= value < vocabulary:
                self.refuse(field, f"token ids from 0 to {vocabulary - 1}, the model's vocabulary", value)
        return tuple(values)


def read_json_lines(path: Path) -> Iterator[JsonLine]:
    """Yield the objects of a file of JSON lines; empty lines are skipped.

    Raises InputError for a file that is missing, no text, without lines or too large, and for a line that is
    no JSON object, names a field twice, or holds a number that JSON has not, such as NaN.
    """
    if path.is_file() and path.stat().st_size > LARGEST_FILE_BYTES:
        raise InputError(
            f"{path}: expected at most {LARGEST_FILE_BYTES >> 20} MiB, got {path.stat().st_size >> 20}; "
            "split the file"
        )
    count = 0
    # Not splitlines(): JSON may hold a bare U+2028 or U+0085 inside a text, and that ends no line.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        count += 1
        if count > MOST_LINES:
            raise InputError(f"{path}, line {number}: expected at most {MOST_LINES:,} lines; split the file")
        yield JsonLine(path, number, json_object(path, number, line))
    if not count:
        raise InputError(f"{path} holds no lines; give a file with one JSON object per line")
