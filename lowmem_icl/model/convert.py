"""A checkpoint into a store, layer by layer; a stopped conversion goes on at the layer where it was.

In memory at any time: one layer in the source's precision and as converted, the open shard's pages, the embeddings
(int8 only) and the fixed text's residuals.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.files import atomic_path, sha256_of_file, write_text_atomic
from lowmem_icl.model.calibration import CalibrationPass, text_rows
from lowmem_icl.model.checkpoint import TOKENIZER_FILES, Checkpoint
from lowmem_icl.model.families import Skeleton
from lowmem_icl.model.int8 import OUTLIER_THRESHOLD, quantise_rows
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.reading import read_header
from lowmem_icl.model.store import (
    MANIFEST,
    OUTSIDE,
    STORE_FORMAT,
    Manifest,
    OutlierReport,
    Source,
    Store,
    StoredFile,
    Weights,
    layer_file,
    open_store,
)

BYTES_PER_ELEMENT = {"int8": 1, "bfloat16": 2, "float32": 4}
STORED_TYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MARGIN_BYTES = 64 << 20

Tokenise = Callable[[str], Sequence[int]]


def store_size_bytes(skeleton: Skeleton, weights: Weights, source_element_bytes: int) -> int:
    """Return about how many bytes a store of this form takes."""
    layer = sum(torch.Size(shape).numel() for shape in skeleton.layer_parameters().values())
    outside = sum(torch.Size(shape).numel() for shape in skeleton.outside_parameters().values())
    return skeleton.layers * layer * BYTES_PER_ELEMENT[weights] + outside * source_element_bytes


def check_room(folder: Path, size_bytes: int) -> int:
    """Return the free bytes of the disk a folder is on; raise DoesNotFit where `size_bytes` is more."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size_bytes + MARGIN_BYTES > free:
        raise DoesNotFit(
            f"the store needs {size_bytes / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free; "
            "free some space or choose another folder with --store-dir"
        )
    return free


def convert(
    checkpoint: Checkpoint,
    folder: Path,
    weights: Weights,
    *,
    source_id: str,
    revision: str | None,
    tokenise: Tokenise,
    fixed_text: str,
    advance: Callable[[int], None] = lambda layers: None,
) -> Store:
    """Write a checkpoint as a store and return it opened; `advance(1)` is called after every layer.

    Raises InputError naming a parameter that is missing or of another shape, or a folder that holds a store of
    another source.
    """
    skeleton = Skeleton.from_dict(checkpoint.config)
    _claim(folder, checkpoint, weights, source_id)
    _copy_tokenizer(checkpoint, folder / "tokenizer")
    files: dict[str, StoredFile] = {}
    outside_digests = _write_outside(checkpoint, skeleton, folder / OUTSIDE)
    files[OUTSIDE] = _stored(folder / OUTSIDE)
    digests = dict(outside_digests)
    calibration = None
    if weights == "int8":
        for name, tensor in load_file(folder / OUTSIDE).items():
            value = tensor if tensor.shape[0] == skeleton.vocabulary else tensor.float()
            set_module_tensor_to_device(skeleton.model, name, "cpu", value=value, dtype=value.dtype)
        rows = text_rows(tokenise(fixed_text), skeleton.context_tokens)
        calibration = CalibrationPass.start(skeleton, rows)
        decoder = DecoderLayer(skeleton, "int8", torch.device("cpu"))
    for layer in range(skeleton.layers):
        path = folder / layer_file(layer)
        kept = _finished_layer(path)
        if kept is None:
            tensors, layer_digests = _layer_tensors(checkpoint, skeleton, layer, weights)
        else:
            tensors, layer_digests = load_file(path), kept
        if calibration is not None:
            decoder.fill(tensors | ({} if kept else _no_columns(skeleton)))
            found = calibration.through(decoder, decide=kept is None)
            tensors |= {f"{name}.outlier_columns": columns for name, columns in found.items()}
        if kept is None:
            with atomic_path(path) as beside:
                save_file(tensors, beside, metadata={"source_digests": json.dumps(layer_digests)})
        digests |= layer_digests
        files[layer_file(layer)] = _stored(path)
        advance(1)
    for path in sorted((folder / "tokenizer").iterdir()):
        files[f"tokenizer/{path.name}"] = _stored(path)
    manifest = Manifest(
        format=STORE_FORMAT,
        weights=weights,
        config=checkpoint.config,
        source=Source(id=source_id, revision=revision, digest=_combined(digests)),
        files=files,
        outliers=_outlier_report(calibration),
    )
    write_text_atomic(folder / MANIFEST, json.dumps(manifest.model_dump(), indent=1) + "\n")
    (folder / CLAIM).unlink(missing_ok=True)
    return open_store(folder)


