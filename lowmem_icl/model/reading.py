"""Layer files read ahead of the arithmetic, past the page cache, into two reused page-aligned buffers.

One iterator gives the layers in the order asked for; layers that fit the allowance stay in memory between
passes. Nothing else knows that weights are streamed.
"""

import errno
import json
import math
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowmem_icl.model.digests import Digest
from lowmem_icl.model.integrity import FileState, accept, damaged, is_trusted, state_of
from lowmem_icl.model.staging import CopyStream, device_offsets

PAGE_BYTES = 4096
BLOCK_BYTES = 32 << 20
READERS = 2
CPU = torch.device("cpu")

TORCH_TYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    elements: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.elements * self.dtype.itemsize

    def of(self, buffer: Tensor, offset: int) -> Tensor:
        """Return the tensor as it lies at this offset of a buffer of bytes."""
        return buffer[offset : offset + self.size_bytes].view(self.dtype).view(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """Return where a safetensors file's tensors are, and its metadata; raise InputError naming the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(size - 8, 100_000_000):
                raise ValueError("the header's length is wrong")
            header = json.loads(opened.read(length).decode("utf-8"))
        locations = {}
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = TORCH_TYPES[entry["dtype"]], tuple(entry["shape"])
            if not all(type(count) is int and count >= 0 for count in (*shape, begin, end)):
                raise ValueError(f"tensor '{name}' has no sizes")
            elements = math.prod(shape)
            if not 0 <= begin <= end <= size - 8 - length or end - begin != elements * dtype.itemsize:
                raise ValueError(f"tensor '{name}' does not lie inside the file")
            if (8 + length + begin) % dtype.itemsize:
                raise ValueError(f"tensor '{name}' does not lie on a multiple of its elements' size")
            locations[name] = TensorLocation(dtype, shape, 8 + length + begin, elements)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"truncated or not a safetensors file ({str(error)[:200]})") from error
    return locations, metadata


@dataclass(frozen=True, eq=False)
class PendingLayer:
    """A layer being read into a host buffer by blocks; on CUDA also where it is copied to, and its end.

    `digest` of its bytes, where these are not trusted yet, and the file's state before they were read.
    """

    host: Tensor
    blocks: list[Future[None]]
    state: FileState
    digest: Future[Digest] | None
    target: Tensor | None = None
    copied: "Future[torch.cuda.Event] | None" = None

    def wait(self) -> None:
        """Return once nothing is written any more to what it is read into, which may be used again then."""
        # Where the reader was closed, what had not begun never will.
        for future in (*self.blocks, self.digest):
            with suppress(CancelledError):
                if future is not None:
                    future.exception()
        with suppress(CancelledError):
            if self.copied is not None and self.copied.exception() is None:
                self.copied.result().synchronize()


class LayerReader:
    """Reads the layers of a store in any order; keeps those in `resident_layers` in memory, on `device`.

    The tensors of a streamed layer are views of a buffer that the next but one layer overwrites: they are
    valid until the iterator is advanced. On a CUDA device the layers arrive there, copied while the device
    computes. With the files' `digests`, a layer is given only once its bytes are found to be those;
    what this process has found so before is read without.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        resident_layers: frozenset[int] = frozenset(),
        device: torch.device = CPU,
        digests: Sequence[Digest] | None = None,
    ) -> None:
        self._device = device
        self._paths = list(paths)
        self._digests = digests
        self._locations = [read_header(path)[0] for path in self._paths]
        self._sizes = [path.stat().st_size for path in self._paths]
        self._resident_layers = resident_layers
        self._resident: dict[int, dict[str, Tensor]] = {}
        self._buffers: list[Tensor] = []
        # One more on CUDA: it waits for the blocks of a layer and starts its copy.
        self._pool = ThreadPoolExecutor(READERS + (device.type == "cuda"), thread_name_prefix="layer-reader")
        # A digest takes a file's blocks in their order: one thread follows those that read.
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="layer-digest")
        self._copies = self._copy_stream() if device.type == "cuda" else None
        self.read_bytes = 0

    @property
    def locations(self) -> list[dict[str, TensorLocation]]:
        """Where every layer's tensors lie in its file."""
        return self._locations

    def close(self) -> None:
        """Stop the reading threads and drop resident layers."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._hashing.shutdown(wait=True, cancel_futures=True)
        if self._copies is not None:
            self._copies.close()
        self._resident.clear()
        self._buffers.clear()

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (layer, its tensors by name) in the given order, the next layer being read meanwhile."""
        started: dict[int, PendingLayer] = {}
        try:
            self._start(order, 0, started)
            for step, layer in enumerate(order):
                # It stays there until it was used: where one block cannot be read, the others are waited for.
                pending = started.get(step)
                for block in pending.blocks if pending else ():
                    block.result()
                self._start(order, step + 1, started)
                if pending is None:
                    yield layer, self._resident[layer]
                    continue
                self._check(layer, pending)
                if pending.copied is not None and self._copies is not None:
                    self._copies.wait_for_copy(pending.copied.result())
                tensors = self._view(layer, pending)
                if layer in self._resident_layers:
                    # On another device they are copies there, and the buffer goes.
                    tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
                    self._resident[layer] = tensors
                yield layer, tensors
                del started[step]
        finally:
            for pending in started.values():
                pending.wait()

    def _start(self, order: Sequence[int], step: int, started: dict[int, PendingLayer]) -> None:
        if step >= len(order) or order[step] in self._resident:
            return
        layer, slot = order[step], step % 2
        size, state = self._sizes[layer], self._state(layer)
        self.read_bytes += size
        if self._copies is not None:
            self._copies.wait_for_host(slot)
        host = self._buffer_for(layer, slot)[: _round_up(size)]
        # Before anything is read: a device may have no room for it.
        target = self._target_for(layer, slot)
        blocks = [
            self._pool.submit(_read_block, self._paths[layer], host, start, size)
            for start in range(0, size, BLOCK_BYTES)
        ]
        digest = copied = None
        if self._digests is not None and not is_trusted(state, self._digests[layer]):
            digest = self._hashing.submit(_digest_as_read, host[:size], blocks, self._digests[layer])
        if self._copies is not None and target is not None:
            offsets, _ = self._on_device(layer)
            places = self._locations[layer].items()
            pairs = [(at.of(host, at.offset), at.of(target, offsets[name])) for name, at in places]
            copied = self._pool.submit(_copy_when_read, self._copies, slot, blocks, pairs, self._copies.now())
        started[step] = PendingLayer(host, blocks, state, digest, target, copied)

    def _target_for(self, layer: int, slot: int) -> Tensor | None:
        """Return where a layer goes on a CUDA device, None on the CPU."""
        if self._copies is None:
            return None
        size = self._on_device(layer)[1]
        if layer in self._resident_layers:
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._copies.buffer(slot)[:size]

    def _check(self, layer: int, pending: PendingLayer) -> None:
        if pending.digest is None or self._digests is None:
            return
        accept(self._paths[layer], pending.state, pending.digest.result(), self._digests[layer])

    def _state(self, layer: int) -> FileState:
        try:
            return state_of(self._paths[layer])
        except OSError as error:
            raise damaged(self._paths[layer], f"cannot be read ({error.strerror})") from error

    def _buffer_for(self, layer: int, slot: int) -> Tensor:
        if layer in self._resident_layers and self._copies is None:
            return _new_buffer(self._sizes[layer])
        if not self._buffers:
            self._buffers = [_new_buffer(max(self._sizes)) for _ in range(2)]
            for buffer in self._buffers if self._copies is not None else ():
                self._copies.pin(buffer)  # type: ignore[union-attr]
        return self._buffers[slot]

    def _view(self, layer: int, pending: PendingLayer) -> dict[str, Tensor]:
        places = self._locations[layer].items()
        if pending.target is None:
            return {name: at.of(pending.host, at.offset) for name, at in places}
        offsets, _ = self._on_device(layer)
        return {name: at.of(pending.target, offsets[name]) for name, at in places}

    def _on_device(self, layer: int) -> tuple[dict[str, int], int]:
        return device_offsets({name: at.size_bytes for name, at in self._locations[layer].items()})

    def _copy_stream(self) -> CopyStream:
        return CopyStream(self._device, max(self._on_device(layer)[1] for layer in range(len(self._paths))))


