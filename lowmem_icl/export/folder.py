"""A checkpoint folder that plain transformers loads, without the units that a mask removes.

The source's tensors are read and written one after the other; in memory lies one file of at most SHARD_BYTES,
or the largest tensor.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_icl.conversion.checkpoint import TOKENIZER_FILES, Checkpoint
from lowmem_icl.conversion.locate import locate
from lowmem_icl.conversion.source_digest import DigestAsRead
from lowmem_icl.conversion.tied import settle_tied_tables
from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.export.applied import check_shape, check_table
from lowmem_icl.export.recipes import LayerTensors, Made
from lowmem_icl.export.structure import LayerRecipe, least_heads, packed_layers, with_heads, zeroed_layers
from lowmem_icl.masks.files import MaskFile, MaskModel, check_fits, check_means, write_mask
from lowmem_icl.model.skeleton import FIELDS_BY_LAYER, Skeleton
from lowmem_icl.model.store import is_store
from lowmem_icl.model.writing import write_tensors
from lowmem_icl.system.files import atomic_folder, free_bytes
from lowmem_icl.system.progress import Progress, unseen

SHARD_BYTES = 2 << 30
MASK_FILE = "mask.json"
"""The mask that a folder was made with, for people: its units are counted as in the source."""
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Sizes:
    """How large a model is: its parameters, layers, heads of each, and the bytes of its tensors."""

    parameters: int
    layers: int
    heads: int
    size_bytes: int


@dataclass(frozen=True)
class ExportedFolder:
    """A written checkpoint: what it was made of and became.

    `zeroed_heads`, `zeroed_ffns`: of what is still there, how many are zeros.
    """

    folder: Path
    before: Sizes
    after: Sizes
    zeroed_heads: int
    zeroed_ffns: int
    notes: tuple[str, ...]


def open_source(model: str, revision: str | None, cache: Path, progress: Progress = unseen) -> Checkpoint:
    """Open what weights are taken from: a checkpoint folder, a GGUF file, a hub id or a model that is
    packaged; config and tokenizer of a GGUF file are kept in `cache`. Raises InputError for a store.
    """
    if is_store(Path(model).expanduser()):
        raise InputError(
            f"--model: {model} is a store, whose weights may be rounded; give the checkpoint that it was "
            "made from"
        )
    # A folder that is no store: what is wanted is the source, whatever stores there are.
    located = locate(model, revision, "float32", cache, store_folder=cache / "none", progress=progress)
    if located.checkpoint is None:
        raise InputError(f"--model: the weights of {model} are not on this disk; check the network")
    located.checkpoint.check_weights()
    return located.checkpoint


def export_folder(
    mask_file: MaskFile,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    structural: bool = False,
    progress: Progress = unseen,
) -> ExportedFolder:
    """Write a checkpoint without a mask's units into a new folder, whole or not at all.

    Removed heads are columns of zeros in the output projection, removed FFNs zeros in their last linear and
    its bias; means go into the biases. `structural`: layers, and heads where the architecture allows it, are
    really gone, and the rest is zeros as before. The notes say where the mask was made on other weights.
    Raises InputError for a mask of another shape of model, for means that no bias can hold, and where nothing
    can be gone.
    """
    if folder.exists():
        raise InputError(f"--out {folder} exists; choose another folder")
    settle_tied_tables(checkpoint)
    skeleton = Skeleton.from_dict(checkpoint.config)
    digest = DigestAsRead(checkpoint, skeleton)
    mask, means = mask_file.mask, mask_file.means
    source = _checked_source(mask_file, skeleton)
    layers = LayerTensors(checkpoint, skeleton, means)
    layers.check_means(mask)
    if structural:
        config, recipes = _smaller(mask_file, layers)
    else:
        config, recipes = checkpoint.config, zeroed_layers(mask, layers.facts)
    _check_room(folder, checkpoint, skeleton)
    with atomic_folder(folder) as draft:
        draft.joinpath("config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written = _write_tensors(draft, _all_tensors(layers, recipes, progress))
        for name in (*TOKENIZER_FILES, GENERATION):
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, draft / name)
        write_mask(draft / MASK_FILE, mask_file)
        # Last, when all but what is gone was read anyway.
        warning = check_fits(mask_file, source.model_copy(update={"digest": digest.whole()}))
    before, after = _sizes(layers, Skeleton.from_dict(config), written)
    return ExportedFolder(
        folder,
        before,
        after,
        sum(len(recipe.slots.heads) - len(recipe.slots.live & {*recipe.slots.heads}) for recipe in recipes),
        sum(not recipe.has_ffn for recipe in recipes),
        (*checkpoint.notes, *filter(None, [warning])),
    )


def _checked_source(mask_file: MaskFile, skeleton: Skeleton) -> MaskModel:
    """Return what weights are taken from, as masks name it, its digest not known yet; raise InputError where
    the mask or its means do not fit it.
    """
    shape = {"model_type": skeleton.config.model_type, "layers": skeleton.layers, "heads": skeleton.heads}
    source = mask_file.model.model_copy(update=shape)
    check_fits(mask_file, source)
    check_shape(mask_file.mask, source.shape)
    check_table(mask_file.mask, mask_file.means)
    check_means(mask_file, skeleton.attention_width, skeleton.width)
    return source


def _check_room(folder: Path, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Raise DoesNotFit where the disk has no room for all that the source has, as wide as it is read."""
    each = sum(map(math.prod, skeleton.layer_parameters().values()))
    parameters = skeleton.layers * each + sum(map(math.prod, skeleton.non_layer_parameters().values()))
    needed = max(checkpoint.size_bytes, parameters * (checkpoint.float_bytes or 0))
    if needed > (free := free_bytes(folder)):
        raise DoesNotFit(
            f"--out {folder}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free; free some "
            "space or choose a folder on another disk"
        )


