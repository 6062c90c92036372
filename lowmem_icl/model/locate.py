"""From what a user calls a model to a store: the demo, a store, a checkpoint folder, or a hub id."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowmem_icl.errors import InputError
from lowmem_icl.model.calibration import fixed_text
from lowmem_icl.model.checkpoint import (
    INDEX_FILES,
    SINGLE_FILES,
    TOKENIZER_FILES,
    Checkpoint,
    open_checkpoint,
)
from lowmem_icl.model.convert import Tokenise, check_room, convert, store_size_bytes
from lowmem_icl.model.families import Skeleton
from lowmem_icl.model.store import Store, Weights, is_store, open_store

DEMO = "demo"


@dataclass(frozen=True)
class Located:
    """Where a model is: a finished store, or a checkpoint and the folder its store belongs in."""

    source_id: str
    revision: str | None
    checkpoint: Checkpoint | None
    store_folder: Path


def locate(model: str, revision: str | None, weights: Weights, store_dir: Path) -> Located:
    """Find a model; a hub id is fetched. Raises InputError saying what was looked for and where."""
    folder = Path(model).expanduser()
    if model == DEMO:
        folder = Path(str(files("lowmem_icl"))) / "demo"
    elif is_store(folder):
        store = open_store(folder)
        if store.manifest.weights != weights:
            raise InputError(
                f"--weights {weights}: the store {folder} holds {store.manifest.weights}; "
                f"give --weights {store.manifest.weights} or the checkpoint it was made from"
            )
        return Located(store.manifest.source.id, store.manifest.source.revision, None, folder)
    elif not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise InputError(f"--model: folder {model} does not exist")
        folder = _from_hub(model, revision)
    checkpoint = open_checkpoint(folder)
    name = model.replace("/", "--") if not Path(model).exists() else folder.name
    fingerprint = _fingerprint(checkpoint)
    return Located(model, revision, checkpoint, store_dir / f"{name}-{fingerprint}-{weights}")


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Return eight digits that change with a checkpoint's config and with its weight files' names, sizes and times."""
    shards = sorted(set(checkpoint.shard_of.values()))
    stats = [(shard, (checkpoint.folder / shard).stat()) for shard in shards]
    told = [checkpoint.config, [(shard, stat.st_size, stat.st_mtime_ns) for shard, stat in stats]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [
        "config.json",
        *TOKENIZER_FILES,
        *INDEX_FILES,
        *SINGLE_FILES,
        "model-*.safetensors",
        "pytorch_model-*.bin",
    ]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"--model: '{model}' is no folder here and could not be fetched from the hub "
            f"({type(error).__name__}); give a checkpoint folder or check the name and the network"
        ) from error


def tokeniser(folder: Path) -> Tokenise:
    """Return a function from a text to token ids without special tokens, by the tokenizer in a folder."""
    tokenizer = load_tokenizer(folder)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer; raise InputError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: no tokenizer could be loaded ({error}); put its files beside the weights"
        ) from error


def ensure_store(
    located: Located,
    weights: Weights,
    *,
    announce: Callable[[str], None] = lambda text: None,
    advance: Callable[[int], None] = lambda layers: None,
) -> Store:
    """Return the store of a located model, converting it first where that has not been done.

    Says what will be read and written before the first byte; raises DoesNotFit where the disk has no room.
    """
    if located.checkpoint is None or is_store(located.store_folder):
        return open_store(located.store_folder)
    checkpoint = located.checkpoint
    skeleton = Skeleton.from_dict(checkpoint.config)
    source_bytes = checkpoint.size_bytes
    size = store_size_bytes(skeleton, weights, 2)
    free = check_room(located.store_folder, size)
    announce(
        f"converting {located.source_id} to {weights}: reads {source_bytes / 1e9:.3g} GB, writes about "
        f"{size / 1e9:.3g} GB to {located.store_folder} ({free / 1e9:.3g} GB free)"
    )
    return convert(
        checkpoint,
        located.store_folder,
        weights,
        source_id=located.source_id,
        revision=located.revision,
        tokenise=tokeniser(checkpoint.folder),
        fixed_text=fixed_text(),
        advance=advance,
    )
