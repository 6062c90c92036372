"""Clean residuals at layer inputs, in memory up to an allowance and in files beyond it."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class ResidualCache:
    """Keeps residuals [T, D] by (row, layer); what exceeds `memory_bytes` goes to files in a temporary folder.

    Use as a context manager: the files go when it is left.
    """

    def __init__(self, memory_bytes: int, spill_folder: Path | None = None) -> None:
        self._memory_bytes = memory_bytes
        self._held_bytes = 0
        self._held: dict[tuple[int, int], Tensor] = {}
        self._shapes: dict[tuple[int, int], torch.Size] = {}
        self._spill_folder = spill_folder
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "ResidualCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._files is not None:
            self._files.cleanup()

    def keep(self, row: int, layer: int, residual: Tensor) -> None:
        """Keep a copy of a clean residual at the input of a layer."""
        size = residual.numel() * residual.element_size()
        self._shapes[row, layer] = residual.shape
        if self._held_bytes + size <= self._memory_bytes:
            # Kept in the machine's memory, wherever the sweep computes.
            self._held[row, layer] = residual.to("cpu", copy=True)
            self._held_bytes += size
        else:
            residual.cpu().numpy().tofile(self._path(row, layer))

    def get(self, row: int, layer: int, device: torch.device) -> Tensor:
        """Return the residual that was kept; bitwise the same from memory and from a file."""
        held = self._held.get((row, layer))
        if held is None:
            held = torch.from_numpy(np.fromfile(self._path(row, layer), dtype=np.float32))
        return held.to(device).view(self._shapes[row, layer])

    def _path(self, row: int, layer: int) -> Path:
        if self._files is None:
            if self._spill_folder is not None:
                self._spill_folder.mkdir(parents=True, exist_ok=True)
            self._files = tempfile.TemporaryDirectory(prefix="residuals-", dir=self._spill_folder)
        return Path(self._files.name) / f"{row}-{layer}.f32"
