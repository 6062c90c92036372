"""Which tensors a store's files must hold: names, shapes and types, as their headers tell."""

from collections.abc import Mapping
from pathlib import Path

import torch

from lowmem_icl.model.integrity import damaged
from lowmem_icl.model.nf4 import packed_shape
from lowmem_icl.model.reading import TensorLocation
from lowmem_icl.model.skeleton import Skeleton

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WEIGHT_TYPES = {
    "int8": (torch.int8,),
    "nf4": (torch.uint8,),
    "bfloat16": (torch.bfloat16,),
    "float32": (torch.float32,),
}
EXTRAS = {
    "int8": ("SCB", "weight_format", "outlier_columns"),
    "nf4": (
        "weight.absmax",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4",
        "weight.nested_offset",
    ),
}

Locations = Mapping[str, TensorLocation]


def check_layer(path: Path, locations: Locations, skeleton: Skeleton, weights: str) -> None:
    """Raise InputError where a layer's file lacks a tensor, or has one of another name, shape or type."""
    shapes, linears = skeleton.layer_parameters(), skeleton.linear_shapes
    if weights == "nf4":
        shapes |= {f"{name}.weight": packed_shape(shape) for name, shape in linears.items()}
    types = {f"{name}.weight": WEIGHT_TYPES[weights] for name in linears}
    if weights == "int8":
        shapes |= {f"{name}.SCB": shape[:1] for name, shape in linears.items()}
    extras = {f"{name}.{part}" for name in linears for part in EXTRAS.get(weights, ())}
    _check(path, locations, shapes, types, extras)


def check_non_layer(path: Path, locations: Locations, skeleton: Skeleton) -> None:
    """Raise InputError where the file of what is outside the layers holds anything else."""
    _check(path, locations, skeleton.non_layer_parameters(), {}, set())


def _check(
    path: Path,
    locations: Locations,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, tuple[torch.dtype, ...]],
    extras: set[str],
) -> None:
    for name, shape in shapes.items():
        found = locations.get(name)
        if found is None:
            raise damaged(path, f"parameter '{name}' is missing")
        if found.shape != shape:
            raise damaged(
                path, f"parameter '{name}': expected shape {list(shape)}, found {list(found.shape)}"
            )
        if found.dtype not in types.get(name, FLOATS):
            raise damaged(path, f"parameter '{name}' is of type {found.dtype}, which this store has not")
    for name in sorted(locations.keys() - shapes.keys() - extras):
        raise damaged(path, f"holds {name!r}, which is no parameter of it")
