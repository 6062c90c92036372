"""Means of units' outputs over the tokens of rows, layer by layer.

Axis letters: L layers, T tokens of a row, R rows, Z the heads' outputs side by side, D width.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.schedule import BlockRow, SweepLimits, head_blocks
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.layer import CapturedRun
from lowmem_icl.rows import PackedRows

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MeanSums:
    """What the tokens of one task's rows add up to.

    heads [L, Z]: z; ffns [L, D]: what FFNs write into the residual; tokens [1]: of how many; `finished` [R]:
    which rows are in it. Rows are added one after the other, in order, so that the sums depend on neither
    blocks nor batches.
    """

    heads: Values
    ffns: Values
    tokens: NDArray[np.int64]
    finished: NDArray[np.bool_]

    @classmethod
    def empty(cls, rows: int, layers: int, attention_width: int, width: int) -> "MeanSums":
        """Return sums of nothing."""
        return cls(
            np.zeros((layers, attention_width)),
            np.zeros((layers, width)),
            np.zeros(1, dtype=np.int64),
            np.zeros(rows, dtype=np.bool_),
        )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def means(self) -> UnitMeans:
        """Return the means over all tokens."""
        heads, ffns = ((sums / self.tokens).astype(np.float32) for sums in (self.heads, self.ffns))
        return UnitMeans(heads, ffns)


class BlockSums:
    """The sums with the rows of a block added; given to `results` when the block is whole.

    `ends_only`: of every row its last token alone is added.
    """

    def __init__(self, results: Sequence[MeanSums], *, ends_only: bool = False) -> None:
        self._results = results
        self._added = slice(-1, None) if ends_only else slice(None)
        self._heads = [result.heads.copy() for result in results]
        self._ffns = [result.ffns.copy() for result in results]

    def add(self, number: int, members: Sequence[BlockRow], run: CapturedRun) -> None:
        """Add what rows give at a layer."""
        lengths = [len(member.row) for member in members]
        assert run.ffn is not None, "of the whole model"
        parts = zip(members, run.z.split(lengths), run.ffn.split(lengths), strict=True)
        for member, z, ffn in parts:
            self._heads[member.job][number] += _summed(z[self._added])
            self._ffns[member.job][number] += _summed(ffn[self._added])

    def finish(self, numbers: Sequence[tuple[int, int]], block: Sequence[BlockRow]) -> None:
        """Keep the sums; numbers: of every row of the block its job and its number among this one's rows."""
        for result, heads, ffns in zip(self._results, self._heads, self._ffns, strict=True):
            result.heads[:], result.ffns[:] = heads, ffns
        for (job, number), member in zip(numbers, block, strict=True):
            result = self._results[job]
            result.tokens[0] += len(member.row.tokens[self._added])
            result.finished[number] = True


def _summed(values: Tensor) -> Values:
    return np.asarray(values.to("cpu", torch.float64).numpy().sum(0))


def means_cost(
    packed: Sequence[PackedRows], size: tuple[int, int], limits: SweepLimits, resident: Collection[int] = ()
) -> SweepCost:
    """Return what the means over rows take in a model of (layers, width): forward through all layers."""
    layers, width = size
    rows = [BlockRow(index, row) for index, of_task in enumerate(packed) for row in of_task.rows]
    blocks = head_blocks(rows, width, layers, limits)
    tokens = layers * sum(rows.token_count for rows in packed)
    return SweepCost(tokens, tokens, tokens, layers_read=len(blocks) * (layers - len(resident)))
