"""The store: a converted checkpoint on disk, one file per layer, and a manifest that names them all.

STORE/manifest.json            what it is: form, model, source, files with sizes and digests, its own digest
STORE/manifest.copy.json       the same again
STORE/outside.safetensors      embeddings, final norm, projections, in the source's precision
STORE/layers/000.safetensors   one decoder layer; linears in int8 and NF4 as bitsandbytes serialises them
STORE/tokenizer/               the source's tokenizer files, unchanged
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from lowmem_icl.errors import InputError
from lowmem_icl.model.digests import StoredFile
from lowmem_icl.model.integrity import MANIFEST, check_file, damaged, repair_command
from lowmem_icl.model.nf4 import Nf4Form
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.system.files import forget_pages, sha256_of_file, write_text_atomic
from lowmem_icl.system.progress import Advance

STORE_FORMAT: Literal["lowmem-icl-store/1"] = "lowmem-icl-store/1"
MANIFEST_COPY = "manifest.copy.json"
DIGEST = "digest"
"""A manifest's field with the SHA-256 of all others."""
NON_LAYER = "outside.safetensors"
"""What lies outside the layers; the file keeps the name of older stores, so that these stay readable."""

Weights = Literal["int8", "nf4", "bfloat16", "float32"]


class Source(BaseModel):
    """Where the weights came from; `digest` is over the source's tensors, so it is the same in every form.

    `quantisation` names the form, such as Q4_K_M, that the source's tensors were rounded to before; `notes`
    are what was done at conversion that a reader would not expect. `path` is where a checkpoint folder or a
    GGUF file lay, None where a name alone finds it.
    """

    model_config = ConfigDict(strict=True)
    id: str
    revision: str | None
    digest: str
    quantisation: str | None = None
    notes: list[str] = []
    path: str | None = None

    @model_serializer(mode="wrap")
    def _leave_out_what_is_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that manifests of before, and their digests, stay as they were.
        fields: dict[str, Any] = serialise(self)
        absent: dict[str, Any] = {"quantisation": None, "notes": [], "path": None}
        return {name: value for name, value in fields.items() if name not in absent or value != absent[name]}


class OutlierReport(BaseModel):
    """What conversion saw of activations at or beyond the threshold, on the second half of the fixed text.

    `columns`: outlier columns over all linears; `beyond`: activations at or beyond the threshold;
    `beyond_outside`: those of them in no outlier column; `activations`: all.
    """

    model_config = ConfigDict(strict=True)
    threshold: float
    columns: int
    activations: int
    beyond: int
    beyond_outside: int


class Manifest(BaseModel):
    """The content of manifest.json."""

    model_config = ConfigDict(strict=True)
    format: Literal["lowmem-icl-store/1"]
    weights: Weights
    config: dict[str, Any]
    source: Source
    files: dict[str, StoredFile]
    outliers: OutlierReport | None
    nf4: Nf4Form | None = None

    @model_validator(mode="after")
    def _name_the_form_of_nf4(self) -> "Manifest":
        if (self.weights == "nf4") != (self.nf4 is not None):
            raise ValueError(f"weights {self.weights} need a field 'nf4' where they are nf4, and none else")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_what_is_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        return {name: value for name, value in fields.items() if name != "nf4" or value is not None}

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest, so over every file's SHA-256: the identity of these weights.

        Where the source lay is no part of it, nor are the other digests, which older stores lack.
        """
        fields = self.model_dump(exclude={"source": {"path"}})
        for file in fields["files"].values():
            file.pop("xxh3", None)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """An opened store; its weights are compared with their digests when they are first read."""

    folder: Path
    manifest: Manifest
    tokenizer_folder: Path
    """Folder that AutoTokenizer reads."""

    @cached_property
    def skeleton(self) -> Skeleton:
        """The empty model of the manifest's config."""
        return Skeleton.from_dict(self.manifest.config)

    @property
    def layer_paths(self) -> list[Path]:
        """The layer files in order."""
        return [self.folder / layer_file(layer) for layer in range(self.skeleton.layers)]

    @property
    def layer_bytes(self) -> int:
        """Size of the largest layer file."""
        return max(self.manifest.files[layer_file(layer)].size_bytes for layer in range(self.skeleton.layers))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files named in the manifest."""
        return sum(file.size_bytes for file in self.manifest.files.values())

    @property
    def is_written(self) -> bool:
        """Whether the store is there, or only planned."""
        return is_store(self.folder)


def layer_file(layer: int) -> str:
    """Return a layer file's path inside the store."""
    return f"layers/{layer:03d}.safetensors"


