"""A checkpoint into a store, layer by layer; a stopped conversion continues at the layer where it was.

In memory at any time: one layer in the source's precision and as converted, or one of the vocabulary's
tables; the open shard's pages; and the fixed text's residuals (int8 only).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowmem_icl.conversion.calibration import CalibrationPass, CalibrationText
from lowmem_icl.conversion.checkpoint import TOKENIZER_FILES, Checkpoint
from lowmem_icl.conversion.checks import check_layer_count, check_written
from lowmem_icl.conversion.claim import Claim, Conversion
from lowmem_icl.conversion.source_digest import combined_digest, stored_parameters, tensor_digest
from lowmem_icl.conversion.tied import settle_tied_tables
from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.model.digests import StoredFile, stored_file
from lowmem_icl.model.int8 import OUTLIER_THRESHOLD, quantise_rows
from lowmem_icl.model.nf4 import Nf4Form, quantise_nf4, stored_bytes
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import (
    NON_LAYER,
    STORE_FORMAT,
    Manifest,
    OutlierReport,
    Source,
    Store,
    Weights,
    layer_file,
    open_store,
    write_manifest,
)
from lowmem_icl.model.vocabulary import Vocabulary
from lowmem_icl.model.writing import source_digests
from lowmem_icl.system.files import atomic_path, free_bytes, write_text_atomic
from lowmem_icl.system.progress import Progress, unseen

FLOAT_BYTES = 4
STORED_TYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NON_LAYER_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What is kept in the source's precision; of anything else float32 is stored, in which it computes anyway."""
MARGIN_BYTES = 64 << 20


def planned_store(checkpoint: Checkpoint, folder: Path, weights: Weights) -> Store:
    """Return the store that a checkpoint would become, its files' sizes worked out and nothing written.

    Sizes leave out the outlier columns, which are not known yet: a thousandth of a layer.
    """
    skeleton = Skeleton.from_dict(checkpoint.config)
    linears = {f"{name}.weight" for name in skeleton.linear_names()}
    layer_elements, layer_size = 0, 0
    for name, shape in skeleton.layer_parameters().items():
        elements = torch.Size(shape).numel()
        layer_elements += elements
        layer_size += _linear_bytes(shape, weights) if name in linears else FLOAT_BYTES * elements
    non_layer = sum(torch.Size(shape).numel() for shape in skeleton.non_layer_parameters().values())
    parameters = non_layer + skeleton.layers * layer_elements
    element = checkpoint.float_bytes or _bytes_per_element(checkpoint, parameters)
    sizes = {NON_LAYER: non_layer * element} | {layer_file(n): layer_size for n in range(skeleton.layers)}
    manifest = Manifest(
        format=STORE_FORMAT,
        weights=weights,
        config=checkpoint.config,
        source=Source(id="planned", revision=None, digest="", notes=list(checkpoint.notes)),
        files={name: StoredFile(size_bytes=size, sha256="0" * 64) for name, size in sizes.items()},
        outliers=None,
        nf4=Nf4Form() if weights == "nf4" else None,
    )
    return Store(folder, manifest, checkpoint.folder)


def _linear_bytes(shape: tuple[int, ...], weights: Weights) -> int:
    """Return how many bytes the weight of a linear, [outputs, inputs], takes in a store."""
    elements = torch.Size(shape).numel()
    if weights == "nf4":
        return stored_bytes(shape)
    if weights == "int8":
        return elements + FLOAT_BYTES * shape[0]
    return elements * STORED_TYPE[weights].itemsize


def _bytes_per_element(checkpoint: Checkpoint, parameters: int) -> int:
    """Return how wide a checkpoint's elements are; where there are no weights yet, as its config says."""
    if not checkpoint.size_bytes:
        dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
        return FLOAT_BYTES if dtype == "float32" else FLOAT_BYTES // 2
    # A checkpoint may hold a tied unembedding twice, so its bytes tell the precision only about.
    return FLOAT_BYTES if checkpoint.size_bytes > 3 * parameters else FLOAT_BYTES // 2


