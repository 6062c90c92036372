"""What a GGUF file says of itself before its tensors' bytes: metadata, and where each tensor lies.

Files come from strangers, so every count and offset is held against the file's size before it is used: only a
file that passes is given to libraries that believe what they read. The form is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import quant_shape_to_byte_shape

from lowmem_icl.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
MOST_ELEMENTS = 1 << 21
"""Of all arrays together; libraries make an object of each, and the largest vocabularies have 1.3 million."""
MOST_ENTRIES = 1 << 16
"""Of metadata, and of tensors."""
ELEMENTS_OF_A_TOKEN, OTHER_ELEMENTS = 8, 1 << 16
"""A vocabulary is as large as its embedding says: a small file costs little to read."""
EMBEDDING = "token_embd.weight"
LONGEST_TEXT = 1 << 22
"""In bytes; a chat template has some ten thousand."""
SCALAR_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its form, its shape as torch has it, and where its bytes lie."""

    name: str
    form: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of the tensor's bytes: rows stay rows."""
        return tuple(quant_shape_to_byte_shape(self.shape, self.form))


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by name, without its arrays, and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the architecture, such as llama or gemma3."""
        return str(self.metadata["general.architecture"])

    def field(self, name: str) -> Any:
        """Return a metadata field of this architecture, None where the file has none."""
        return self.metadata.get(f"{self.architecture}.{name}")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check a file's header; raise InputError where the file is no GGUF file, broken or cut off."""
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Reader(mapped).header()
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise InputError(f"{path}: not a whole GGUF file ({error}); fetch the file again") from error


class _Reader:
    """Walks through a header; every step is checked against the end of the file."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped, self._position = mapped, 0
        self._elements = 0

    def header(self) -> GgufHeader:
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensors, fields = self._numbers("<IQQ")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, expected {' or '.join(map(str, VERSIONS))}")
        if max(tensors, fields) > MOST_ENTRIES:
            raise ValueError(f"it would have {fields} fields and {tensors} tensors")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            name = self._text()
            value = self._value(self._type())
            if name in metadata:
                raise ValueError(f"field '{name}' is there twice")
            metadata[name] = value
        if not isinstance(metadata.get("general.architecture"), str):
            raise ValueError("it names no architecture")
        located = [self._tensor() for _ in range(tensors)]
        placed = self._placed(located, metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
        rows = placed[EMBEDDING].shape[0] if EMBEDDING in placed else 0
        if self._elements > ELEMENTS_OF_A_TOKEN * rows + OTHER_ELEMENTS:
            raise ValueError(f"its arrays have {self._elements} elements, for {rows} tokens")
        return GgufHeader({name: value for name, value in metadata.items() if value is not None}, placed)

    def _pass_over(self, count: int) -> None:
        if not 0 <= count <= len(self._mapped) - self._position:
            raise ValueError(f"it ends at byte {len(self._mapped)}, in the middle of its header")
        self._position += count

    def _bytes(self, count: int) -> bytes:
        self._pass_over(count)
        return self._mapped[self._position - count : self._position]

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _text(self) -> str:
        (length,) = self._numbers("<Q")
        if length > LONGEST_TEXT:
            raise ValueError(f"a text of its header would have {length} bytes")
        return self._bytes(length).decode("utf-8")

    def _type(self) -> GGUFValueType:
        return GGUFValueType(self._numbers("<I")[0])

    def _value(self, kind: GGUFValueType) -> Any:
        """Read a value; None for an array, which is passed over."""
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind != GGUFValueType.ARRAY:
            return self._numbers(SCALAR_FORMATS[kind])[0]
        kind, count = self._type(), self._numbers("<Q")[0]
        self._elements += count
        if self._elements > MOST_ELEMENTS or kind == GGUFValueType.ARRAY:
            raise ValueError(f"an array of its metadata has {count} elements of type {kind.name}")
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                self._pass_over(self._numbers("<Q")[0])
        else:
            self._pass_over(count * struct.calcsize(SCALAR_FORMATS[kind]))
        return None

    def _tensor(self) -> GgufTensor:
        name = self._text()
        (dimensions,) = self._numbers("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {dimensions} dimensions")
        # The fastest dimension comes first, in torch last.
        shape = tuple(reversed(self._numbers(f"<{dimensions}Q")))
        form, offset = self._numbers("<IQ")
        return GgufTensor(name, GGMLQuantizationType(form), shape, offset)

    def _placed(self, tensors: list[GgufTensor], alignment: Any) -> dict[str, GgufTensor]:
        """Return the tensors by name, their offsets from the beginning of the file."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}, expected a power of two")
        start = -(-self._position // alignment) * alignment
        placed: dict[str, GgufTensor] = {}
        for tensor in tensors:
            if tensor.name in placed:
                raise ValueError(f"tensor '{tensor.name}' is there twice")
            end = start + tensor.offset + math.prod(tensor.byte_shape)
            if end > len(self._mapped):
                raise ValueError(
                    f"tensor '{tensor.name}' ends at byte {end}, the file at byte {len(self._mapped)}: "
                    "it is cut off"
                )
            placed[tensor.name] = replace(tensor, offset=start + tensor.offset)
        _refuse_overlaps(placed.values())
        return placed


def _refuse_overlaps(tensors: Iterable[GgufTensor]) -> None:
    """Raise ValueError where two tensors share bytes: a small file would become a store of any size."""
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, math.prod(tensor.byte_shape))):
        if tensor.offset < end:
            raise ValueError(f"tensor '{tensor.name}' overlaps another")
        end = tensor.offset + math.prod(tensor.byte_shape)
