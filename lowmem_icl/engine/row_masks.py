"""How rows enter the model, and how a layer sees them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_icl.model.attention import RowMask, Segment
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import Row

KEPT_MASK_ELEMENTS = 1 << 21


def embedded(model: StreamedModel, row: Row) -> Tensor:
    """Return a row's residual at the first layer's input, [T, D]; of any row, its stem left aside."""
    return model.vocabulary.embed(torch.from_numpy(row.tokens), torch.from_numpy(row.positions))


def row_mask(model: StreamedModel, row: Row) -> RowMask:
    """Return what a row's tokens see of it and of its stem."""
    ends, positions = (torch.from_numpy(array).to(model.device) for array in (row.ends, row.positions))
    stem_tokens = 0 if row.stem is None else len(row.stem)
    return RowMask.of(ends, positions, int(row.positions.max(initial=0)), stem_tokens)


def plain_segments(model: StreamedModel, rows: Sequence[Row]) -> list[Segment]:
    """Return the segments of rows without stems, each under one mask."""
    return [Segment(1, row_mask(model, row)) for row in rows]


class RowMasks:
    """What rows' tokens see, made once and kept as long as all that is kept is small."""

    def __init__(self, model: StreamedModel) -> None:
        self._model, self._kept, self._room = model, dict[Row, RowMask](), KEPT_MASK_ELEMENTS

    def of(self, row: Row) -> RowMask:
        """Return a row's mask."""
        mask = self._kept.get(row)
        if mask is None:
            mask = row_mask(self._model, row)
            if mask.seen.numel() <= self._room:
                self._kept[row] = mask
                self._room -= mask.seen.numel()
        return mask
