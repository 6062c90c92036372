"""Checks before and after a conversion: of a checkpoint against its config, and of a store's files, their
bytes and that they can be read.
"""

import re
from itertools import chain
from pathlib import Path

from lowmem_icl.conversion.checkpoint import Checkpoint
from lowmem_icl.conversion.claim import decided_from
from lowmem_icl.errors import InputError
from lowmem_icl.model.contents import check_layer, check_non_layer
from lowmem_icl.model.reading import read_header
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import NON_LAYER, Manifest, altered_files, layer_file
from lowmem_icl.system.progress import Progress

A_NUMBER = re.compile("[0-9]{1,9}")


def check_layer_count(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Raise InputError, naming its first parameter, where the weights hold a layer beyond the config's: it
    would be left out, and the model be another one.

    Whatever else the config has no place for is ignored, as Hugging Face does.
    """
    known, beyond = skeleton.layer_parameters(), list[tuple[int, str]]()
    # Older files leave out the first part of the names.
    for prefix in (f"{skeleton.blocks_name}.", f"{skeleton.blocks_name.partition('.')[2]}."):
        for name in checkpoint.shard_of:
            number, _, parameter = name.removeprefix(prefix).partition(".")
            is_ours = name.startswith(prefix) and parameter in known
            if is_ours and A_NUMBER.fullmatch(number) and int(number) >= skeleton.layers:
                beyond.append((int(number), name))
    if beyond:
        raise InputError(
            f"{checkpoint.folder}: expected {skeleton.layers} layers, as config.json says, got weights of "
            f"more: '{min(beyond)[1]}'; take the config.json that belongs to them, or remove them"
        )


def check_written(folder: Path, manifest: Manifest, skeleton: Skeleton, progress: Progress) -> None:
    """Compare the disk with what was written, then read every file as a run will.

    A file that differs is deleted, and of int8 the layers whose outlier columns were decided from it, so that
    the next conversion writes them again. Raises InputError naming it.
    """
    total = sum(file.size_bytes for file in manifest.files.values())
    with progress("verifying", total, "bytes") as advance:
        altered = list(altered_files(folder, manifest, advance))
    decided = [decided_from(name, manifest.files) for name in altered] if manifest.weights == "int8" else []
    for name in {*altered, *chain.from_iterable(decided)}:
        (folder / name).unlink(missing_ok=True)
    if altered:
        raise InputError(
            f"{folder / altered[0]} does not hold what was written: the disk may be failing; it is deleted, "
            "and what was decided from it; run the same command again, or choose another disk"
        )
    check_non_layer(folder / NON_LAYER, read_header(folder / NON_LAYER)[0], skeleton)
    for layer in range(skeleton.layers):
        path = folder / layer_file(layer)
        check_layer(path, read_header(path)[0], skeleton, manifest.weights)