CLAIM = "converting.json"


def _claim(folder: Path, checkpoint: Checkpoint, weights: Weights, source_id: str) -> None:
    """Mark a folder as this conversion's; refuse one that holds something else."""
    claim = {
        "source": source_id,
        "weights": weights,
        "config": checkpoint.config,
        "source_bytes": checkpoint.size_bytes,
    }
    path = folder / CLAIM
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(claim)):
            raise InputError(
                f"{folder} holds an unfinished conversion of something else; delete it or choose another STORE"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and no unfinished conversion; choose another STORE")
    else:
        write_text_atomic(path, json.dumps(claim, indent=1) + "\n")


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            with atomic_path(folder / name) as beside:
                shutil.copyfile(checkpoint.folder / name, beside)
    # AutoTokenizer looks up the tokenizer's class by the model's config.
    write_text_atomic(folder / "config.json", json.dumps(checkpoint.config, indent=1) + "\n")


def _fetch(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    """Return a parameter and the SHA-256 of its source bytes; raise InputError for another shape or type."""
    tensor = checkpoint.tensor(checkpoint.source_name(name))
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise InputError(
            f"{checkpoint.folder}: parameter '{name}': expected floating point of shape {list(shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}; config.json and weights do not belong together"
        )
    source_bytes = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return tensor, hashlib.sha256(str(tensor.dtype).encode() + source_bytes.data).hexdigest()


def _write_outside(checkpoint: Checkpoint, skeleton: Skeleton, path: Path) -> dict[str, str]:
    if path.is_file():
        return json.loads(read_header(path)[1]["source_digests"])
    tensors, digests = {}, {}
    for name, shape in skeleton.outside_parameters().items():
        tensors[name], digests[name] = _fetch(checkpoint, name, shape)
    with atomic_path(path) as beside:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            beside,
            metadata={"source_digests": json.dumps(digests)},
        )
    return digests


def _layer_tensors(
    checkpoint: Checkpoint, skeleton: Skeleton, layer: int, weights: Weights
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a layer's tensors in the store's form, by names relative to the layer, and their source digests."""
    linears = {f"{name}.weight" for name in skeleton.linear_names()}
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for name, shape in skeleton.layer_parameters().items():
        full_name = f"{skeleton.blocks_name}.{layer}.{name}"
        tensor, digests[full_name] = _fetch(checkpoint, full_name, shape)
        if not torch.isfinite(tensor).all():
            raise InputError(f"{checkpoint.folder}: parameter '{full_name}' holds infinities or NaN")
        if name not in linears:
            tensors[name] = tensor.float()
        elif weights == "int8":
            owner = name.removesuffix(".weight")
            tensors[name], tensors[f"{owner}.SCB"] = quantise_rows(tensor)
            # bitsandbytes' number for rows stored as they are.
            tensors[f"{owner}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            tensors[name] = tensor.to(STORED_TYPE[weights]).contiguous()
    return tensors, digests


def _no_columns(skeleton: Skeleton) -> dict[str, Tensor]:
    return {f"{name}.outlier_columns": torch.empty(0, dtype=torch.int64) for name in skeleton.linear_names()}


def _finished_layer(path: Path) -> dict[str, str] | None:
    """Return the source digests of a layer file that an earlier conversion finished, None where there is none."""
    return json.loads(read_header(path)[1]["source_digests"]) if path.is_file() else None


def _stored(path: Path) -> StoredFile:
    return StoredFile(size_bytes=path.stat().st_size, sha256=sha256_of_file(path))


def _combined(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _outlier_report(calibration: CalibrationPass | None) -> OutlierReport | None:
    if calibration is None:
        return None
    counts = calibration.counts
    return OutlierReport(
        threshold=OUTLIER_THRESHOLD,
        columns=counts["columns"],
        activations=counts["activations"],
        beyond=counts["beyond"],
        beyond_outside=counts["beyond_outside"],
    )
