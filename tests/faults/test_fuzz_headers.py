"""Generated safetensors and GGUF headers: each is read or refused by name, at once, in bounded memory."""

import copy
import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grammar import mutated

from lowmem_icl.conversion.gguf.header import read_gguf_header
from lowmem_icl.conversion.weight_files import open_weight_file
from lowmem_icl.errors import InputError

SECONDS, MEGABYTES = 5.0, 300
ODD_NUMBERS = (0, 1, 2, 7, 8, 255, 2**31 - 1, 2**32, 2**53 + 1, 2**60, 2**62, 2**63, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    None, True, "", "x", "\x1b[31m", "../x", "\ud83d", -1, 2.0, 1e400, 2**70, [], [[]], {}, {"a": 1}, [-1],
    ["a"],
)  # fmt: skip
TYPES = ("F32", "F64", "I8", "BF16", "F4", "F6_E2M3", "Q9", "")


def safetensors(rng: random.Random) -> bytes:
    """Return a whole file with one or two things wrong, in its header's content or in its bytes."""
    header: dict[str, Any] = {}
    position = 0
    for number in range(rng.randrange(1, 4)):
        shape = [rng.randrange(4) for _ in range(rng.randrange(3))]
        size = 4
        for count in shape:
            size *= count
        header[f"t{number}"] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    for _ in range(rng.randrange(3)):
        entry = header[rng.choice(list(header))]
        field = rng.choice(("dtype", "shape", "data_offsets", "all", "number"))
        if field == "all":
            header[rng.choice((*header, "__metadata__", "", "x" * 999))] = copy.deepcopy(
                rng.choice(ODD_VALUES)
            )
        elif not isinstance(entry, dict):
            continue
        elif field == "number" and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = [rng.choice(ODD_NUMBERS), rng.choice(ODD_NUMBERS)]
        else:
            odd = (*ODD_VALUES, *TYPES, [rng.choice(ODD_NUMBERS) for _ in range(3)])
            entry[field] = copy.deepcopy(rng.choice(odd))
    text = json.dumps(header).encode()
    length = rng.choice(ODD_NUMBERS) if rng.random() < 0.1 else len(text)
    return mutated(rng, struct.pack("<Q", length) + text + bytes(position))


def gguf_text(rng: random.Random, name: bytes) -> bytes:
    length = rng.choice(ODD_NUMBERS) if rng.random() < 0.02 else len(name)
    return struct.pack("<Q", length) + name


def number(rng: random.Random, usual: int, share: float = 0.05) -> int:
    return rng.choice(ODD_NUMBERS) if rng.random() < share else usual


def gguf(rng: random.Random) -> bytes:
    """Return a header by the form's grammar, some numbers of it odd, and bytes after it."""
    n_fields, n_tensors = rng.randrange(5), rng.randrange(4)
    parts = [b"GGUF", struct.pack("<IQQ", 3, number(rng, n_tensors), number(rng, n_fields + 1))]
    parts += [gguf_text(rng, b"general.architecture"), struct.pack("<I", 8), gguf_text(rng, b"llama")]
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    for index in range(n_fields):
        kind = rng.choice((*sizes, 8, 9, 99))
        name = b"general.alignment" if rng.random() < 0.1 else b"f%d" % index
        parts += [gguf_text(rng, name), struct.pack("<I", kind)]
        if kind == 8:
            parts.append(gguf_text(rng, rng.randbytes(3)))
        elif kind == 9:
            inner, count = rng.choice((*sizes, 8, 9)), rng.randrange(4)
            parts.append(struct.pack("<IQ", inner, number(rng, count)))
            items = [gguf_text(rng, b"ab") if inner == 8 else bytes(sizes.get(inner, 12))] * count
            parts += items
        else:
            parts.append(rng.randbytes(sizes.get(kind, 8)))
    for index in range(n_tensors):
        shape = [number(rng, rng.randrange(1, 5)) for _ in range(rng.randrange(1, 4))]
        parts += [gguf_text(rng, b"t%d" % index), struct.pack("<I", len(shape))]
        parts += [struct.pack("<Q", count) for count in shape]
        parts.append(struct.pack("<IQ", number(rng, 0) & 0xFFFFFFFF, number(rng, 256 * index)))
    return mutated(rng, b"".join(parts) + bytes(2048))


def read_all_tensors(path: Path) -> None:
    for read in open_weight_file(path).values():
        read()


FORMS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[Path], Any]]] = {
    "safetensors": (safetensors, read_all_tensors),
    "gguf": (gguf, read_gguf_header),
}


def tried(form: str, seeds: range, path: Path) -> dict[str, float]:
    """Read generated files and return how many were read and refused, and the longest time in seconds."""
    make, read = FORMS[form]
    found = {"read": 0, "refused": 0, "longest": 0.0}
    for seed in seeds:
        path.write_bytes(make(random.Random(seed)))
        began = time.monotonic()
        try:
            read(path)
            found["read"] += 1
        except InputError as error:
            if str(path) not in str(error):
                raise AssertionError(f"{form}, seed {seed}: names no file: {error}") from error
            found["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{form}, seed {seed}: {error!r}") from error
        found["longest"] = max(found["longest"], time.monotonic() - began)
    return found


def check(form: str, seeds: range, folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = tried(form, seeds, folder / f"x.{form}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{form}: {len(seeds)} tried, {found}, {grown:.0f} MB more")
    assert found["longest"] < SECONDS
    assert grown < MEGABYTES
    # The generator reaches past the first check.
    assert min(found["read"], found["refused"]) > 0.05 * len(seeds)


@pytest.mark.parametrize("form", FORMS)
def test_generated_headers(tmp_path: Path, form: str) -> None:
    check(form, range(2000), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_20_000_generated_headers(tmp_path: Path, form: str) -> None:
    check(form, range(10_000, 20_000), tmp_path)
