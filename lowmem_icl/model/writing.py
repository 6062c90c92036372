"""Tensors written as safetensors (https://github.com/huggingface/safetensors#format), whole or not at all."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from lowmem_icl.errors import InputError
from lowmem_icl.model.digests import StoredFile, Summing
from lowmem_icl.model.reading import TORCH_TYPES, read_header
from lowmem_icl.system.files import atomic_path, unnamed_file, writes
from lowmem_icl.system.tensor_files import HEADER_MULTIPLE, TensorContent, write_tensor_file

Accept = Callable[[StoredFile], None]
"""Is given a file before it gets its name; where it raises, the one of before stays."""

TYPE_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}
DIGESTS = "source_digests"
COPIED_BYTES = 4 << 20


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    digests: dict[str, str],
    accept: Accept = lambda made: None,
) -> StoredFile:
    """Write tensors, with the digests of the source's tensors; return what was written, the digests being of
    the bytes in memory, not of what the disk returns.
    """
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, {DIGESTS: json.dumps(digests, sort_keys=True)})
        made = _made_of(temporary, tensors)
        accept(made)
    return made


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as a safetensors file, where it stands."""

    def content_of(tensor: Tensor) -> TensorContent:
        return TensorContent(
            TYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, lambda: _bytes_of(tensor)
        )

    write_tensor_file(path, {name: content_of(tensor) for name, tensor in tensors.items()}, metadata)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def save_one_by_one(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    digests: Mapping[str, str],
    accept: Accept = lambda made: None,
) -> StoredFile:
    """Write tensors in the order in which they come, one in memory at a time; return what was written.

    `digests` of the source's tensors may grow while these come. Wider types must come first, so that every
    tensor lies on a multiple of its elements' size. Raises InputError where the disk gives back other bytes.
    """
    header: dict[str, Any] = {}
    with writes(path), unnamed_file(path) as body:
        written, size = xxhash.xxh3_128(), 0
        for name, tensor in tensors:
            content = _bytes_of(tensor)
            assert size % tensor.dtype.itemsize == 0, "wider types come first"
            body.write(content)
            written.update(content)
            offsets = [size, size + len(content)]
            header[name] = {
                "dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets
            }  # fmt: skip
            size += len(content)
        header["__metadata__"] = {DIGESTS: json.dumps(digests, sort_keys=True)}
        # Not `header_bytes`: stores that are there have these separators, and digests of files with them.
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % HEADER_MULTIPLE)
        front = len(text).to_bytes(8, "little") + text
        with atomic_path(path) as temporary, temporary.open("wb") as target:
            target.write(front)
            whole = Summing()
            whole.update(front)
            copied = _copy(body, target, whole)
            if copied != written.hexdigest():
                raise InputError(
                    f"{path}: the disk gives back other bytes than were written: it may be failing; choose "
                    "another"
                )
            made = whole.stored()
            accept(made)
    return made


def _copy(body: IO[bytes], target: IO[bytes], whole: Summing) -> str:
    """Append a body to a file, and to the digests of all; return the XXH3 of the body alone."""
    body.seek(0)
    alone = xxhash.xxh3_128()
    while block := body.read(COPIED_BYTES):
        target.write(block)
        whole.update(block)
        alone.update(block)
    return str(alone.hexdigest())


def source_digests(path: Path) -> dict[str, str]:
    """Return the digests that were written into a file."""
    digests: dict[str, str] = json.loads(read_header(path)[1][DIGESTS])
    return digests


def _made_of(path: Path, tensors: dict[str, Tensor]) -> StoredFile:
    """Return what a safetensors file must be, from its header and the tensors in memory."""
    locations, summed = read_header(path)[0], Summing()
    with path.open("rb") as opened:
        length = opened.read(8)
        summed.update(length + opened.read(int.from_bytes(length, "little")))
    for name in sorted(tensors, key=lambda name: locations[name].offset):
        summed.update(_bytes_of(tensors[name]))
    return summed.stored()
