"""What dead processes were writing into folders that runs share, when they ended."""

from lowmem_icl.conversion.locate import READ_MODELS
from lowmem_icl.options import RunOptions
from lowmem_icl.session.texts import FOLDER
from lowmem_icl.system.files import clear_partials


def clear_shared_folders(options: RunOptions) -> None:
    """Delete it in --masks-dir and --store-dir; a store that is unfinished is cleared by who makes it."""
    if options.masks_dir is not None:
        clear_partials(options.masks_dir)
    stores = options.resolved_store_dir
    for folder in (stores, stores / READ_MODELS):
        clear_partials(folder)
    clear_partials(stores / FOLDER, deep=True)
