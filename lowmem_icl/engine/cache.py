"""Residuals at layer inputs, kept between the waves of a block and, on request, between sweeps."""

import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from lowmem_icl.masks.mask import Mask
from lowmem_icl.rows import Row
from lowmem_icl.system.files import writes

Key = tuple[str, Mask, int]
WHOLE_MODEL = Mask()


@dataclass(eq=False)
class _Kept:
    """Where a residual [T, D] is: `held` in memory, or in the file at `path`; `last_use` grows with time."""

    shape: torch.Size
    size_bytes: int
    last_use: int
    held: Tensor | None = None
    path: Path | None = None


class CleanCache:
    """Keeps residuals [T, D] of one model's clean run by row and layer, in memory and then in temporary
    files.

    A residual is found by a digest of what it depends on (`Row.residual_digest`), so rows that are packed
    twice share it. A pass over a pruned model names its mask; its residuals are never taken for the clean
    run's.

    What the block in work needs is never given up (see `holding`). Of all else the least recently used goes
    first: out of memory into a file, replacing what is older there, or away. So memory holds
    what is worked on. Use as a context manager: the files go when it is left.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, spill_folder: Path | None = None) -> None:
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        # Both from the least to the most recently used.
        self._in_memory: OrderedDict[Key, _Kept] = OrderedDict()
        self._on_disk: OrderedDict[Key, _Kept] = OrderedDict()
        self._held_bytes = self._written_bytes = self._uses = 0
        self._in_work: frozenset[str] = frozenset()
        self._spill_folder = spill_folder
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._file_count = 0

    def __enter__(self) -> "CleanCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
        if self._files is not None:
            self._files.cleanup()

    def __len__(self) -> int:
        return len(self._in_memory) + len(self._on_disk)

    @contextmanager
    def holding(self, rows: Sequence[Row], *, keep: bool = False) -> Iterator[None]:
        """Give up nothing of these rows inside the context; at its end forget them unless `keep`."""
        before, self._in_work = self._in_work, frozenset(row.residual_digest for row in rows)
        # All of theirs stand behind all others from now on, so that looking for what can go ends at once.
        for store in (self._in_memory, self._on_disk):
            for key in [key for key in store if key[0] in self._in_work]:
                store.move_to_end(key)
        try:
            yield
        finally:
            self._in_work = before
            if not keep:
                self.forget(rows)

    def clear(self) -> None:
        """Forget everything."""
        for key in [*self._in_memory, *self._on_disk]:
            self._remove(key)

    def forget(self, rows: Sequence[Row]) -> None:
        """Forget all residuals of these rows, under every mask."""
        digests = {row.residual_digest for row in rows}
        for key in [key for key in (*self._in_memory, *self._on_disk) if key[0] in digests]:
            self._remove(key)

    def has(self, rows: Sequence[Row], layer: int, mask: Mask = WHOLE_MODEL) -> bool:
        """Tell whether the residuals of all these rows at the input of a layer are there."""
        keys = ((row.residual_digest, mask, layer) for row in rows)
        return all(key in self._in_memory or key in self._on_disk for key in keys)

    def held_rows(self) -> frozenset[str]:
        """Return the digests of the rows that have residuals in memory."""
        return frozenset(digest for digest, _, _ in self._in_memory)

    def keep(self, row: Row, layer: int, residual: Tensor, mask: Mask = WHOLE_MODEL) -> None:
        """Keep a copy of a residual at the input of a layer; what does not fit is not kept."""
        key = (row.residual_digest, mask, layer)
        if key in self._in_memory or key in self._on_disk:
            return
        size = residual.numel() * residual.element_size()
        if self._make_room_in_memory(size):
            # Kept in the machine's memory, wherever the sweep computes.
            self._in_memory[key] = _Kept(residual.shape, size, self._use(), residual.to("cpu", copy=True))
            self._held_bytes += size
        elif self._make_room_on_disk(size, self._use()):
            self._write(key, residual.cpu(), self._uses)

    def get(self, row: Row, layer: int, device: torch.device, mask: Mask = WHOLE_MODEL) -> Tensor:
        """Return the residual that was kept; bitwise the same from memory and from a file."""
        key = (row.residual_digest, mask, layer)
        store = self._in_memory if key in self._in_memory else self._on_disk
        entry = store[key]
        entry.last_use = self._use()
        store.move_to_end(key)
        if entry.held is not None:
            return entry.held.to(device)
        assert entry.path is not None
        return torch.from_numpy(np.fromfile(entry.path, dtype=np.float32)).view(entry.shape).to(device)

    def _use(self) -> int:
        self._uses += 1
        return self._uses

    def _make_room_in_memory(self, size: int) -> bool:
        free = self.memory_bytes - self._held_bytes
        leaving = self._first_idle(self._in_memory, size - free, self._uses + 1)
        if leaving is None:
            return False
        for key in leaving:
            entry = self._in_memory[key]
            assert entry.held is not None
            self._remove(key)
            if self._make_room_on_disk(entry.size_bytes, entry.last_use):
                self._write(key, entry.held, entry.last_use)
        return True

    def _make_room_on_disk(self, size: int, last_use: int) -> bool:
        free = self.disk_bytes - self._written_bytes
        leaving = self._first_idle(self._on_disk, size - free, last_use)
        if leaving is None:
            return False
        for key in leaving:
            self._remove(key)
        return True

    def _first_idle(
        self, store: "OrderedDict[Key, _Kept]", wanted_bytes: int, used_before: int
    ) -> list[Key] | None:
        """Return the least recently used entries that free so many bytes; None where there are none.

        Only entries of rows that are not in work, last used before the time given.
        """
        leaving: list[Key] = []
        for key, entry in store.items():
            if wanted_bytes <= 0 or key[0] in self._in_work or entry.last_use >= used_before:
                break
            leaving.append(key)
            wanted_bytes -= entry.size_bytes
        return leaving if wanted_bytes <= 0 else None

    def _remove(self, key: Key) -> None:
        if key in self._in_memory:
            self._held_bytes -= self._in_memory.pop(key).size_bytes
            return
        entry = self._on_disk.pop(key)
        self._written_bytes -= entry.size_bytes
        assert entry.path is not None
        entry.path.unlink(missing_ok=True)

    def _write(self, key: Key, residual: Tensor, last_use: int) -> None:
        if self._files is None:
            if self._spill_folder is not None:
                self._spill_folder.mkdir(parents=True, exist_ok=True)
            # Leftovers are deleted when the run goes on: not the time to fail.
            self._files = tempfile.TemporaryDirectory(
                prefix="residuals-", dir=self._spill_folder, ignore_cleanup_errors=True
            )
        self._file_count += 1
        path = Path(self._files.name) / f"{self._file_count}.f32"
        with writes(path), path.open("wb") as opened:
            opened.write(residual.contiguous().numpy().data)
        size = residual.numel() * residual.element_size()
        self._on_disk[key] = _Kept(residual.shape, size, last_use, path=path)
        self._written_bytes += size
