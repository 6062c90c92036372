"""Word pairs as multiple choice: each input with its output among answers to other inputs (Todd et al. 2024).

What is drawn depends on SHA-256 of the words alone, so it is the same under every version of Python, and a
pair that is added leaves the others' draws nearly as they were.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_icl.errors import InputError
from lowmem_icl.tasks.row_files import LONGEST_LINE, Rows, is_text, read_text

OPTIONS = 5
ITEM_SEPARATOR = ", "
EXPECTED_FILE = 'expected a list of pairs [{"input": "France", "output": "Paris"}, ...]'


class WordPair(NamedTuple):
    """An input and the output that a model has to give for it."""

    input: str
    output: str

    @property
    def items(self) -> list[str]:
        """The parts of an input that is a list."""
        return self.input.split(ITEM_SEPARATOR)

    @property
    def chooses_an_item(self) -> bool:
        """Whether the input is a list of different items and the output is one of them."""
        return len(set(self.items)) == len(self.items) > 1 and self.output in self.items


def drawn(candidates: Iterable[str], *purpose: str) -> list[str]:
    """Return texts in an order that depends on them and on the purpose alone; each purpose has its own."""

    def rank(candidate: str) -> bytes:
        return hashlib.sha256("\n".join((*purpose, candidate)).encode("utf-8", "surrogatepass")).digest()

    return sorted(candidates, key=rank)


def pair_rows(pairs: Sequence[WordPair]) -> Rows:
    """Return a row per pair: `input`, `output`, `options`, and `answer`, the index of the right option.

    Where every input is a list that its output is an item of, the options are the items; else they are the
    output and up to four of the other pairs' outputs, never one that another pair gives for the same input.
    The outputs' indices go round from row to row, so a constant answer is right as often as a guess. A pair
    whose input has all outputs there are gets a single option.
    """
    outputs = sorted({pair.output for pair in pairs})
    right: dict[str, set[str]] = {}
    for pair in pairs:
        right.setdefault(pair.input, set()).add(pair.output)
    are_lists = all(pair.chooses_an_item for pair in pairs)
    rows: Rows = []
    for number, pair in enumerate(pairs):
        wrong = pair.items if are_lists else [text for text in outputs if text not in right[pair.input]]
        others = drawn((text for text in wrong if text != pair.output), *pair)
        if not are_lists:
            others = others[: OPTIONS - 1]
        answer = number % (len(others) + 1)
        options = [*others[:answer], pair.output, *others[answer:]]
        rows.append({**pair._asdict(), "options": options, "answer": answer})
    return rows


def prompt_text(text: str) -> str:
    """Return an input as Todd et al. ask for its output, which follows after a space."""
    return f"Q: {text}\nA:"


def read_pairs(path: Path) -> list[WordPair]:
    """Return the pairs of a JSON file in the form of Todd et al. (2024); repeated pairs count once.

    Raises InputError naming the file and the entry of what is wrong.
    """
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not JSON ({error}); {EXPECTED_FILE}; name a file of JSON lines .jsonl"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: {EXPECTED_FILE}, got {_described(entries)}")
    pairs = [_checked_pair(path, number, entry) for number, entry in enumerate(entries, start=1)]
    unique = list(dict.fromkeys(pairs))
    for row in pair_rows(unique):
        if len(row["options"]) < 2:
            raise InputError(
                f"{path}, entry {pairs.index(WordPair(row['input'], row['output'])) + 1}: no other entry has "
                "a different output that could be a wrong option; add pairs with other outputs"
            )
    return unique


def _described(entries: object) -> str:
    return "an empty list" if isinstance(entries, list) else f"{type(entries).__name__}"


def _checked_pair(path: Path, number: int, entry: Any) -> WordPair:
    if not isinstance(entry, dict):
        raise InputError(
            f'{path}, entry {number}: expected {{"input": ..., "output": ...}}, got {type(entry).__name__}'
        )
    for field in WordPair._fields:
        text = entry.get(field)
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"{path}, entry {number}: '{field}': expected a text that is not empty, got {text!r}"
            )
        if len(text) > LONGEST_LINE:
            raise InputError(
                f"{path}, entry {number}: '{field}': expected at most {LONGEST_LINE:,} characters, got "
                f"{len(text):,}; shorten it"
            )
        if not is_text(text):
            raise InputError(
                f"{path}, entry {number}: '{field}': expected a text of whole characters, got half of a "
                "surrogate pair; leave it out"
            )
    return WordPair(entry["input"], entry["output"])
