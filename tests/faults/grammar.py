"""Broken values of JSON-like forms: trees with anything in them, their texts, and the bytes of these."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

# What libraries trip over: other types, edges of types, texts that are no names, markup and commands.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 63, 10_000, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308),
    *(
        "",
        " ",
        "x",
        "0",
        "1",
        "512",
        "1e999",
        "\n",
        "a\tb",
        "\0",
        "\x1b[31m",
        "\u202e",
        "ä",
        "数据",
        "\ufeff",
    ),
    *("../x", "/etc/passwd", "~nosuch/x", "a/b", ".", "..", "con", "[/b] [x]", "<b>&", "{{x}}", "${HOME}"),
    *("x" * 300, "x" * 5_000, "relu", "auto", "demo", "NaN", "null", "2026-11-28"),
    *([], [[]], {}, {"a": 1}, [1], ["a"], [None], [1, "a"], [0, 0], [-1], [[[]]], {"": ""}, [{}], [1.5]),
)
# What a tree cannot hold, as the text that stands in its place.
RAW_TEXTS = (
    *("NaN", "-Infinity", "1e999", "-1e999", "9" * 5_000, "1." + "9" * 5_000, '"\\ud83d"', '"\\udc00x"'),
    *("[" * 2_000 + "]" * 2_000, '{"a":' * 2_000 + "1" + "}" * 2_000, "[" * 20_000, '{"a": 1, "a": 2}'),
    *("", "01", "1.", "'x'", "undefined", "True", '"\\x"', '"\t"', '"', "[1,]", "/* x */ 1", "\ufeff1"),
)
_MARK = "raw text number "

Path = tuple[Any, ...]


def places(tree: Any, path: Path = ()) -> list[Path]:
    """Return the paths of all values within a tree."""
    children: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        children = list(tree.items())
    elif isinstance(tree, list):
        # The first ones stand for all.
        children = list(enumerate(tree[:4]))
    return [found for key, child in children for found in [(*path, key), *places(child, (*path, key))]]


def odd_value(rng: random.Random, usual: Sequence[Any] = ()) -> Any:
    """Return any value, at times a mark for one of RAW_TEXTS, at times one that is `usual` elsewhere."""
    if usual and rng.random() < 0.3:
        return copy.deepcopy(rng.choice(usual))
    if rng.random() < 0.1:
        return f"{_MARK}{rng.randrange(len(RAW_TEXTS))}"
    return copy.deepcopy(rng.choice(ODD_VALUES))


def broken(rng: random.Random, tree: Any, usual: Sequence[Any] = ()) -> Any:
    """Return a copy of a tree with up to three changes: values that are others, gone, new or doubled."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        found = places(changed)
        if not found or rng.random() < 0.02:
            return odd_value(rng, usual)
        *above, key = rng.choice(found)
        owner = changed
        for step in above:
            owner = owner[step]
        kind = rng.randrange(8)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[rng.choice(("", "x", "\x1b[31m", "../x", "x" * 300, str(key).upper(), f"{key} "))] = (
                odd_value(rng, usual)
            )
        elif kind == 1:
            owner.insert(rng.randrange(len(owner) + 1), odd_value(rng, usual))
        elif kind == 2 and isinstance(owner[key], str):
            owner[key] += str(rng.choice(("", " ", "\n", "\0", "x" * 300, "\u202e", "-1", "/..")))
        elif kind == 2 and isinstance(owner[key], int | float):
            owner[key] = rng.choice((owner[key] + 1, -owner[key], owner[key] * 1000, str(owner[key])))
        elif kind == 3:
            owner[key] = [owner[key]]
        else:
            owner[key] = odd_value(rng, usual)
    return changed


def json_text(rng: random.Random, tree: Any) -> str:
    """Return a tree as JSON, in one of the ways in which it is written, raw texts in their places."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, None, 1)))
    for number, raw in enumerate(RAW_TEXTS):
        text = text.replace(f'"{_MARK}{number}"', raw)
    return text


def file_bytes(rng: random.Random, text: str) -> bytes:
    """Return the bytes of a text, now and then in another coding, cut, with bits flipped or parts doubled."""
    plain = text.encode("utf-8", "surrogatepass")
    kind = rng.randrange(24)
    place = rng.randrange(len(plain) + 1)
    end = min(len(plain), place + rng.randrange(1, 40))
    changes: dict[int, Callable[[], bytes]] = {
        0: lambda: plain[:place],
        1: lambda: plain[:place] + plain[end:],
        2: lambda: plain[:end] + plain[place:],
        3: lambda: b"\xef\xbb\xbf" + plain,
        4: lambda: text.encode(rng.choice(("utf-16", "utf-32", "latin-1", "cp1252", "utf-7")), "replace"),
        5: lambda: (
            plain[:place]
            + rng.choice((b"\0", b"\xff", b"\x1b[2J", b"\r", b"\n\n", b"\xe2\x80\xa8"))
            + plain[place:]
        ),
        6: lambda: plain.replace(b"\n", b"\r\n"),
        7: lambda: rng.choice((b"", b"\n", b" " * 1000, b"\0" * 64, rng.randbytes(200))),
    }
    if kind == 8 and plain:
        flipped = bytearray(plain)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    return changes.get(kind, lambda: plain)()


def json_file(rng: random.Random, tree: Any, usual: Sequence[Any] = ()) -> bytes:
    """Return the bytes of a JSON file that is a tree with something wrong, or with nothing."""
    return file_bytes(rng, json_text(rng, broken(rng, tree, usual)))


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Return bytes as they are, or with some flipped, left out, repeated or cut off."""
    kind, place = rng.randrange(6), rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        flipped = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return content[:place] + content[place + rng.randrange(1, 9) :]
    if kind == 3:
        return content[:place] + content[max(0, place - rng.randrange(1, 40)) :]
    return content