def check_room(folder: Path, size_bytes: int) -> int:
    """Return the free bytes of the disk a folder is on; raise DoesNotFit where `size_bytes` is more."""
    free = free_bytes(folder)
    if size_bytes + MARGIN_BYTES > free:
        raise DoesNotFit(
            f"{size_bytes / 1e9:.3g} GB are needed in {folder}, {free / 1e9:.3g} GB are free; "
            "free some space, choose another folder with --store-dir, or, for a hub id, convert it first "
            "with lowmem-icl convert --delete-shards"
        )
    return free


def convert(conversion: Conversion, text: CalibrationText, *, progress: Progress = unseen) -> Store:
    """Write a checkpoint as a store, check its bytes and return it opened.

    Shards are asked for one after the other, and released after the last layer that needs them. Raises
    InputError naming a parameter that is missing or of another shape, or a folder that holds a store of
    another source.
    """
    checkpoint, folder = conversion.checkpoint, conversion.folder
    settle_tied_tables(checkpoint)
    skeleton = Skeleton.from_dict(checkpoint.config)
    check_layer_count(checkpoint, skeleton)
    claim = Claim(conversion)
    copy_tokenizer(checkpoint, folder / "tokenizer")
    steps = _Steps(checkpoint, skeleton, claim, conversion.weights)
    if not claim.holds(NON_LAYER):
        _write_non_layer(conversion, claim, steps)
    digests = source_digests(folder / NON_LAYER)
    calibration = None
    if conversion.weights == "int8":
        calibration = _start_calibration(skeleton, folder / NON_LAYER, text)
    with progress("converting", skeleton.layers, "layers") as advance:
        for layer in range(skeleton.layers):
            _convert_layer(layer, conversion, claim, steps, calibration)
            digests |= source_digests(folder / layer_file(layer))
            advance(1)
    checkpoint.shards.clean()
    manifest = Manifest(
        format=STORE_FORMAT,
        weights=conversion.weights,
        config=checkpoint.config,
        source=Source(
            id=conversion.source_id,
            revision=conversion.revision,
            digest=combined_digest(digests),
            quantisation=checkpoint.quantisation,
            notes=list(checkpoint.notes),
            path=None if conversion.source_path is None else str(conversion.source_path),
        ),
        files=claim.files | _tokenizer_files(folder),
        outliers=None if calibration is None else _outlier_report(calibration.counts),
        nf4=Nf4Form() if conversion.weights == "nf4" else None,
    )
    check_written(folder, manifest, skeleton, progress)
    write_manifest(folder, manifest)
    claim.path.unlink()
    return open_store(folder)


def remake_files(
    conversion: Conversion, claim: Claim, text: CalibrationText, last_layer: int, progress: Progress
) -> None:
    """Write those files of a store, up to a layer, that its claim does not hold; -1: none but the tables'."""
    checkpoint, folder = conversion.checkpoint, conversion.folder
    skeleton = Skeleton.from_dict(checkpoint.config)
    steps = _Steps(checkpoint, skeleton, claim, conversion.weights)
    if not claim.holds(NON_LAYER):
        _write_non_layer(conversion, claim, steps)
    calibration = None
    if conversion.weights == "int8" and last_layer >= 0:
        calibration = _start_calibration(skeleton, folder / NON_LAYER, text)
    with progress("repairing", last_layer + 1, "layers") as advance:
        for layer in range(last_layer + 1):
            _convert_layer(layer, conversion, claim, steps, calibration)
            advance(1)
    checkpoint.shards.clean()


def _tokenizer_files(folder: Path) -> dict[str, StoredFile]:
    """Return the sizes and digests of the tokenizer's files in a store."""
    return {f"tokenizer/{path.name}": stored_file(path) for path in sorted((folder / "tokenizer").iterdir())}


