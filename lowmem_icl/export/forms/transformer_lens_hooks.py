"""Heads and FFNs of a transformers model removed in TransformerLens, by its hooks.

    bridge = TransformerBridge.boot_transformers(NAME)
    logits = bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks())

The weights must be the model's own: a bridge in compatibility mode moves the biases of values into the output
projection, and what is left without a head is then something else.
"""

from collections.abc import Callable
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


def fwd_hooks() -> list[tuple[str, Callable[..., Tensor]]]:
    """Return the hooks, as `run_with_hooks` and `hooks` take them."""
    means = _means()
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    for layer, heads in REMOVED_HEADS.items():
        fill = None if means is None else means["heads"][layer].view(HEADS, -1)[heads]
        hooks.append((f"blocks.{layer}.attn.hook_z", _cutting(heads, fill)))
    for layer in REMOVED_FFNS:
        fill = None if means is None else means["ffns"][layer]
        hooks.append((f"blocks.{layer}.hook_mlp_out", _replacing(fill)))
    return hooks


def _means() -> dict[str, Tensor] | None:
    if MEANS is None:
        return None
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(Path(__file__).with_name(MEANS))
    return found


def _cutting(heads: list[int], fill: Tensor | None) -> Callable[..., Tensor]:
    def cut(z: Tensor, hook: Any) -> Tensor:
        # [rows, tokens, heads, head width]; side by side in some versions.
        by_head = z.clone() if z.shape[-2] == HEADS and z.dim() == 4 else z.unflatten(-1, (HEADS, -1)).clone()
        by_head[..., heads, :] = 0 if fill is None else fill.to(z)
        return by_head.view(z.shape)

    return cut


def _replacing(fill: Tensor | None) -> Callable[..., Tensor]:
    def replace(output: Tensor, hook: Any) -> Tensor:
        if fill is None:
            return torch.zeros_like(output)
        return fill.to(output).expand_as(output).clone()

    return replace
