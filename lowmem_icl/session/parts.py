"""Pieces of a run in files: named arrays, written whole, found again when the run is continued.

A finished part is `<name>.npz`. One that is being made leaves `<name>.draft.npz` from time to time, and
whenever it is stopped, so that what is lost is never more than the step in progress.
"""

import logging
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.errors import InputError
from lowmem_icl.system.files import atomic_path

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_DRAFTS = 60.0

Arrays = Mapping[str, NDArray[Any]]


class Draft:
    """What there is of a part that is being made: the arrays an earlier run left, and those to leave for a
    later one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._arrays: Callable[[], Arrays] | None = None
        self._saved = time.monotonic()

    def resume(self, arrays: Callable[[], Arrays]) -> None:
        """Fill the arrays with what an earlier run left, if shapes agree, and save them from now on."""
        self._arrays = arrays
        if not self._path.is_file():
            return
        ours, left = arrays(), _read(self._path)
        if _shapes(ours) == _shapes(left):
            for name, array in ours.items():
                array[...] = left[name]

    def save_if_due(self) -> None:
        """Write the arrays, unless that was done a moment ago."""
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_DRAFTS:
            self.save()

    def save(self) -> None:
        """Write the arrays."""
        if self._arrays is not None:
            _write(self._path, self._arrays())
            self._saved = time.monotonic()

    def discard(self) -> None:
        """Delete what was written."""
        self._path.unlink(missing_ok=True)


class Parts:
    """The parts folder of a run; a part is an .npz of plain arrays, read without pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reused = 0
        self.made = 0

    def has(self, name: str) -> bool:
        """Tell whether a part is finished."""
        return self._path(name).is_file()

    def read(self, name: str) -> dict[str, NDArray[Any]]:
        """Return a finished part; raise InputError where it cannot be read."""
        return _read(self._path(name))

    def draft(self, name: str) -> Draft:
        """Return the draft of that name."""
        return Draft(self.folder / f"{name}.draft.npz")

    def get_or_make(self, name: str, make: Callable[[Draft], Arrays]) -> dict[str, NDArray[Any]]:
        """Return a finished part, or make and keep it; raise InputError naming a part that cannot be read.

        `make` may continue from its draft; however it is stopped, the draft is saved.
        """
        path = self._path(name)
        if path.is_file():
            self.reused += 1
            return _read(path)
        started = time.monotonic()
        draft = self.draft(name)
        try:
            arrays = dict(make(draft))
        except BaseException:
            draft.save()
            raise
        _write(path, arrays)
        draft.discard()
        self.made += 1
        logger.info("part %s made in %.1f s", name, time.monotonic() - started)
        return arrays

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _write(path: Path, arrays: Arrays) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as opened:
        np.savez(opened, allow_pickle=False, **arrays)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and run again") from error


class _HasArrays(Protocol):
    def arrays(self) -> Mapping[str, NDArray[Any]]: ...


def by_job(results: Sequence[_HasArrays]) -> dict[str, NDArray[Any]]:
    """Return the arrays of all jobs by `<job>.<name>`."""
    return {
        f"{index}.{name}": array
        for index, result in enumerate(results)
        for name, array in result.arrays().items()
    }


def of_jobs(arrays: dict[str, NDArray[Any]]) -> list[dict[str, NDArray[Any]]]:
    """Return what `by_job` was made of, by job."""
    jobs: dict[int, dict[str, NDArray[Any]]] = {}
    for key, array in arrays.items():
        index, _, name = key.partition(".")
        jobs.setdefault(int(index), {})[name] = array
    return [jobs[index] for index in sorted(jobs)]