def _start_calibration(skeleton: Skeleton, non_layer: Path, text: CalibrationText) -> CalibrationPass:
    if max(text.tokens) >= skeleton.vocabulary:
        raise InputError(
            f"the tokenizer next to the weights knows token {max(text.tokens)}, the model only "
            f"{skeleton.vocabulary} tokens; they do not belong together"
        )
    vocabulary = Vocabulary(skeleton, non_layer, torch.device("cpu"), in_memory=False)
    try:
        return CalibrationPass.start(vocabulary, text.rows(skeleton.context_tokens))
    finally:
        vocabulary.close()


def _write_non_layer(conversion: Conversion, claim: Claim, steps: "_Steps") -> None:
    tensors, digests = steps.non_layer()

    def checked() -> Iterator[tuple[str, Tensor]]:
        yield from tensors
        conversion.check_source(NON_LAYER, digests)

    try:
        claim.write_one_by_one(NON_LAYER, checked(), digests)
    except InputError:
        claim.abandon()
        raise


def _convert_layer(
    layer: int,
    conversion: Conversion,
    claim: Claim,
    steps: "_Steps",
    calibration: CalibrationPass | None,
) -> None:
    """Write a layer that is not there yet; in any case take the fixed text through it."""
    name = layer_file(layer)
    kept = claim.holds(name)
    if kept:
        steps.forget_piece(layer)
    if kept and calibration is None:
        return
    tensors, digests = (load_file(claim.folder / name), {}) if kept else steps.tensors(layer)
    conversion.check_source(name, digests)
    if calibration is not None:
        tensors |= calibration.columns_of(layer, tensors, decide=not kept)
    if not kept:
        claim.write(name, tensors, digests)
        steps.forget_piece(layer)