def _sizes(layers: LayerTensors, made: Skeleton, written: int) -> tuple[Sizes, Sizes]:
    """Return the sizes of the source, its tensors as wide as they are read, and of what was made of it."""
    source = layers.skeleton
    widths = {short: layers.read(0, short).dtype.itemsize for short in source.layer_parameters()}
    non_layer = sum(map(math.prod, source.non_layer_parameters().values()))

    def of_layers(skeleton: Skeleton) -> tuple[int, int]:
        counts = {short: math.prod(shape) for short, shape in skeleton.layer_parameters().items()}
        each = sum(counts.values()), sum(count * widths[short] for short, count in counts.items())
        return skeleton.layers * each[0], skeleton.layers * each[1]

    (source_count, source_bytes), (made_count, made_bytes) = of_layers(source), of_layers(made)
    return (
        Sizes(non_layer + source_count, source.layers, source.heads, written - made_bytes + source_bytes),
        Sizes(non_layer + made_count, made.layers, made.heads, written),
    )


def _smaller(mask_file: MaskFile, layers: LayerTensors) -> tuple[dict[str, Any], list[LayerRecipe]]:
    """Return config and layers of a model whose removed units are gone, as far as that can be."""
    mask, facts, skeleton = mask_file.mask, layers.facts, layers.skeleton
    if mask.ablation != "zero":
        raise InputError(
            f"--structural: expected a mask of ablation zero, got {mask.ablation}: means stay where the "
            "units were; leave --structural out"
        )
    recipes = packed_layers(mask, facts, layers.leaves_bias)
    config, refused = _with_layers(skeleton, recipes), ""
    if skeleton.family.free_head_width:
        config, recipes, refused = _with_fewer_heads(config, layers, recipes)
    same = len(recipes) == facts.layers and all(len(r.slots.heads) == facts.heads for r in recipes)
    if same:
        why = _why_nothing(skeleton, refused)
        raise InputError(f"--structural: {why}; leave --structural out for zeros instead")
    return config, recipes


