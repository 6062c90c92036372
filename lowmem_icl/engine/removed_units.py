"""Where masks become what a layer works with: arrays that say which heads and FFNs are present.

Axis letters: S masks, H heads.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask


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


def _of_layer(units: NDArray[np.int64], layer: int) -> NDArray[np.int64]:
    """Return the units of a layer from units that are sorted by it."""
    first, last = np.searchsorted(units[:, 0], [layer, layer + 1])
    return units[first:last]
