"""Tensors written as safetensors (https://github.com/huggingface/safetensors#format), whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lowmem_icl.errors import InputError
from lowmem_icl.model.reading import TORCH_TYPES, read_header
from lowmem_icl.system.files import atomic_path, unnamed_file, writes
from lowmem_icl.system.tensor_files import HEADER_MULTIPLE, TensorContent, write_tensor_file

Accept = Callable[[int, str], None]
"""Is given a file's size and SHA-256 before it gets its name; where it raises, the one of before stays."""

TYPE_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}
DIGESTS = "source_digests"
COPIED_BYTES = 4 << 20


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    digests: dict[str, str],
    accept: Accept = lambda size, digest: None,
) -> tuple[int, str]:
    """Write tensors, with the digests of the source's tensors; return size and SHA-256, which is of the bytes
    in memory, not of what the disk returns.
    """
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, {DIGESTS: json.dumps(digests, sort_keys=True)})
        size, digest = temporary.stat().st_size, sha256_of_tensors(temporary, tensors)
        accept(size, digest)
    return size, digest


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
    accept: Accept = lambda size, digest: None,
) -> tuple[int, str]:
    """Write tensors in the order in which they come, one in memory at a time; return size and SHA-256.

    `digests` of the source's tensors may grow while these come. Wider types must come first, so that every
    tensor lies on a multiple of its elements' size. Raises InputError where the disk gives back other bytes.
    """
    header: dict[str, Any] = {}
    with writes(path), unnamed_file(path) as body:
        written, size = hashlib.sha256(), 0
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
            whole, copied = _copy(body, target, hashlib.sha256(front))
            if copied != written.hexdigest():
                raise InputError(
                    f"{path}: the disk gives back other bytes than were written: it may be failing; choose "
                    "another"
                )
            accept(len(front) + size, whole)
    return len(front) + size, whole


def _copy(body: IO[bytes], target: IO[bytes], whole: Any) -> tuple[str, str]:
    """Append a body to a file; return the digest of all, and of the body alone."""
    body.seek(0)
    alone = hashlib.sha256()
    while block := body.read(COPIED_BYTES):
        target.write(block)
        whole.update(block)
        alone.update(block)
    return whole.hexdigest(), alone.hexdigest()


def source_digests(path: Path) -> dict[str, str]:
    """Return the digests that were written into a file."""
    digests: dict[str, str] = json.loads(read_header(path)[1][DIGESTS])
    return digests


def sha256_of_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Return what a safetensors file's SHA-256 must be, from its header and the tensors in memory."""
    locations = read_header(path)[0]
    with path.open("rb") as opened:
        length = opened.read(8)
        summed = hashlib.sha256(length + opened.read(int.from_bytes(length, "little")))
    for name in sorted(tensors, key=lambda name: locations[name].offset):
        summed.update(_bytes_of(tensors[name]))
    return summed.hexdigest()
