"""`lowmem-icl evaluate`: the mask files that were given, and the folder of a run under them."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskFile, masks_in, read_mask
from lowmem_icl.options import RunOptions


def read_masks(paths: Sequence[Path]) -> dict[str, MaskFile]:
    """Return mask files by their names, of a folder all that it holds; raise InputError where two have one
    name or a folder holds none.
    """
    mask_files: dict[str, MaskFile] = {}
    for path in itertools.chain.from_iterable(map(_mask_paths, paths)):
        mask_file = read_mask(path)
        if mask_file.name in mask_files:
            raise InputError(f"--mask {path}: another mask is named '{mask_file.name}' too; rename one")
        mask_files[mask_file.name] = mask_file
    return mask_files


def _mask_paths(path: Path) -> list[Path]:
    """Return a file, or the mask files of a folder."""
    if not path.is_dir():
        return [path]
    found = masks_in(path)
    if not found:
        raise InputError(f"--mask {path}: no mask files in that folder; give another")
    return found


def with_folder(options: RunOptions, mask_files: Mapping[str, MaskFile]) -> RunOptions:
    """Return the options with a folder for these masks where --out names none."""
    if options.out is not None:
        return options
    # Imports torch, which a mistyped --mask need not wait for.
    from lowmem_icl.session.identity import default_folder

    text = "".join(mask_file.to_json() for mask_file in mask_files.values())
    suffix = f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return options.model_copy(update={"out": default_folder(options, prefix="evaluate-", suffix=suffix)})
