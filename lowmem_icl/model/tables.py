"""A table with a row per word of the vocabulary, in memory or read from its file row by row.

Axis letters: V vocabulary, E width of a row, C ids.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lowmem_icl.model.integrity import damaged
from lowmem_icl.model.reading import TensorLocation

VOCABULARY_BLOCK = 2048


class VocabularyTable:
    """A table [V, E] of a safetensors file, in the source's precision; what it gives is float32 on `device`.

    `in_memory`: held on the device; else nothing is held, and rows are read when they are asked for.
    """

    def __init__(
        self, path: Path, location: TensorLocation, device: torch.device, *, in_memory: bool
    ) -> None:
        self._path, self._location, self._device = path, location, device
        self._rows, self._width = location.shape
        self._row_bytes = self._width * location.dtype.itemsize
        self._file: int | None = os.open(path, os.O_RDONLY)
        self.read_bytes = 0
        self._held: Tensor | None = None
        if in_memory:
            held = torch.empty(location.shape, dtype=location.dtype)
            for start in range(0, self._rows, VOCABULARY_BLOCK):
                held[start : start + VOCABULARY_BLOCK] = self._read(start, VOCABULARY_BLOCK)
            self._held = held.to(device)
            self.close()
            # Counted is what passes read.
            self.read_bytes = 0

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ids [C], [C, E] in float32."""
        if self._held is not None:
            return self._held[ids.to(self._device)].float()
        wanted, where = torch.unique(ids.cpu(), return_inverse=True)
        read = torch.cat([self._read(row, 1) for row in wanted.tolist()])
        return read[where].to(self._device).float()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the table by VOCABULARY_BLOCK rows: the first row's id, and [rows, E] in float32."""
        for start in range(0, self._rows, VOCABULARY_BLOCK):
            if self._held is not None:
                yield start, self._held[start : start + VOCABULARY_BLOCK].float()
            else:
                yield start, self._read(start, VOCABULARY_BLOCK).to(self._device).float()

    def _read(self, first: int, rows: int) -> Tensor:
        assert self._file is not None, "the table is closed"
        rows = min(rows, self._rows - first)
        content = bytearray(rows * self._row_bytes)
        place, left = self._location.offset + first * self._row_bytes, memoryview(content)
        while left:
            count = os.preadv(self._file, [left], place)
            if not count:
                raise damaged(self._path, "became shorter while it was read")
            place, left = place + count, left[count:]
        self.read_bytes += len(content)
        return torch.frombuffer(content, dtype=self._location.dtype).view(rows, self._width)
