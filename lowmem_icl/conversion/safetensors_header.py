"""What the header of a stranger's safetensors file says, held against the file before anything is read.

The form: https://github.com/huggingface/safetensors#format. The library refuses most of this, too; it takes
headers that need gigabytes and names that are there twice.
"""

import json
import math
from pathlib import Path
from typing import Any

from lowmem_icl.errors import InputError

LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 25_000_000
"""A model of 100,000 tensors needs half of it; the library takes 100 MB."""
MOST_DIMENSIONS = 8
LARGEST_DIMENSION = 1 << 48
METADATA = "__metadata__"
TYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
}  # fmt: skip


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name; raises InputError as `check_safetensors_header`."""
    header = check_safetensors_header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != METADATA}


def check_safetensors_header(path: Path) -> dict[str, Any]:
    """Return a file's header; raise InputError where it is not whole, or tensors do not fill the file one by
    one.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            if not 0 < length <= min(size - LENGTH_BYTES, LARGEST_HEADER_BYTES):
                raise ValueError(
                    f"its header would have {length} bytes, of the file's {size}; at most "
                    f"{LARGEST_HEADER_BYTES} are read"
                )
            header = json.loads(opened.read(length).decode("utf-8"), object_pairs_hook=_unique)
        _check_entries(header, size - LENGTH_BYTES - length)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error}); fetch the file again, or save the model anew "
            "with save_pretrained"
        ) from error
    return dict(header)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"'{name}' is there twice")
            seen.add(name)
    return fields


def _check_entries(header: Any, data_bytes: int) -> None:
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    places = sorted(_place(name, entry) for name, entry in header.items() if name != METADATA)
    position = 0
    for begin, end, name in places:
        if begin != position:
            what = "overlaps another" if begin < position else f"leaves {begin - position} bytes before it"
            raise ValueError(f"tensor '{name}' {what}")
        position = end
    if position != data_bytes:
        raise ValueError(f"its tensors end at byte {position} of {data_bytes}: it is cut off or too long")


def _place(name: str, entry: Any) -> tuple[int, int, str]:
    """Return where a tensor begins and ends after the header; raise ValueError where its size is another."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets = _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"tensor '{name}': expected dtype, shape and data_offsets in whole numbers")
    dtype = str(fields.get("dtype"))
    if dtype not in TYPE_BYTES:
        raise ValueError(f"tensor '{name}' has the type '{dtype[:40]}', of which no weights are read")
    if len(shape) > MOST_DIMENSIONS or any(count > LARGEST_DIMENSION for count in shape):
        raise ValueError(f"tensor '{name}' has {len(shape)} dimensions, or one beyond any file")
    begin, end = offsets
    expected = math.prod(shape) * TYPE_BYTES[dtype]
    if end - begin != expected:
        raise ValueError(f"tensor '{name}' has {end - begin} bytes, of its shape {expected}")
    return begin, end, name


def _counts(value: Any) -> list[int] | None:
    """Return a list of numbers of something; None for anything else."""
    is_list = isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
    return value if is_list else None
