"""Arrays written as safetensors (https://github.com/huggingface/safetensors#format), by Python's own files:
the library's writer leaves a temporary file behind where it is killed, and hides what the disk said.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TYPE_ORDER = (*("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64"),)
"""As the library orders them; the last comes first, so that every tensor is aligned."""
HEADER_MULTIPLE = 8


@dataclass(frozen=True)
class TensorContent:
    """A tensor to be written: the format's name of its type, its shape, its size, and its bytes when asked
    for.
    """

    type_name: str
    shape: tuple[int, ...]
    size_bytes: int
    content: Callable[[], memoryview]


def header_bytes(header: Mapping[str, object]) -> bytes:
    """Return the beginning of a file: the header's length and the header, filled up with spaces."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_MULTIPLE)
    return len(text).to_bytes(8, "little") + text


def write_tensor_file(path: Path, tensors: Mapping[str, TensorContent], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata; byte for byte what the library writes."""
    order = sorted(tensors, key=lambda name: (-TYPE_ORDER.index(tensors[name].type_name), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    size = 0
    for name in order:
        tensor = tensors[name]
        offsets = [size, size + tensor.size_bytes]
        header[name] = {"dtype": tensor.type_name, "shape": list(tensor.shape), "data_offsets": offsets}
        size += tensor.size_bytes
    with path.open("wb") as opened:
        opened.write(header_bytes(header))
        for name in order:
            opened.write(tensors[name].content())