def _why_nothing(skeleton: Skeleton, refused: str) -> str:
    """Return why neither layers nor heads can go; `refused`: why fewer heads were no model."""
    model_type = skeleton.config.model_type
    if not skeleton.family.hands_on(skeleton.config):
        return f"in this {model_type} the norms stand behind the sums, so that no layer can go"
    layers = "no layer is without all its heads and its FFN"
    if not skeleton.family.parallel(skeleton.config):
        layers = "no FFN is removed together with all heads of its own layer or of the next"
    heads = "every layer needs as many heads as it has"
    if refused:
        heads = f"with fewer heads it would be no model ({refused})"
    elif not skeleton.family.free_head_width:
        heads = f"{model_type} ties the heads' width to their number"
    return f"nothing can go: {layers}, and {heads}"


def _with_layers(skeleton: Skeleton, recipes: Sequence[LayerRecipe]) -> dict[str, Any]:
    """Return the config of a model of these layers."""
    config = copy.deepcopy(skeleton.config)
    for name in FIELDS_BY_LAYER:
        if values := getattr(config, name, None):
            setattr(config, name, [values[recipe.attention] for recipe in recipes])
    setattr(config, skeleton.layers_field, len(recipes))
    return dict(config.to_dict())


def _with_fewer_heads(
    config: dict[str, Any], layers: LayerTensors, recipes: list[LayerRecipe]
) -> tuple[dict[str, Any], list[LayerRecipe], str]:
    """Return config and layers with the fewest heads that hold every layer's and that transformers takes, and
    why it takes no fewer; nothing where no layer can do with fewer.
    """
    facts, width = layers.facts, layers.skeleton.head_width
    least_groups, least = least_heads(recipes, facts)
    sizes = [
        (groups, heads)
        for groups in range(least_groups, facts.groups + 1)
        for heads in range(least, facts.heads // facts.groups + 1)
    ]
    refused = ""
    # All heads fit and are valid: something is found.
    for groups, heads in sorted(sizes, key=lambda size: (size[0] * size[1], size[0])):
        smaller = config | {
            "num_attention_heads": groups * heads, "num_key_value_heads": groups, "head_dim": width
        }  # fmt: skip
        try:
            Skeleton.from_dict(smaller)
        except InputError as error:
            refused = " ".join(str(error).split())
            continue
        return smaller, [with_heads(recipe, facts, groups, heads) for recipe in recipes], refused
    raise AssertionError("the model's own heads are valid")


def _all_tensors(
    layers: LayerTensors, recipes: Sequence[LayerRecipe], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the new model, in the order of the source's files.

    What a checkpoint holds besides parameters of layers stays as it is.
    """
    checkpoint, blocks = layers.checkpoint, layers.skeleton.blocks_name

    def copied(name: str) -> Callable[[], Tensor]:
        return lambda: checkpoint.tensor(name)

    def changed(made: Made) -> Callable[[], Tensor]:
        return lambda: layers.tensor(made)

    of_layers = tuple(f"{name}." for name in (blocks, blocks.partition(".")[2]))
    shard_of = checkpoint.shard_of
    steps = [(shard_of[name], name, copied(name)) for name in shard_of if not name.startswith(of_layers)]
    steps += [(shard_of.get(made.source, ""), made.name, changed(made)) for made in layers.made(recipes)]
    with progress("exporting", len(steps), "tensors") as advance:
        # Stable: a file's tensors keep their order.
        for _, name, read in sorted(steps, key=lambda step: step[0]):
            yield name, read()
            advance(1)


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> int:
    """Write tensors into one file, or several with an index, in transformers' names; return their bytes."""
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size, total = 0, 0

    def flush() -> None:
        write_tensors(folder / f"part-{len(parts)}", held, {"format": "pt"})
        parts.append(list(held))
        held.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.dtype.itemsize
        if held and size + nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor
        size, total = size + nbytes, total + nbytes
    flush()
    if len(parts) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return total
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        shard = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        (folder / f"part-{number}").rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
