"""Files of rows: JSON lines in UTF-8, with or without a byte-order mark."""

import json
from pathlib import Path
from typing import Any, NoReturn

from lowmem_icl.errors import InputError

Rows = list[dict[str, Any]]
LONGEST_LINE = 2 << 20
"""Characters of a row: more tokens than contexts hold, and as many as take seconds to make."""
FORM_BY_SUFFIX = {".jsonl": "JSON lines", ".json": "word pairs"}


def read_rows(path: Path) -> Rows:
    """Return a file's rows; raise InputError naming the file and line of what is wrong.

    Every row must have the fields of the first.
    """
    rows: Rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        row = json_object(path, number, line)
        missing = rows[0].keys() - row.keys() if rows else set()
        if missing:
            raise InputError(f"{path}, line {number}: field '{sorted(missing)[0]}' is missing; add it")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no rows; give a file with one JSON object per line")
    return rows


def json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return the object that a line of a file is.

    Raises InputError for anything else, for one beyond LONGEST_LINE, for a field that is named twice, and for
    a number that JSON has not, such as NaN.
    """
    if len(line) > LONGEST_LINE:
        raise InputError(
            f"{path}, line {number}: expected at most {LONGEST_LINE:,} characters, got {len(line):,}; "
            "shorten its texts, of which a model sees no more than its context holds"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}, line {number}: field '{repeated}' is given twice; give it once")
        return fields

    def no_constant(name: str) -> NoReturn:
        raise InputError(f"{path}, line {number}: {name} is no JSON number; leave it out")

    try:
        value = json.loads(line, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, line {number}: not JSON ({error}); give one JSON object per line"
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path}, line {number}: expected a JSON object, got {type(value).__name__}; "
            "give one object per line"
        )
    if "\\u" in line and not is_text(value):
        raise InputError(
            f"{path}, line {number}: expected texts of whole characters, got half of a surrogate pair, such "
            "as \\ud83d; leave it out"
        )
    return value


def is_text(value: Any) -> bool:
    """Tell whether all texts in a JSON value are of whole characters: JSON's own escapes can give halves."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def count_rows(path: Path) -> int:
    """Return how many rows a file has without parsing them; raise InputError where it is not text."""
    return sum(bool(line.strip()) for line in _lines(path))


def _lines(path: Path) -> list[str]:
    # Not splitlines(): JSON may hold a bare U+2028 or U+0085 inside a text, and that ends no row.
    return read_text(path).split("\n")


def read_text(path: Path) -> str:
    """Return a file's text without a byte-order mark; raise InputError where it has none."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a file of {FORM_BY_SUFFIX.get(path.suffix, 'text')}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; correct the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file that can") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from error
