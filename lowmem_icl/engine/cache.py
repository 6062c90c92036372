"""Clean residuals at layer inputs, kept between waves and between sweeps of the same rows."""

import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from lowmem_icl.rows import Row

Key = tuple[Row, int]


@dataclass(frozen=True)
class _Kept:
    """Where a residual is: in memory, or in a file of this shape."""

    size_bytes: int
    held: Tensor | None
    path: Path | None
    shape: torch.Size


class CleanCache:
    """Keeps residuals [T, D] by row and layer: in memory up to an allowance, in files of a temporary folder up to another.

    What was used longest ago goes first. Use as a context manager: the files go when it is left.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, spill_folder: Path | None = None) -> None:
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._held_bytes = self._written_bytes = 0
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._spill_folder = spill_folder
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0

    def __enter__(self) -> "CleanCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        if self._files is not None:
            self._files.cleanup()

    def clear(self) -> None:
        """Forget everything: other rows, or the same under a mask, come next."""
        while self._kept:
            self._forget(next(iter(self._kept)))

    def has(self, rows: Sequence[Row], layer: int) -> bool:
        """Tell whether the residuals of all these rows at the input of a layer are there."""
        return all((row, layer) in self._kept for row in rows)

    def keep(self, row: Row, layer: int, residual: Tensor) -> None:
        """Keep a copy of a clean residual at the input of a layer; what does not fit at all is not kept."""
        size = residual.numel() * residual.element_size()
        if (row, layer) in self._kept or size > max(self._memory_bytes, self._disk_bytes):
            return
        while not self._fits(size):
            self._forget(next(iter(self._kept)))
        if self._held_bytes + size <= self._memory_bytes:
            # Kept in the machine's memory, wherever the sweep computes.
            entry = _Kept(size, residual.to("cpu", copy=True), None, residual.shape)
            self._held_bytes += size
        else:
            path = self._new_path()
            residual.cpu().numpy().tofile(path)
            entry = _Kept(size, None, path, residual.shape)
            self._written_bytes += size
        self._kept[row, layer] = entry

    def get(self, row: Row, layer: int, device: torch.device) -> Tensor:
        """Return the residual that was kept; bitwise the same from memory and from a file."""
        entry = self._kept[row, layer]
        self._kept.move_to_end((row, layer))
        if entry.held is not None:
            return entry.held.to(device)
        assert entry.path is not None
        return torch.from_numpy(np.fromfile(entry.path, dtype=np.float32)).view(entry.shape).to(device)

    def _fits(self, size: int) -> bool:
        return self._held_bytes + size <= self._memory_bytes or self._written_bytes + size <= self._disk_bytes

    def _forget(self, key: Key) -> None:
        entry = self._kept.pop(key)
        if entry.path is None:
            self._held_bytes -= entry.size_bytes
        else:
            self._written_bytes -= entry.size_bytes
            entry.path.unlink()

    def _new_path(self) -> Path:
        if self._files is None:
            if self._spill_folder is not None:
                self._spill_folder.mkdir(parents=True, exist_ok=True)
            self._files = tempfile.TemporaryDirectory(prefix="residuals-", dir=self._spill_folder)
        self._written += 1
        return Path(self._files.name) / f"{self._written}.f32"
