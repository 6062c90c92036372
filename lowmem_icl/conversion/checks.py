"""Checks of a store's files before it is called finished: their bytes, and that they can be read."""

from pathlib import Path

from lowmem_icl.errors import InputError
from lowmem_icl.model.nf4 import packed_shape
from lowmem_icl.model.reading import read_header
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import NON_LAYER, Manifest, altered_files, layer_file
from lowmem_icl.system.progress import Progress


def check_written(folder: Path, manifest: Manifest, skeleton: Skeleton, progress: Progress) -> None:
    """Compare the disk with what was written, then read every file as a run will.

    A file that differs is deleted, so that the next conversion writes it again. Raises InputError naming it.
    """
    total = sum(file.size_bytes for file in manifest.files.values())
    with progress("verifying", total, "bytes") as advance:
        altered = list(altered_files(folder, manifest, advance))
    for name in altered:
        (folder / name).unlink()
    if altered:
        raise InputError(
            f"{folder / altered[0]} does not hold what was written: the disk may be failing; it is deleted, "
            "run the same command again, or choose another disk"
        )
    _check_parameters(folder / NON_LAYER, skeleton.non_layer_parameters())
    shapes = skeleton.layer_parameters()
    if manifest.weights == "nf4":
        shapes |= {f"{name}.weight": packed_shape(shape) for name, shape in skeleton.linear_shapes.items()}
    for layer in range(skeleton.layers):
        _check_parameters(folder / layer_file(layer), shapes)


def _check_parameters(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    locations = read_header(path)[0]
    for name, shape in shapes.items():
        found = locations[name].shape if name in locations else None
        if found != shape:
            raise InputError(
                f"{path}: parameter '{name}': expected shape {list(shape)}, found "
                f"{'none' if found is None else list(found)}; delete the file and convert again"
            )
