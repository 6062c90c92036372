"""A store's bad and missing files made again from its source; good ones are left as they are.

Stopped in any way, the same command goes on: what it has made by then is good.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lowmem_icl.conversion.checkpoint import Checkpoint
from lowmem_icl.conversion.claim import Claim, Conversion
from lowmem_icl.conversion.convert import copy_tokenizer, remake_files
from lowmem_icl.conversion.locate import ModelLocation, calibration_text, locate
from lowmem_icl.conversion.source import find_source
from lowmem_icl.conversion.tied import settle_tied_tables
from lowmem_icl.errors import InputError
from lowmem_icl.model.integrity import MANIFEST
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import (
    MANIFEST_COPY,
    Manifest,
    Store,
    altered_files,
    is_sealed,
    layer_file,
    read_manifest,
    write_manifest,
)
from lowmem_icl.system.files import atomic_path, sha256_of_file
from lowmem_icl.system.progress import Progress, unseen

TOKENIZER = "tokenizer/"


def repair(
    folder: Path, store_dir: Path, *, source: str | None = None, progress: Progress = unseen
) -> list[str]:
    """Mend a store; return the names of the files that were made again.

    `source`: where its source is, if not where the manifest says. Raises InputError where the source is gone,
    or no longer gives the bytes that the manifest names: then no file has been replaced by others.
    """
    manifest, mended = _readable_manifest(folder)
    with progress("verifying", sum(file.size_bytes for file in manifest.files.values()), "bytes") as advance:
        bad = list(altered_files(folder, manifest, advance))
    if bad:
        _make_again(Store(folder, manifest, folder / "tokenizer"), bad, store_dir, source, progress)
        _check_made(folder, manifest, bad, progress)
    if mended or not is_sealed(folder):
        write_manifest(folder, manifest)
    return [*mended, *bad]


def _check_made(folder: Path, manifest: Manifest, made: list[str], progress: Progress) -> None:
    """Compare the disk with what was made again; raise InputError where it differs."""
    files = {name: manifest.files[name] for name in made}
    with progress("verifying", sum(file.size_bytes for file in files.values()), "bytes") as advance:
        for name in altered_files(folder, manifest.model_copy(update={"files": files}), advance):
            raise InputError(
                f"{folder / name} does not hold what was written: the disk may be failing; run the same "
                "command again, or convert to a STORE on another disk"
            )


def _readable_manifest(folder: Path) -> tuple[Manifest, list[str]]:
    """Return a store's manifest, or its copy where it is damaged, and the names of those to write again."""
    try:
        manifest = read_manifest(folder / MANIFEST)
    except InputError as damage:
        try:
            return read_manifest(folder / MANIFEST_COPY), [MANIFEST]
        except InputError:
            raise InputError(
                f"{damage}; but its copy {MANIFEST_COPY} is not there, or damaged as well: delete the "
                "folder and convert the source again"
            ) from damage
    if not (folder / MANIFEST_COPY).exists():
        return manifest, []
    try:
        whole = read_manifest(folder / MANIFEST_COPY) == manifest
    except InputError:
        whole = False
    return manifest, [] if whole else [MANIFEST_COPY]


def _make_again(
    store: Store, bad: list[str], store_dir: Path, source: str | None, progress: Progress
) -> None:
    located = _source_of(store, store_dir, source, progress)
    checkpoint = located.checkpoint
    assert checkpoint is not None
    settle_tied_tables(checkpoint)
    if json.loads(json.dumps(checkpoint.config)) != store.manifest.config:
        raise InputError(
            f"{checkpoint.folder}: its config is not the one that {store.folder} was made from; give the "
            f"source of then: lowmem-icl convert SOURCE {store.folder} --repair"
        )
    tokenizer = [name for name in bad if name.startswith(TOKENIZER)]
    _copy_tokenizer_files(checkpoint, store, tokenizer)
    weights = [name for name in bad if name not in tokenizer]
    if not weights:
        return
    conversion = Conversion(checkpoint, store.folder, store.manifest.weights, located.source_id)
    known = {layer_file(layer): layer for layer in range(Skeleton.from_dict(checkpoint.config).layers)}
    last = max(known.get(name, -1) for name in weights)
    remake_files(conversion, _Repair(conversion, store.manifest, weights), calibration_text(checkpoint), last,
                 progress)  # fmt: skip


def _source_of(store: Store, store_dir: Path, source: str | None, progress: Progress) -> ModelLocation:
    """Return the store's source; its store's place is one that is not there, so that it is read itself."""
    weights = store.manifest.weights
    found = source if source is not None else find_source(store, weights)
    revision = store.manifest.source.revision if source is not None else None
    located = locate(
        found, revision, weights, store_dir, store_folder=store.folder / "repair", progress=progress
    )
    if located.checkpoint is None:
        raise InputError(f"{found} is a store; expected the source that {store.folder} was made from")
    return replace(located, source_id=store.manifest.source.id)


def _copy_tokenizer_files(checkpoint: Checkpoint, store: Store, names: list[str]) -> None:
    with TemporaryDirectory(dir=store.folder, prefix=".", suffix=".partial") as temporary:
        copy_tokenizer(checkpoint, Path(temporary))
        for name in names:
            made = Path(temporary) / name.removeprefix(TOKENIZER)
            if not made.is_file() or sha256_of_file(made) != store.manifest.files[name].sha256:
                raise _differs(store.folder, name)
            with atomic_path(store.folder / name) as path:
                shutil.copyfile(made, path)


def _differs(folder: Path, name: str) -> InputError:
    return InputError(
        f"{folder / name}: made again from the source, it is not what it was: the source has changed, or "
        "another version of lowmem-icl made the store; give the source of then (lowmem-icl convert SOURCE "
        f"{folder} --repair), or convert to a new STORE"
    )


class _Repair(Claim):
    """As an unfinished conversion, whose finished files are the good ones."""

    def __init__(self, conversion: Conversion, manifest: Manifest, bad: list[str]) -> None:
        self.folder, self._manifest = conversion.folder, manifest
        self.files = {name: file for name, file in manifest.files.items() if name not in bad}
        # Just compared with their digests.
        self._whole = set(self.files)

    def _accept(self, name: str, size_bytes: int, digest: str) -> None:
        if (made := self._manifest.files[name]).size_bytes != size_bytes or made.sha256 != digest:
            raise _differs(self.folder, name)

    def abandon(self) -> None:
        """Leave the store where it is."""

    def _save(self) -> None:
        """Write nothing: the manifest's digests tell what is finished."""
