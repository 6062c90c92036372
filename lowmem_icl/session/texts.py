"""Texts and rows of tasks, kept on disk so that `plan`, `run` and a continued run make them once.

    <store dir>/texts/<key>/prompts.safetensors    prompts of one task at one shot count, and their tokens
    <store dir>/texts/<key>/rows-<digest>.npz      rows that some of its documents were packed into

A key is a digest of all that its content depends on, so a file is never out of date. Files are checked when
they are read; one that is damaged is made again, and where the folder cannot be written to, what it would
hold stays in memory.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.rows import PackedRows
from lowmem_icl.session.sealed import Damaged, digest_of, read_sealed, write_sealed
from lowmem_icl.system.files import atomic_path
from lowmem_icl.system.tensor_files import TensorContent, write_tensor_file
from lowmem_icl.tasks.prompt_table import PromptTable
from lowmem_icl.tasks.row_arrays import arrays_of_rows, outline_of_arrays, rows_of_arrays

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]

FOLDER = "texts"
TABLE_FILE = "prompts.safetensors"
RECENT_BYTES = 16 << 20
"""How much of the rows used last stays in memory."""
# Token, position, end and owner, as int64, and a little for the answers.
ROW_TOKEN_BYTES = 48
_TYPES = {"BOOL": np.bool_, "U8": np.uint8, "I32": np.int32, "I64": np.int64}
_DAMAGED = (OSError, ValueError, KeyError, Damaged)


class KeptTexts:
    """The folder of texts, or what stands in for it in memory; outlines of rows are small, and stay in memory
    besides.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._in_memory: dict[Path, Arrays] = {}
        self._outlines: dict[Path, PackedRows] = {}
        self._recent: OrderedDict[Path, PackedRows] = OrderedDict()

    def table(self, key: str, make: Callable[[], Arrays], *, again: bool = False) -> tuple[PromptTable, str]:
        """Return the prompts of a key and a digest of them; those on disk, unless they are to be made
        `again`.
        """
        path = self.folder / key / TABLE_FILE
        if not again:
            try:
                return _mapped_table(path)
            except FileNotFoundError:
                pass
            except _DAMAGED as error:
                logger.warning("%s is damaged (%s) and is made again", path, error)
        arrays = make()
        digest = digest_of(arrays)
        try:
            with atomic_path(path, sync=False) as temporary:
                write_tensor_file(temporary, _contents(arrays), {"digest": digest})
            # From here on the tokens lie in the file, not in memory.
            return _mapped_table(path)
        except OSError as error:
            logger.info("%s cannot be kept (%s); its texts stay in memory", path, error)
        return PromptTable(arrays), digest

    def has_table(self, key: str) -> bool:
        """Tell whether the prompts of a key are there."""
        return (self.folder / key / TABLE_FILE).is_file()

    def rows(self, key: str, name: str, plan: Callable[[], PackedRows]) -> PackedRows:
        """Return rows by name, packed by `plan` where that was never done."""
        path, of = self._rows_file(key, name)
        kept = self._recent.pop(path, None) or self._kept(path, of, rows_of_arrays)
        rows = kept or self._keep(path, of, plan())
        self._recent[path] = rows
        # A search asks for the same few rows at every step.
        while len(self._recent) > 1 and sum(map(_size_bytes, self._recent.values())) > RECENT_BYTES:
            self._recent.popitem(last=False)
        return rows

    def outline(self, key: str, name: str, plan: Callable[[], PackedRows]) -> PackedRows:
        """Return outlines of the rows by name: their sizes and no content. The file is read whole, and
        checked, once.
        """
        path, of = self._rows_file(key, name)
        if path not in self._outlines:
            outline = self._kept(path, of, outline_of_arrays)
            if outline is None:
                outline = outline_of_arrays(arrays_of_rows(self._keep(path, of, plan())))
            self._outlines[path] = outline
        return self._outlines[path]

    def _rows_file(self, key: str, name: str) -> tuple[Path, str]:
        """Return where rows are, and what their file is sealed as being of."""
        return self.folder / key / f"rows-{name}.npz", f"{key}/{name}"

    def _kept(self, path: Path, of: str, read: Callable[[Arrays], PackedRows]) -> PackedRows | None:
        if path in self._in_memory:
            return read(self._in_memory[path])
        try:
            return read(read_sealed(path, of))
        except FileNotFoundError:
            return None
        except _DAMAGED as error:
            logger.warning("%s is damaged (%s) and is made again", path, error)
            return None

    def _keep(self, path: Path, of: str, rows: PackedRows) -> PackedRows:
        arrays = arrays_of_rows(rows)
        try:
            write_sealed(path, arrays, of, sync=False)
        except OSError as error:
            logger.info("%s cannot be kept (%s); its rows stay in memory", path, error)
            self._in_memory[path] = arrays
        return rows


def _contents(arrays: Arrays) -> dict[str, TensorContent]:
    names = {np.dtype(dtype): name for name, dtype in _TYPES.items()}
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return {
        name: TensorContent(names[array.dtype], array.shape, array.nbytes, partial(_bytes_of, array))
        for name, array in whole.items()
    }


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _size_bytes(rows: PackedRows) -> int:
    """Return about how much memory rows take."""
    return ROW_TOKEN_BYTES * rows.token_count


def _mapped_table(path: Path) -> tuple[PromptTable, str]:
    """Return the table of a file, its arrays mapped rather than read, and its digest, which is checked."""
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    header_end = 8 + int(content[:8].view(np.uint64)[0])
    header = json.loads(bytes(content[8:header_end]))
    digest = header.pop("__metadata__")["digest"]
    arrays = {}
    for name, entry in header.items():
        begin, end = (header_end + offset for offset in entry["data_offsets"])
        arrays[name] = content[begin:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    if digest_of(arrays) != digest:
        raise ValueError("its digest does not match")
    return PromptTable(arrays), digest
