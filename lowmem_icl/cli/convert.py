"""`lowmem-icl convert`: a store made or verified, and what is said about it."""

from pathlib import Path

from lowmem_icl.cli.echo import echo
from lowmem_icl.cli.terminal import Terminal, size
from lowmem_icl.conversion.locate import DEMO, ModelLocation, ensure_store, locate
from lowmem_icl.conversion.packaged import PACKAGED_MODELS
from lowmem_icl.conversion.repair import repair
from lowmem_icl.conversion.source import locate_source
from lowmem_icl.model.store import is_store, open_store, verify_store
from lowmem_icl.options import RunOptions


def verify_files(folder: Path, terminal: Terminal) -> None:
    """Compare every byte of a store with its digest; raise InputError where one differs."""
    store = open_store(folder)
    with terminal.progress("verifying", store.size_bytes, "bytes") as advance:
        verify_store(store, advance)
    echo(f"{folder}: {len(store.manifest.files)} files, {size(store.size_bytes)}, all as written")


def repair_store(options: RunOptions, source: str, store: Path | None, terminal: Terminal) -> None:
    """Make the bad and missing files of a store again, `store` from `source`, or `source` from its own."""
    folder = store or Path(source).expanduser()
    given = None if store is None else source
    made = repair(folder, options.resolved_store_dir, source=given, progress=terminal.progress)
    for name in made:
        echo(f"{folder / name}: made again")
    if not made:
        echo(f"{folder}: nothing to mend, all as written")


def _located(options: RunOptions, folder: Path | None, terminal: Terminal) -> ModelLocation:
    given, store_dir = Path(options.model).expanduser(), options.resolved_store_dir
    if is_store(given) and options.model not in (DEMO, *PACKAGED_MODELS):
        store = open_store(given)
        if folder is not None or store.manifest.weights != options.weights:
            return locate_source(
                store, options.weights, store_dir, store_folder=folder, progress=terminal.progress
            )
    return locate(
        options.model,
        options.revision,
        options.weights,
        store_dir,
        store_folder=folder,
        progress=terminal.progress,
    )


def convert_model(
    options: RunOptions, folder: Path | None, terminal: Terminal, *, delete_shards: bool
) -> None:
    """Convert `options.model`, or the source of the store that it is, to a store in a folder, or where runs
    look for it; print the store's folder.
    """
    location = _located(options, folder, terminal)
    store = ensure_store(
        location,
        options.weights,
        delete_shards=delete_shards,
        announce=terminal.say,
        progress=terminal.progress,
        waits=not options.no_wait,
    )
    outliers = store.manifest.outliers
    if outliers is not None:
        share = outliers.beyond_outside / max(1, outliers.activations)
        terminal.say(
            f"outlier columns: {outliers.columns}; activations of {outliers.threshold:g} or more outside "
            f"them: {share:.2g}"
        )
    echo(str(store.folder))
