"""A folder that one conversion works in, and what of its store is finished."""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from lowmem_icl.conversion.checkpoint import Checkpoint, read_json
from lowmem_icl.conversion.store_lock import CLAIM_FILE, is_of_lock
from lowmem_icl.errors import InputError
from lowmem_icl.model.store import NON_LAYER, Store, StoredFile, Weights
from lowmem_icl.model.writing import save_one_by_one, save_tensors, source_digests
from lowmem_icl.system.files import forget_pages, sha256_of_file, write_text_atomic

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"layers/\d{3,}\.safetensors")
_PIECE = re.compile(_LAYER.pattern + r"\.piece")


@dataclass(frozen=True)
class Conversion:
    """What is to become which store: a checkpoint, its folder and form, what the source is called, and where
    it lies if no name finds it.

    `made_before`: a store that must have been made from the same tensors.
    """

    checkpoint: Checkpoint
    folder: Path
    weights: Weights
    source_id: str
    revision: str | None = None
    source_path: Path | None = None
    made_before: Store | None = None

    def check_source(self, name: str, digests: Mapping[str, str]) -> None:
        """Compare the source's tensors, by their digests, with those that a file of `made_before` was made
        from; raise InputError naming the first that differs.
        """
        if self.made_before is None:
            return
        known = source_digests(self.made_before.folder / name)
        for parameter in sorted(digests):
            if known.get(parameter) != digests[parameter]:
                source = self.source_path or self.source_id
                raise InputError(
                    f"{source}: parameter '{parameter}' is not the one that {self.made_before.folder} was "
                    "made from: the source has changed; give the one of then, or convert this one for "
                    f"itself: lowmem-icl convert {source} --weights {self.weights}"
                )


class Claim:
    """Marks a folder as one conversion's, and keeps what is finished: names, sizes and digests of files."""

    def __init__(self, conversion: Conversion) -> None:
        folder = conversion.folder
        self.folder, self.path = folder, folder / CLAIM_FILE
        self.files: dict[str, StoredFile] = {}
        self._whole: set[str] = set()
        self._identity = {
            "source": conversion.source_id,
            "revision": conversion.revision,
            "weights": conversion.weights,
            "config": conversion.checkpoint.config,
            "source_bytes": conversion.checkpoint.size_bytes,
        }
        if self.path.is_file():
            kept = read_json(self.path)
            if {name: kept.get(name) for name in self._identity} != json.loads(json.dumps(self._identity)):
                raise InputError(
                    f"{folder} holds an unfinished conversion of something else; delete it or choose "
                    "another STORE"
                )
            self.files = {
                name: file
                for name, file in _files_of(self.path, kept).items()
                if (folder / name).is_file() and (folder / name).stat().st_size == file.size_bytes
            }
        elif folder.exists() and not all(map(is_of_lock, folder.iterdir())):
            raise InputError(
                f"{folder} is not empty and holds no unfinished conversion; choose another STORE"
            )
        else:
            self._save()

    def holds(self, name: str) -> bool:
        """Tell whether a file is finished; one of an earlier process is compared with its digest first.

        One that differs is deleted, and what was decided from it, so that both are made again.
        """
        if name not in self.files or name in self._whole or self._is_whole(name):
            self._whole.add(name)
            return name in self.files
        decided = decided_from(name, self.files) if self._identity["weights"] == "int8" else []
        logger.warning("%s is damaged and is made again", self.folder / name)
        for bad in (name, *decided):
            self.forget(bad)
        return False

    def _is_whole(self, name: str) -> bool:
        try:
            forget_pages(self.folder / name)
            return sha256_of_file(self.folder / name) == self.files[name].sha256
        except OSError:
            return False

    def forget(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.files.pop(name, None) is not None:
            self._whole.discard(name)
            self._save()
        (self.folder / name).unlink(missing_ok=True)

    def write(self, name: str, tensors: dict[str, Tensor], digests: dict[str, str]) -> None:
        """Write a file of the store; its digest is of the bytes in memory, not of what the disk returns."""
        accept = partial(self._accept, name)
        self._finish(name, *save_tensors(self.folder / name, tensors, digests, accept))

    def write_one_by_one(
        self, name: str, tensors: Iterable[tuple[str, Tensor]], digests: Mapping[str, str]
    ) -> None:
        """Write a file of the store from tensors as they come."""
        accept = partial(self._accept, name)
        self._finish(name, *save_one_by_one(self.folder / name, tensors, digests, accept))

    def _accept(self, name: str, size_bytes: int, digest: str) -> None:
        """Raise InputError where a file, which has its name not yet, is not to have it."""

    def _finish(self, name: str, size_bytes: int, digest: str) -> None:
        self.files[name] = StoredFile(size_bytes=size_bytes, sha256=digest)
        self._whole.add(name)
        self._save()

    def abandon(self) -> None:
        """Delete what was begun where no file is finished, the claim last; the folder goes with its lock,
        unless it was there before.
        """
        if self.files:
            return
        for entry in self.folder.iterdir():
            if entry != self.path and not is_of_lock(entry):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.path.unlink()
        # Where the disk takes no locks.
        with suppress(OSError):
            self.folder.rmdir()

    def _save(self) -> None:
        files = {name: file.model_dump() for name, file in self.files.items()}
        write_text_atomic(self.path, json.dumps(self._identity | {"files": files}, indent=1) + "\n")


def decided_from(name: str, names: Iterable[str]) -> list[str]:
    """Return the layers, of an int8 store's files, whose outlier columns were decided from what a file holds:
    all that come after it.
    """
    layers = [other for other in names if _LAYER.fullmatch(other)]
    if name == NON_LAYER:
        return layers
    # Longer numbers are larger ones.
    return [other for other in layers if _LAYER.fullmatch(name) and (len(other), other) > (len(name), name)]


def _files_of(path: Path, kept: Mapping[str, Any]) -> dict[str, StoredFile]:
    """Return the files that a claim names, without those that no conversion writes; raise InputError."""
    try:
        files = {name: StoredFile.model_validate(fields) for name, fields in kept.get("files", {}).items()}
    except (AttributeError, ValidationError) as error:
        raise InputError(
            f"{path}: expected files with sizes and digests, got others; delete the folder and convert again"
        ) from error
    return {
        name: file
        for name, file in files.items()
        if name == NON_LAYER or _LAYER.fullmatch(name) or _PIECE.fullmatch(name)
    }


def finished_bytes(folder: Path) -> int:
    """Return how many bytes of a store an earlier, stopped conversion has written."""
    written = [folder / NON_LAYER, *folder.glob("layers/*.safetensors")]
    return sum(path.stat().st_size for path in written if path.is_file())