def _copy_when_read(
    copies: CopyStream,
    slot: int,
    blocks: Sequence[Future[None]],
    pairs: Sequence[tuple[Tensor, Tensor]],
    free: "torch.cuda.Event",
) -> "torch.cuda.Event":
    for block in blocks:
        block.result()
    return copies.copy(slot, pairs, free)


def _digest_as_read(host: Tensor, blocks: Sequence[Future[None]], like: Digest) -> Digest:
    """Return the digest of a file's bytes, of the kind of another, block after block as these are read."""
    summed = like.summing()
    for number, block in enumerate(blocks):
        block.result()
        summed.update(host[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES].numpy().data)
    return Digest(like.kind, summed.hexdigest())


def _new_buffer(size: int) -> Tensor:
    """Return page-aligned bytes, in large pages if possible: a layer is a quarter million small ones."""
    buffer = mmap.mmap(-1, _round_up(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without large pages refuses, and small ones do.
        with suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _round_up(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _read_block(path: Path, buffer: Tensor, start: int, size: int) -> None:
    """Read BLOCK_BYTES from `start` into the same offset of the buffer, past the page cache if possible."""
    try:
        _read_into(path, buffer, start, size)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from error


def _read_into(path: Path, buffer: Tensor, start: int, size: int) -> None:
    stop = min(start + BLOCK_BYTES, _round_up(size))
    descriptor, direct = _open_direct(path)
    view = buffer.numpy().data
    try:
        position = start
        while position < min(stop, size):
            try:
                got = os.preadv(descriptor, [view[position:stop]], position)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                os.close(descriptor)
                descriptor, direct = os.open(path, os.O_RDONLY), False
                continue
            if got <= 0:
                raise damaged(path, "became shorter while it was read")
            position += got
            if direct and position < min(stop, size) and position % PAGE_BYTES:
                # A direct read that stopped off a page's edge continues buffered.
                os.close(descriptor)
                descriptor, direct = os.open(path, os.O_RDONLY), False
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
    finally:
        view.release()
        os.close(descriptor)


SAMPLE_BUFFER_BYTES = 64 << 20


def read_rate(paths: Sequence[Path], sample_bytes: int) -> float:
    """Return the bytes per second at which layer files are read, measured on about `sample_bytes`."""
    largest = min(sample_bytes, SAMPLE_BUFFER_BYTES, max(path.stat().st_size for path in paths))
    buffer = _new_buffer(largest)
    # The pages are there before the clock runs, as they are for all layers but the first.
    buffer.zero_()
    done, start = 0, time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        for path in paths:
            size = min(largest, path.stat().st_size)
            parts = [
                pool.submit(_read_block, path, buffer, block, size) for block in range(0, size, BLOCK_BYTES)
            ]
            for part in parts:
                part.result()
            done += size
            if done >= sample_bytes:
                break
    return done / (time.perf_counter() - start)


def _open_direct(path: Path) -> tuple[int, bool]:
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, os.O_RDONLY), False
