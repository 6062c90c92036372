"""Heads and FFNs of a transformers model removed in nnsight.

with model.edit() as (tracer, edited):   # for good, in a copy that shares the weights
    remove(edited)
with model.trace(prompt):                # or in one trace, before anything else in it
    remove(model)
"""

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS = 0
HEADS = 0
REMOVED_HEADS: dict[int, list[int]] = {}
REMOVED_FFNS: list[int] = []
MEANS: str | None = None
"""File beside this one of what stands in place of removed units: `heads` [layers, heads × head width] and
`ffns` [layers, width]; None for zeros."""
BLOCKS = ""
"""Where the model has its layers, and, in a layer, the output projection of the attention and what writes the
FFN's part into the residual."""
ATTENTION_OUTPUT = ""
FFN_WRITES = ""


def remove(model: Any) -> None:
    """Remove the units, within a trace or an edit; layers come in the order in which the model runs them."""
    means = _means()
    for layer in range(LAYERS):
        if heads := REMOVED_HEADS.get(layer):
            projection = _part(model, f"{BLOCKS}.{layer}.{ATTENTION_OUTPUT}")
            z = projection.input.clone()
            fill = None if means is None else means["heads"][layer].view(HEADS, -1)[heads].to(z)
            z.unflatten(-1, (HEADS, -1))[..., heads, :] = 0 if fill is None else fill
            projection.input = z
        if layer in REMOVED_FFNS:
            writing = _part(model, f"{BLOCKS}.{layer}.{FFN_WRITES}")
            output = writing.output
            if means is None:
                writing.output = torch.zeros_like(output)
            else:
                writing.output = means["ffns"][layer].to(output).expand_as(output).clone()


def _part(model: Any, name: str) -> Any:
    return reduce(
        lambda at, word: at[int(word)] if word.isdigit() else getattr(at, word), name.split("."), model
    )


def _means() -> dict[str, Tensor] | None:
    if MEANS is None:
        return None
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(Path(__file__).with_name(MEANS))
    return found