def is_store(folder: Path) -> bool:
    """Tell whether a folder holds a finished store."""
    return (folder / MANIFEST).is_file()


def open_store(folder: Path) -> Store:
    """Open a store, its tokenizer's files compared with their digests; weights are when they are first read.

    Raises InputError naming the file that is missing, foreign, altered or of another size.
    """
    manifest = read_manifest(folder / MANIFEST)
    store = Store(folder, manifest, folder / "tokenizer")
    try:
        layers = store.skeleton.layers
    except InputError as error:
        raise InputError(f"{folder / MANIFEST}: {error}") from error
    # Before a list is made of them: a stranger's number may be any.
    if layers > len(manifest.files):
        raise damaged(folder / MANIFEST, f"lists {len(manifest.files)} files for {layers} layers")
    expected = {layer_file(layer) for layer in range(layers)} | {NON_LAYER}
    for name in sorted(expected - manifest.files.keys()):
        raise damaged(folder / MANIFEST, f"file '{name}' is not listed")
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing; {repair_command(folder)}")
        if path.stat().st_size != file.size_bytes:
            raise damaged(
                path,
                f"expected {file.size_bytes} bytes, got {path.stat().st_size}: truncated or altered",
            )
        if name.startswith("tokenizer/"):
            check_file(path, file.quickest)
    return store


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; raise InputError where it is none, or not as it was written.

    Those of before carry no digest of their own and are taken as they are.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path.parent} is not a finished store: {path.name} cannot be read; convert again"
        ) from error
    try:
        fields = json.loads(content.decode("utf-8"))
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise damaged(
            path, f"field '{field}': {first['msg']}; expected a store of format {STORE_FORMAT}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not JSON in UTF-8 ({str(error)[:200]})") from error
    for name in manifest.files:
        if ".." in Path(name).parts or Path(name).is_absolute() or "\0" in name:
            raise InputError(f"{path}: file {name!r} lies outside the store; do not use this store")
    if DIGEST in fields and fields.pop(DIGEST) != _digest_of_fields(fields):
        raise damaged(path, "is not as it was written: its digest does not match")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a store's manifest with its digest, and its copy, from which it can be mended."""
    fields = manifest.model_dump()
    text = json.dumps(fields | {DIGEST: _digest_of_fields(fields)}, indent=1) + "\n"
    # The manifest comes last: with it the store is finished.
    for name in (MANIFEST_COPY, MANIFEST):
        write_text_atomic(folder / name, text)


def _digest_of_fields(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def verify_store(store: Store, advance: Advance = lambda checked: None) -> None:
    """Compare every file's bytes with its digest; raise InputError naming the first that differs.

    `advance` is called with the bytes of each file.
    """
    for name in altered_files(store.folder, store.manifest, advance):
        raise damaged(store.folder / name, "its bytes differ from the manifest's digest")


def is_sealed(folder: Path) -> bool:
    """Tell whether a manifest stands there with its digest, and its copy beside it."""
    fields = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return DIGEST in fields and (folder / MANIFEST_COPY).is_file()


def altered_files(folder: Path, manifest: Manifest, advance: Advance) -> Iterator[str]:
    """Yield the names of files that are missing, cannot be read, or whose bytes, as the disk has them, differ
    from their digests.
    """
    for name, file in manifest.files.items():
        try:
            forget_pages(folder / name)
            whole = sha256_of_file(folder / name) == file.sha256
        except OSError:
            whole = False
        if not whole:
            yield name
        advance(file.size_bytes)
