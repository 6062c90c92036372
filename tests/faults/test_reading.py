"""A disk that fails while layers are read: what is read into is used again only once nobody writes there."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowmem_icl.errors import InputError
from lowmem_icl.model import reading
from lowmem_icl.model.reading import LayerReader
from lowmem_icl.model.store import Store


class SlowDisk:
    """Reads of several blocks at once, of which one fails at once, the others later; how many are at work."""

    def __init__(self, fails: int) -> None:
        self.fails, self.at_work = fails, 0
        self._lock, self._read_block = threading.Lock(), reading._read_block

    def read_block(self, path: Path, buffer: torch.Tensor, start: int, size: int) -> None:
        with self._lock:
            self.at_work += 1
        try:
            if start == self.fails:
                raise InputError(f"{path}: {os.strerror(errno.EIO)}")
            time.sleep(0.05)
            self._read_block(path, buffer, start, size)
        finally:
            with self._lock:
                self.at_work -= 1


@pytest.mark.parametrize("order", [[0, 1], [1, 0, 2, 1]])
@pytest.mark.parametrize("resident", [frozenset(), frozenset({0, 1})])
def test_where_a_block_cannot_be_read_the_others_are_waited_for(
    resident: frozenset[int], order: list[int], float_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", reading.PAGE_BYTES)
    digests = [file.sha256 for name, file in float_store.manifest.files.items() if name.startswith("layers")]
    reader = LayerReader(float_store.layer_paths, resident, digests=digests)
    disk = SlowDisk(fails=0)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_read_block", disk.read_block)
        with pytest.raises(InputError, match="Input/output error"):
            next(reader.layers(order))
        assert disk.at_work == 0
    # The same buffers, which nobody writes into any more.
    for layer, tensors in reader.layers(order):
        expected: Any = load_file(float_store.layer_paths[layer])
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    reader.close()
