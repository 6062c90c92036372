"""Where masks become what a layer works with: arrays that say which heads and FFNs are present.

Axis letters: S masks, H heads, F fills, Z width of the heads' outputs side by side, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans

Fills = Mapping[str, UnitMeans]
"""What the names in masks stand for."""


class RemovedUnits:
    """The removed units of S masks, sorted by layer."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._masks = len(masks)
        heads = [(layer, index, head) for index, mask in enumerate(masks) for layer, head in mask.heads]
        ffns = [(layer, index) for index, mask in enumerate(masks) for layer in mask.ffns]
        self._heads = np.array(sorted(heads), dtype=np.int64).reshape(-1, 3)
        self._ffns = np.array(sorted(ffns), dtype=np.int64).reshape(-1, 2)

    def keep_tensors(self, layer: int, heads: int) -> tuple[NDArray[np.float32] | None, NDArray[np.bool_]]:
        """Return keep_heads [S, H] of 0 and 1, None where all are kept, and keep_ffn [S]."""
        keep_ffn = np.ones(self._masks, dtype=np.bool_)
        keep_ffn[_of_layer(self._ffns, layer)[:, 1]] = False
        removed = _of_layer(self._heads, layer)
        if not len(removed):
            return None, keep_ffn
        keep_heads = np.ones((self._masks, heads), dtype=np.float32)
        keep_heads[removed[:, 1], removed[:, 2]] = 0
        return keep_heads, keep_ffn


@dataclass(frozen=True, eq=False)
class LayerFills:
    """What stands in removed units' place in one layer, the same at all tokens.

    heads [F, Z] and ffns [F, D]: every fill, the first all zeros; `index` [S]: which of them is each mask's.
    """

    heads: Tensor
    ffns: Tensor
    index: NDArray[np.int64]

    def heads_of(self, masks: slice | NDArray[np.int64]) -> Tensor:
        """Return what some masks put in place of their heads' outputs, [S, 1, Z]."""
        return self.heads[torch.from_numpy(self.index[masks]).to(self.heads.device)][:, None]

    def ffns_of(self, masks: slice | NDArray[np.int64]) -> Tensor:
        """Return what some masks put in place of what their FFN writes, [S, 1, D]."""
        return self.ffns[torch.from_numpy(self.index[masks]).to(self.ffns.device)][:, None]


def fill_of(mask: Mask, fills: Fills) -> UnitMeans | None:
    """Return what a mask's name stands for; None for zeros."""
    return None if mask.fill is None else fills[mask.fill]


class MaskFills:
    """What S masks put in their units' place; None for zeros."""

    def __init__(self, of_masks: Sequence[UnitMeans | None]) -> None:
        self._used = list({id(fill): fill for fill in of_masks if fill is not None}.values())
        numbers = {id(fill): number for number, fill in enumerate(self._used, start=1)}
        self._index = np.array([numbers.get(id(fill), 0) for fill in of_masks], dtype=np.int64)

    def at(self, layer: int, device: torch.device) -> LayerFills | None:
        """Return what stands in units' place in a layer; None where it is zeros under all masks."""
        if not self._used:
            return None
        heads, ffns = (
            np.stack([np.zeros_like(tables[0][layer]), *(table[layer] for table in tables)])
            for tables in ([used.heads for used in self._used], [used.ffns for used in self._used])
        )
        return LayerFills(torch.from_numpy(heads).to(device), torch.from_numpy(ffns).to(device), self._index)


def _of_layer(units: NDArray[np.int64], layer: int) -> NDArray[np.int64]:
    """Return the units of a layer from units that are sorted by it."""
    first, last = np.searchsorted(units[:, 0], [layer, layer + 1])
    return units[first:last]
