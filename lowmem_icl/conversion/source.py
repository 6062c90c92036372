"""A store's source, found again on this disk, so that a store of another form can be made of it.

Nothing is fetched: of a hub's model the cache must hold the commit that the store was made from. That the
source still is what it was, conversion checks tensor by tensor against the digests in the store's files.
"""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lowmem_icl.conversion.locate import DEMO, ModelLocation, hub_store_folder, locate
from lowmem_icl.conversion.packaged import PACKAGED_MODELS
from lowmem_icl.errors import InputError
from lowmem_icl.model.store import Source, Store, Weights, is_store, open_store
from lowmem_icl.system.progress import Progress, unseen


def locate_source(
    store: Store,
    weights: Weights,
    store_dir: Path,
    *,
    store_folder: Path | None = None,
    progress: Progress = unseen,
) -> ModelLocation:
    """Return where a store's source is, and where its store in another form is or belongs.

    `store_folder`: that place if not in `store_dir`, where a store of the same source and form is taken as it
    is. Raises InputError where the source is gone, saying what to give instead.
    """
    source = store.manifest.source
    existing = _made_before(source, weights, store_dir) if store_folder is None else store_folder
    if existing is not None and is_store(existing):
        return _finished(existing, store, weights)
    found = find_source(store, weights)
    target = store_folder
    if target is None and _is_of_hub(source):
        target = hub_store_folder(store_dir, source.id, source.revision, weights)
    located = locate(found, None, weights, store_dir, store_folder=target, progress=progress)
    if located.checkpoint is None:
        return _finished(located.store_folder, store, weights)
    path = None if _is_of_hub(source) else located.source_path
    return replace(
        located, source_id=source.id, revision=source.revision, source_path=path, made_before=store
    )


def _made_before(source: Source, weights: Weights, store_dir: Path) -> Path | None:
    """Return a store of the same source in this form, if `store_dir` has one."""
    for folder in sorted(store_dir.glob(f"*-{weights}")):
        if is_store(folder) and open_store(folder).manifest.source.digest == source.digest:
            return folder
    return None


def _finished(folder: Path, store: Store, weights: Weights) -> ModelLocation:
    there, source = open_store(folder).manifest, store.manifest.source
    if (there.weights, there.source.digest) != (weights, source.digest):
        what = f"{there.weights} of {there.source.id}, digest {there.source.digest[:8]}"
        raise InputError(
            f"{folder} holds a store of {what}; expected {weights} of {source.id}, digest "
            f"{source.digest[:8]}; delete it or choose another STORE"
        )
    return ModelLocation(source.id, source.revision, None, folder)


def _is_of_hub(source: Source) -> bool:
    # Only of a hub's model is the revision a commit: it is read off the hub, not off the command line.
    commit = source.revision is not None and len(source.revision) == 40
    return source.path is None and commit and not Path(source.id).expanduser().exists()


def find_source(store: Store, weights: Weights) -> str:
    """Return what `locate` finds a store's source by; raise InputError where it is gone."""
    source, command = store.manifest.source, f"lowmem-icl convert SOURCE --weights {weights}"
    if source.path is None and (source.id == DEMO or source.id in PACKAGED_MODELS):
        return source.id
    if _is_of_hub(source):
        return str(_cached_snapshot(store, weights))
    path = Path(source.path or source.id).expanduser()
    if path.exists():
        return str(path)
    if source.path is None and not path.is_absolute():
        raise InputError(
            f"{store.folder}: made from {source.id}, which is not there from this folder; run the command "
            f"where that store was made, or give the source: {command}"
        )
    raise InputError(
        f"{store.folder}: its source {path} is not there any more; give it where it is now: {command}"
    )


def _cached_snapshot(store: Store, weights: Weights) -> Path:
    """Return the folder of the hub's cache with the commit that a store was made from."""
    source = store.manifest.source
    config = try_to_load_from_cache(source.id, "config.json", revision=source.revision)
    folder = Path(config).parent if isinstance(config, str) else None
    if folder is None or not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise InputError(
            f"{store.folder}: the hub's cache does not hold its source, {source.id} at "
            f"{source.revision}; fetch it again: lowmem-icl convert {source.id} --revision "
            f"{source.revision} --weights {weights}"
        )
    return folder
