"""Do a config and the weights beside it belong together? Told from headers, before anything is read."""

from collections.abc import Iterator

from lowmem_icl.conversion.checkpoint import Checkpoint, FolderShards
from lowmem_icl.conversion.safetensors_header import safetensors_shapes
from lowmem_icl.errors import InputError
from lowmem_icl.model.skeleton import Skeleton

Shape = tuple[int, ...]


def check_shapes(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Raise InputError naming the first parameter whose shape in the folder's safetensors files is another
    than the config's; other files tell their shapes when they are read.
    """
    if not isinstance(checkpoint.shards, FolderShards):
        return
    stored: dict[str, Shape] = {}
    for name in sorted(checkpoint.shards.sizes):
        if name.endswith(".safetensors"):
            stored |= safetensors_shapes(checkpoint.shards.path(name))
    for name, shape in _expected(checkpoint, skeleton):
        found = stored.get(checkpoint.source_name(name), shape)
        if found != shape:
            raise InputError(
                f"{checkpoint.folder}: parameter '{name}': expected shape {list(shape)}, as config.json says,"
                f" got {list(found)}; config.json and weights do not belong together, fetch both again"
            )


def _expected(checkpoint: Checkpoint, skeleton: Skeleton) -> Iterator[tuple[str, Shape]]:
    """Yield the checkpoint's name and shape of every parameter, those outside the layers first."""
    for name, shape in skeleton.non_layer_parameters().items():
        older = skeleton.family.stored_names.get(name, name)
        yield older if older in checkpoint.shard_of else name, shape
    for short, shape in skeleton.layer_parameters().items():
        held = tuple(reversed(shape)) if short in skeleton.transposed_weights else shape
        for layer in range(skeleton.layers):
            yield f"{skeleton.blocks_name}.{layer}.{short}", held
