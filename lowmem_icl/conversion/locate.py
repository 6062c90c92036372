"""From what a user calls a model to a store.

A model is the demo, a real model that a package brings, a store, a checkpoint folder, a GGUF file or a hub
id.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowmem_icl.conversion.calibration import CalibrationText, fixed_text
from lowmem_icl.conversion.checkpoint import Checkpoint, FolderShards, open_checkpoint
from lowmem_icl.conversion.checks import check_layer_count
from lowmem_icl.conversion.claim import Conversion, finished_bytes
from lowmem_icl.conversion.convert import (
    check_room,
    convert,
    planned_store,
)
from lowmem_icl.conversion.gguf.source import gguf_folder_name, open_gguf
from lowmem_icl.conversion.packaged import PACKAGED_MODELS, packaged_file
from lowmem_icl.conversion.store_lock import clear_dead_lock, making_store
from lowmem_icl.conversion.tied import settle_tied_tables
from lowmem_icl.errors import InputError
from lowmem_icl.model.families.catalogue import family_of
from lowmem_icl.model.families.family import Family
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store, Weights, is_store, open_store
from lowmem_icl.options import nearest
from lowmem_icl.system.files import existing_folder
from lowmem_icl.system.progress import Progress, unseen

DEMO = "demo"
READ_MODELS = "models"
"""Folder beside the stores: of GGUF files, config and tokenizer, and what was joined from parts."""


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is: a finished store, or a checkpoint and the folder its store belongs in.

    `source_path`: of a checkpoint folder or a GGUF file that no name finds; `made_before`: a store that must
    have been made from the same tensors.
    """

    source_id: str
    revision: str | None
    checkpoint: Checkpoint | None
    store_folder: Path
    source_path: Path | None = None
    made_before: Store | None = None


def locate(
    model: str,
    revision: str | None,
    weights: Weights,
    store_dir: Path,
    *,
    store_folder: Path | None = None,
    progress: Progress = unseen,
) -> ModelLocation:
    """Find a model; of a hub id the small files are fetched, of a GGUF file config and tokenizer are read.

    `store_folder`: where its store belongs if not in `store_dir`. Raises InputError saying what was looked
    for.
    """
    folder = Path(model).expanduser()
    if model in PACKAGED_MODELS or folder.suffix == ".gguf":
        return _locate_gguf_file(model, weights, store_dir, store_folder, progress)
    location = _locate_folder(model, folder, revision, weights, store_dir)
    return location if store_folder is None else replace(location, store_folder=store_folder)


def _locate_gguf_file(
    model: str, weights: Weights, store_dir: Path, store_folder: Path | None, progress: Progress
) -> ModelLocation:
    packaged = PACKAGED_MODELS.get(model)
    path = Path(model).expanduser()
    if packaged is not None:
        existing = _only_store(store_dir, model, weights)
        if existing is not None and store_folder is None:
            return ModelLocation(model, None, None, existing)
        name = f"{model}-{_eight_digits(packaged.version)}"
    elif not path.is_file():
        raise InputError(f"--model: the file {model} does not exist")
    else:
        name = gguf_folder_name(path)
    target = store_folder or store_dir / f"{name}-{weights}"
    if is_store(target):
        return ModelLocation(model, None, None, target)
    cache = store_dir / READ_MODELS
    with progress(f"reading {Path(model).name}", 1, "files") as advance:
        if packaged is not None:
            path = packaged_file(packaged, cache / f"{model}.gguf")
        checkpoint = open_gguf(path, cache, Skeleton.from_dict)
        advance(1)
    if packaged is not None:
        checkpoint.notes.insert(0, packaged.terms)
    return ModelLocation(model, None, checkpoint, target, None if packaged else path.resolve())


def _only_store(store_dir: Path, model: str, weights: Weights) -> Path | None:
    """Return the store that was made of a model of this name, if there is one and no other."""
    name = model.replace("/", "--")
    existing = [
        folder
        for folder in store_dir.glob(f"{glob.escape(name)}-*-{weights}")
        if is_store(folder) and open_store(folder).manifest.source.id == model
    ]
    return existing[0] if len(existing) == 1 else None


