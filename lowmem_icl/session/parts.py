"""Pieces of a run in files: named arrays, written whole, found again when the run is continued.

A finished part is `<name>.npz`. One that is being made leaves `<name>.draft.npz` from time to time, and
whenever it is stopped, so that what is lost is never more than the step in progress. What was damaged since,
or is another part's or another run's, is set aside as `<file>.bad` and made again.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.errors import InputError
from lowmem_icl.session.sealed import Arrays, Damaged, read_sealed, write_sealed

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_DRAFTS = 60.0
DRAFT = ".draft.npz"
BAD = ".bad"
JOBS = "jobs"
"""The array of a part that names the jobs that its other arrays are of, in order."""


class Draft:
    """What there is of a part that is being made: the arrays an earlier run left, and those to leave for a
    later one.

    of: what its file is sealed as.
    """

    def __init__(self, path: Path, of: str = "") -> None:
        self._path, self._of = path, of
        self._jobs: NDArray[np.str_] | None = None
        self._arrays: Callable[[], Arrays] | None = None
        self._saved = time.monotonic()

    def is_of(self, jobs: Sequence[str]) -> None:
        """Say which jobs the arrays will be of: what others left is not resumed."""
        self._jobs = np.array(jobs)

    def resume(self, arrays: Callable[[], Arrays]) -> None:
        """Fill the arrays with what an earlier run left, if shapes agree, and save them from now on."""
        self._arrays = arrays
        if not self._path.is_file():
            return
        try:
            ours, left = arrays(), read_sealed(self._path, self._of)
            jobs = left.pop(JOBS, None)
        except Damaged as error:
            logger.warning("%s is damaged (%s); what it held is made again", self._path, error)
            set_aside(self._path)
            return
        if _shapes(ours) == _shapes(left) and _equal(self._jobs, jobs):
            for name, array in ours.items():
                array[...] = left[name]

    def save_if_due(self) -> None:
        """Write the arrays, unless that was done a moment ago."""
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_DRAFTS:
            self.save()

    def save(self) -> None:
        """Write the arrays."""
        if self._arrays is not None:
            jobs = {} if self._jobs is None else {JOBS: self._jobs}
            write_sealed(self._path, {**self._arrays(), **jobs}, self._of)
            self._saved = time.monotonic()

    def discard(self) -> None:
        """Delete what was written."""
        self._path.unlink(missing_ok=True)


class Parts:
    """The parts folder of a run.

    run: what its parts are sealed with, a digest of the run's identity. reused, made: how many were found,
    and how many were not; notes: a sentence on every one that was set aside.
    """

    def __init__(self, folder: Path, run: str = "") -> None:
        self.folder, self._run = folder, run
        self.reused = 0
        self.made = 0
        self.notes: list[str] = []

    def has(self, name: str) -> bool:
        """Tell whether a part is finished."""
        return self._path(name).is_file()

    def read(self, name: str) -> dict[str, NDArray[Any]]:
        """Return a finished part; raise InputError where it cannot be read."""
        path = self._path(name)
        try:
            return read_sealed(path, self._sealed_as(name))
        except (OSError, Damaged) as error:
            raise InputError(f"{path} cannot be read ({error}); run again, which makes it again") from error

    def draft(self, name: str) -> Draft:
        """Return the draft of that name."""
        return Draft(self.folder / f"{name}{DRAFT}", self._sealed_as(name))

    def get_or_make(self, name: str, make: Callable[[Draft], Arrays]) -> dict[str, NDArray[Any]]:
        """Return a finished part, or make and keep it.

        `make` may continue from its draft; however it is stopped, the draft is saved. A part that is damaged
        or that stands in another's place is set aside and made again, which `notes` says.
        """
        arrays = self._found(name)
        if arrays is not None:
            self.reused += 1
            return arrays
        return self._make(name, make)

    def jobs(self, name: str) -> dict[str, Arrays]:
        """Return what a part has of jobs, by the names they were completed with; none where it is missing."""
        arrays = self._found(name) or {}
        names = arrays.pop(JOBS, np.zeros(0, dtype=np.str_)).tolist()
        return dict(zip(names, of_jobs(arrays), strict=True)) if names else {}

    def complete(
        self, name: str, kept: Mapping[str, Arrays], make: Callable[[Draft], Mapping[str, Arrays]]
    ) -> dict[str, Arrays]:
        """Add jobs to those a part has, and keep both; `make` returns them by name, as `get_or_make` has it.

        Where there are none in the end, there is no part.
        """
        every: dict[str, Arrays] = {}

        def made(draft: Draft) -> Arrays:
            every.update({**kept, **make(draft)})
            return {
                **{
                    f"{index}.{field}": array
                    for index, arrays in enumerate(every.values())
                    for field, array in arrays.items()
                },
                **({JOBS: np.array(list(every))} if every else {}),
            }

        self._make(name, made)
        return every

    def _found(self, name: str) -> dict[str, NDArray[Any]] | None:
        """Return a finished part, None where there is none; a damaged one is set aside, which is noted."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            return read_sealed(path, self._sealed_as(name))
        except Damaged as error:
            kept = set_aside(path)
            self.notes.append(
                f"{path.name} of the folder's parts was damaged or is another's ({error}): it was set "
                f"aside as {kept.name} and is made again"
            )
            logger.warning("%s", self.notes[-1])
            return None

    def _make(self, name: str, make: Callable[[Draft], Arrays]) -> dict[str, NDArray[Any]]:
        started = time.monotonic()
        draft = self.draft(name)
        try:
            arrays = dict(make(draft))
        except BaseException:
            # What stopped it is what is to be told, not that the disk is full.
            with suppress(OSError):
                draft.save()
            raise
        if arrays:
            write_sealed(self._path(name), arrays, self._sealed_as(name))
            self.made += 1
            logger.info("part %s made in %.1f s", name, time.monotonic() - started)
        draft.discard()
        return arrays

    def holds_any(self) -> bool:
        """Tell whether any finished part is this run's."""
        for path in self.folder.glob("*.npz"):
            if not path.name.endswith(DRAFT):
                with suppress(OSError, Damaged):
                    read_sealed(path, self._sealed_as(path.stem))
                    return True
        return False

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def _sealed_as(self, name: str) -> str:
        return f"{self._run} {name}"


def _equal(ours: NDArray[np.str_] | None, left: NDArray[Any] | None) -> bool:
    return ours is left is None or (ours is not None and left is not None and np.array_equal(ours, left))


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def set_aside(path: Path) -> Path:
    """Give a file another name, by which nothing reads it, and return that."""
    kept = path.with_name(path.name + BAD)
    os.replace(path, kept)
    return kept


class HasArrays(Protocol):
    """A result of a job."""

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Return its arrays by name."""


def by_job(results: Sequence[HasArrays]) -> dict[str, NDArray[Any]]:
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
