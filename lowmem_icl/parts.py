"""Finished pieces of a run: named arrays in files, written whole, found again when the run is continued."""

import logging
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.errors import InputError
from lowmem_icl.files import atomic_path

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]


class Parts:
    """The parts folder of a run; a part is an .npz of plain arrays, read without pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reused = 0
        self.made = 0

    def has(self, name: str) -> bool:
        """Tell whether a part is finished."""
        return self._path(name).is_file()

    def get_or_make(self, name: str, make: Callable[[], Arrays]) -> dict[str, NDArray[Any]]:
        """Return a finished part, or make and keep it; raise InputError naming a part that cannot be read."""
        path = self._path(name)
        if path.is_file():
            self.reused += 1
            try:
                with np.load(path, allow_pickle=False) as stored:
                    return {key: stored[key] for key in stored.files}
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise InputError(f"{path} cannot be read ({error}); delete it and run again") from error
        started = time.monotonic()
        arrays = dict(make())
        with atomic_path(path) as beside, beside.open("wb") as opened:
            np.savez(opened, allow_pickle=False, **arrays)
        self.made += 1
        logger.info("part %s made in %.1f s", name, time.monotonic() - started)
        return arrays

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"
