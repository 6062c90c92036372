"""Means of units' outputs, which mean ablation puts in their place: arrays, and a small file of them.

The file is safetensors: `heads` [L, Z] and `ffns` [L, D], float32; it is named by its digest.
Axis letters: L layers, H heads, Z the heads' outputs side by side, D width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Means = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class UnitMeans:
    """One vector per unit, the same at all tokens.

    heads [L, Z]: of every head its slice of the output projection's input; ffns [L, D]: what an FFN writes
    into the residual, after the norm of a family that norms it.
    """

    heads: Means
    ffns: Means

    @cached_property
    def digest(self) -> str:
        """SHA-256 over both arrays and their shapes."""
        summed = hashlib.sha256()
        for array in (self.heads, self.ffns):
            summed.update(repr(array.shape).encode())
            summed.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return summed.hexdigest()


def mean_of_tables(tables: Sequence[UnitMeans]) -> UnitMeans:
    """Return the plain mean of tables, each counting the same."""

    def mean(arrays: Sequence[Means]) -> Means:
        return np.asarray(np.mean(arrays, axis=0, dtype=np.float64), dtype=np.float32)

    return UnitMeans(mean([table.heads for table in tables]), mean([table.ffns for table in tables]))