class _Steps:
    """Takes parameters out of the shards in the order of the layers, those outside the layers
    (non-layer) first.

    Before a fetched shard is deleted, what it held of an unfinished layer is kept as a piece.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, claim: Claim, weights: Weights) -> None:
        self._checkpoint, self._skeleton = checkpoint, skeleton
        self._claim, self._weights = claim, weights
        self._linears = {f"{name}.weight" for name in skeleton.linear_names()}

    def _parameters(self, layer: int | None) -> dict[str, tuple[str, tuple[int, ...]]]:
        return stored_parameters(self._checkpoint, self._skeleton, layer)

    def _shard(self, name: str) -> str:
        return self._checkpoint.shard_of.get(self._checkpoint.source_name(name), "")

    @cached_property
    def _last_use(self) -> dict[str, int]:
        """The last layer that needs a shard; -1 where only non-layer parameters do."""
        last = {self._shard(name): -1 for name in self._parameters(None)}
        for layer in range(self._skeleton.layers):
            last |= {self._shard(name): layer for name in self._parameters(layer)}
        return last

    def forget_piece(self, layer: int) -> None:
        """Delete what was kept of a layer that is finished."""
        self._claim.forget(_piece(layer))

    def non_layer(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, str]]:
        """Return the parameters outside the layers as they are read, and their digests, which grow with them.

        Small ones come first, the widest types before the others, and the vocabulary's tables last.
        """
        digests: dict[str, str] = {}
        wanted = self._parameters(None)
        tables = {self._skeleton.embedding_name, self._skeleton.unembedding_name}

        def read(name: str) -> tuple[str, Tensor]:
            short, shape = wanted[name]
            tensor, digests[name] = _fetch(self._checkpoint, name, shape)
            return short, self._non_layer_form(short, tensor)

        def all_in_order() -> Iterator[tuple[str, Tensor]]:
            names = sorted(wanted, key=self._shard)
            small = [read(name) for name in names if wanted[name][0] not in tables]
            yield from sorted(small, key=lambda named: -named[1].dtype.itemsize)
            for name in names:
                if wanted[name][0] in tables:
                    yield read(name)
            for shard in {self._shard(name) for name in wanted}:
                if self._last_use[shard] == -1:
                    self._checkpoint.release(shard)

        return all_in_order(), digests

    def tensors(self, layer: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return a layer's tensors in the store's form and their source digests."""
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        if self._claim.holds(_piece(layer)):
            piece = self._claim.folder / _piece(layer)
            tensors, digests = load_file(piece), source_digests(piece)
        wanted = self._parameters(layer)
        left = [name for name in wanted if name not in digests]
        shards = sorted({self._shard(name) for name in left}, key=lambda shard: self._last_use[shard])
        for shard in shards:
            for name in left:
                if self._shard(name) == shard:
                    short, shape = wanted[name]
                    tensor, digests[name] = self._fetched(name, short, shape)
                    tensors |= self._stored_form(short, tensor)
            if self._last_use[shard] > layer:
                continue
            if self._checkpoint.shards.deletes:
                # A stop before the layer's own file is written must not cost a second fetch.
                self._claim.write(_piece(layer), tensors, digests)
            self._checkpoint.release(shard)
        return tensors, digests

    def _fetched(self, name: str, short: str, shape: tuple[int, ...]) -> tuple[Tensor, str]:
        """Return a parameter as the layer has it, [outputs, inputs], and the digest of its source bytes."""
        if short not in self._skeleton.transposed_weights:
            return _fetch(self._checkpoint, name, shape)
        tensor, digest = _fetch(self._checkpoint, name, tuple(reversed(shape)))
        return tensor.t().contiguous(), digest

    def _non_layer_form(self, name: str, tensor: Tensor) -> Tensor:
        self._check_finite(name, tensor)
        return tensor if tensor.dtype in NON_LAYER_TYPES else tensor.float()

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        # A double can be finite and its float32 not.
        if not torch.isfinite(tensor if tensor.dtype in NON_LAYER_TYPES else tensor.float()).all():
            raise InputError(f"{self._checkpoint.folder}: parameter '{name}' holds infinities or NaN")

    def _stored_form(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        self._check_finite(name, tensor)
        if name not in self._linears:
            return {name: tensor.float().clone()}
        if self._weights == "nf4":
            return quantise_nf4(name, tensor)
        if self._weights != "int8":
            return {name: tensor.to(STORED_TYPE[self._weights], copy=True).contiguous()}
        owner = name.removesuffix(".weight")
        quantised, maxima = quantise_rows(tensor)
        # bitsandbytes' number for rows stored as they are.
        form = torch.tensor(0, dtype=torch.uint8)
        return {name: quantised, f"{owner}.SCB": maxima, f"{owner}.weight_format": form}


def _piece(layer: int) -> str:
    return f"{layer_file(layer)}.piece"


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the files of a checkpoint's tokenizer to a folder, and its config."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(checkpoint.folder / name, temporary)
    # AutoTokenizer looks up the tokenizer's class by the model's config.
    write_text_atomic(folder / "config.json", json.dumps(checkpoint.config, indent=1) + "\n")


def _fetch(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    """Return a parameter and the SHA-256 of its source bytes; raise InputError for another shape or type."""
    tensor = checkpoint.tensor(checkpoint.source_name(name))
    if tuple(tensor.shape) != shape or tensor.dtype not in (*NON_LAYER_TYPES, torch.float64):
        raise InputError(
            f"{checkpoint.folder}: parameter '{name}': expected floating point of shape {list(shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}; config.json and weights do not belong together"
        )
    return tensor, tensor_digest(tensor)


def _outlier_report(counts: Mapping[str, int]) -> OutlierReport:
    return OutlierReport(
        threshold=OUTLIER_THRESHOLD,
        columns=counts["columns"],
        activations=counts["activations"],
        beyond=counts["beyond"],
        beyond_outside=counts["beyond_outside"],
    )