def _locate_folder(
    model: str, folder: Path, revision: str | None, weights: Weights, store_dir: Path
) -> ModelLocation:
    if model == DEMO:
        folder = Path(str(files("lowmem_icl"))) / "demo"
    elif is_store(folder):
        store = open_store(folder)
        if store.manifest.weights != weights:
            raise InputError(
                f"--weights {weights}: the store {folder} holds {store.manifest.weights}; "
                f"give --weights {store.manifest.weights}, or make a store of {weights} from its source: "
                f"lowmem-icl convert {folder} --weights {weights}"
            )
        return ModelLocation(store.manifest.source.id, store.manifest.source.revision, None, folder)
    elif not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise InputError(f"--model: folder {model} does not exist")
        return _locate_on_hub(model, revision, weights, store_dir)
    checkpoint = open_checkpoint(folder)
    stats = [(name, (folder / name).stat()) for name in sorted(checkpoint.shards.sizes)]
    identity = [checkpoint.config, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    store_folder = store_dir / f"{folder.name}-{_eight_digits(identity)}-{weights}"
    path = None if model == DEMO else folder.resolve()
    return ModelLocation(model, revision, checkpoint, store_folder, path)


def _locate_on_hub(model: str, revision: str | None, weights: Weights, store_dir: Path) -> ModelLocation:
    from lowmem_icl.conversion.hub import HubShards, open_hub_checkpoint

    try:
        checkpoint = open_hub_checkpoint(model, revision)
    except InputError:
        # Neither the hub nor its cache: a store made earlier will do, if there is no doubt which.
        existing = _only_store(store_dir, model, weights)
        if existing is None or revision is not None:
            _refuse_misspelt(model)
            raise
        return ModelLocation(model, open_store(existing).manifest.source.revision, None, existing)
    assert isinstance(checkpoint.shards, HubShards)
    commit = checkpoint.shards.commit
    return ModelLocation(model, commit, checkpoint, hub_store_folder(store_dir, model, commit, weights))


def hub_store_folder(store_dir: Path, model: str, commit: str | None, weights: Weights) -> Path:
    """Return where the store of a commit of a hub's model belongs."""
    return store_dir / f"{model.replace('/', '--')}-{_eight_digits([model, commit])}-{weights}"


def _refuse_misspelt(model: str) -> None:
    """Raise InputError for a name that is nearly one of a model that needs no hub."""
    near = nearest(model, (DEMO, *PACKAGED_MODELS))
    if near is not None:
        raise InputError(
            f"--model: '{model}' is not a local folder and could not be fetched from the hub; did you mean "
            f"'{near}'?"
        )


def _eight_digits(identity: Any) -> str:
    """Return eight hexadecimal digits that change with an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def begins_with_bos(family: Family, tokenizer: Any) -> tuple[bool, str]:
    """Return whether texts begin with BOS, and who says so: `family`, or else `tokenizer`, by what it does
    to a text of its own.
    """
    if family.adds_bos is not None:
        return family.adds_bos, "family"
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos], "tokenizer"


def tokeniser(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """Return a tokenizer as a function from a text to token ids without special tokens."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer; raise InputError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: no tokenizer could be loaded ({error}); put its files next to the weights"
        ) from error


def plan_store(located: ModelLocation, weights: Weights) -> Store:
    """Return a located model's store if it is there, else what it would be."""
    if located.checkpoint is None or is_store(located.store_folder):
        return open_store(located.store_folder)
    if isinstance(located.checkpoint.shards, FolderShards):
        # Of a hub's the tables are not here yet; conversion settles them.
        settle_tied_tables(located.checkpoint)
        check_layer_count(located.checkpoint, Skeleton.from_dict(located.checkpoint.config))
    return planned_store(located.checkpoint, located.store_folder, weights)


def ensure_store(
    located: ModelLocation,
    weights: Weights,
    *,
    delete_shards: bool = False,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = unseen,
    waits: bool = True,
) -> Store:
    """Return the store of a located model, converting and verifying it first where that has not been done.

    Says what will be fetched, read and written before the first byte; raises DoesNotFit where the disk has no
    room. Where another process is making the store it `waits`, or InUse is raised. `delete_shards`: weight
    files fetched from the hub are deleted as soon as they are converted.
    """
    if located.checkpoint is None or is_store(located.store_folder):
        clear_dead_lock(located.store_folder)
        return open_store(located.store_folder)
    located.checkpoint.check_weights()
    planned = plan_store(located, weights)
    with making_store(located.store_folder, planned.skeleton.layers, announce, waits=waits):
        if is_store(located.store_folder):
            return open_store(located.store_folder)
        return _made(planned, located, delete_shards, announce, progress)


def _made(
    planned: Store,
    located: ModelLocation,
    delete_shards: bool,
    announce: Callable[[str], None],
    progress: Progress,
) -> Store:
    checkpoint, weights = located.checkpoint, planned.manifest.weights
    assert checkpoint is not None
    for note in checkpoint.notes:
        announce(note)
    fetched = _prepare_fetching(checkpoint, located, delete_shards, announce)
    left = max(0, planned.size_bytes - finished_bytes(located.store_folder))
    free = check_room(located.store_folder, left + fetched)
    announce(
        f"converting {located.source_id} to {weights}: reads {checkpoint.size_bytes / 1e9:.3g} GB, writes "
        f"about {left / 1e9:.3g} GB to {located.store_folder} ({free / 1e9:.3g} GB free)"
    )
    return convert(
        Conversion(
            checkpoint,
            located.store_folder,
            weights,
            located.source_id,
            located.revision,
            source_path=located.source_path,
            made_before=located.made_before,
        ),
        calibration_text(checkpoint),
        progress=progress,
    )


def calibration_text(checkpoint: Checkpoint) -> CalibrationText:
    """Return the fixed text as the tokenizer of a checkpoint has it."""
    tokenizer = load_tokenizer(checkpoint.folder)
    adds_bos, _ = begins_with_bos(family_of(checkpoint.config["model_type"]), tokenizer)
    return CalibrationText(tokeniser(tokenizer)(fixed_text()), tokenizer.bos_token_id if adds_bos else None)


def _prepare_fetching(
    checkpoint: Checkpoint, located: ModelLocation, delete_shards: bool, announce: Callable[[str], None]
) -> int:
    """Set where shards go; return how many bytes of them the store's disk must take at once."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from lowmem_icl.conversion.hub import HubShards

    shards = checkpoint.shards
    if not isinstance(shards, HubShards):
        if delete_shards:
            raise InputError(
                f"--delete-shards: {located.source_id} is on this disk, and only what was fetched from the "
                "hub is ever deleted; leave the option out"
            )
        return 0
    shards.announce = announce
    if delete_shards:
        shards.delete_into = located.store_folder / "fetched"
        return max(shards.sizes.values())
    announce(
        f"fetching {shards.fetch_bytes / 1e9:.3g} GB into the hub's cache; --delete-shards keeps one file "
        "at a time"
    )
    cache = Path(HF_HUB_CACHE)
    check_room(cache, shards.fetch_bytes)
    disks = {existing_folder(folder).stat().st_dev for folder in (cache, located.store_folder)}
    return shards.fetch_bytes if len(disks) == 1 else 0
