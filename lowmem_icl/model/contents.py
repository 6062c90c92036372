"""Which tensors a store's files must hold: names, shapes and types, as their headers tell."""

from collections.abc import Mapping
from pathlib import Path

import torch

from lowmem_icl.model.integrity import damaged
from lowmem_icl.model.nf4 import packed_shape, part_forms
from lowmem_icl.model.reading import TensorLocation
from lowmem_icl.model.skeleton import Skeleton

Form = tuple[tuple[int | None, ...], tuple[torch.dtype, ...]]
"""A tensor's shape, None where any length will do, and the types that it may have."""
Locations = Mapping[str, TensorLocation]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WEIGHT_TYPES = {
    "int8": (torch.int8,),
    "nf4": (torch.uint8,),
    "bfloat16": (torch.bfloat16,),
    "float32": (torch.float32,),
}


def check_layer(path: Path, locations: Locations, skeleton: Skeleton, weights: str) -> None:
    """Raise InputError where a layer's file lacks a tensor, or has one of another name, shape or type."""
    forms: dict[str, Form] = {name: (shape, FLOATS) for name, shape in skeleton.layer_parameters().items()}
    for linear, shape in skeleton.linear_shapes.items():
        stored = packed_shape(shape) if weights == "nf4" else shape
        forms[f"{linear}.weight"] = stored, WEIGHT_TYPES[weights]
        if weights == "int8":
            forms[f"{linear}.SCB"] = shape[:1], (torch.float32,)
            forms[f"{linear}.weight_format"] = (), (torch.uint8,)
            forms[f"{linear}.outlier_columns"] = (None,), (torch.int64,)
        elif weights == "nf4":
            for part, (part_shape, dtype) in part_forms(shape).items():
                forms[f"{linear}.weight.{part}"] = part_shape, (dtype,)
    _check(path, locations, forms)


def check_non_layer(path: Path, locations: Locations, skeleton: Skeleton) -> None:
    """Raise InputError where the file of what is outside the layers holds anything else."""
    _check(
        path,
        locations,
        {name: (shape, FLOATS) for name, shape in skeleton.non_layer_parameters().items()},
    )


def _check(path: Path, locations: Locations, forms: Mapping[str, Form]) -> None:
    for name, (shape, types) in forms.items():
        found = locations.get(name)
        if found is None:
            raise damaged(path, f"parameter '{name}' is missing")
        fits = [wanted is None or wanted == size for wanted, size in zip(shape, found.shape, strict=False)]
        if len(shape) != len(found.shape) or not all(fits):
            expected = ", ".join("any length" if size is None else str(size) for size in shape)
            raise damaged(path, f"parameter '{name}': expected shape [{expected}], found {list(found.shape)}")
        if found.dtype not in types:
            expected = " or ".join(map(str, types))
            raise damaged(path, f"parameter '{name}': expected type {expected}, found {found.dtype}")
    for name in sorted(locations.keys() - forms.keys()):
        raise damaged(path, f"holds {name!r}, which is no parameter of it")
