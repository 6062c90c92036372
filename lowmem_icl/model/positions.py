"""Rotary angles of every position, computed once by the model's own module and looked up from then on."""

import inspect

import torch
from torch import Tensor, nn

SHORTEST_TABLE = 512


class RotaryAngles:
    """What a rotary module gives for positions, by type of layer where the model has several.

    A table grows with the deepest position that is asked for, so it does not matter which are asked for
    together. Axis letters: N positions, A angles of a head.
    """

    def __init__(self, module: nn.Module, context_tokens: int, device: torch.device) -> None:
        self._module, self._device = module.to(device), device
        self._context_tokens = context_tokens
        self._by_type = "layer_type" in inspect.signature(module.forward).parameters
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}

    def at(self, positions: Tensor, deepest: int, layer_type: str | None) -> tuple[Tensor, Tensor]:
        """Return both halves of the angles, mostly cosines and sines, [1, N, A]; no position is deeper than
        `deepest`.
        """
        key = layer_type if self._by_type else None
        table = self._tables.get(key)
        if table is None or len(table[0]) <= deepest:
            # Never beyond the context: angles of some models depend on how far positions go.
            length = min(max(SHORTEST_TABLE, 1 << deepest.bit_length()), self._context_tokens)
            table = self._tables[key] = self._computed(length, key)
        first, second = (part.index_select(0, positions)[None] for part in table)
        return first, second

    def _computed(self, length: int, layer_type: str | None) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, device=self._device)[None]
        like = torch.zeros(1, device=self._device)
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        with torch.no_grad():
            first, second = self._module(like, positions, **arguments)
        return first[0], second[0]
