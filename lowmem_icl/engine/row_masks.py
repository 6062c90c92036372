"""How rows enter the model, and how a layer sees them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_icl.model.attention import RowMask, Segment
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import Row


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
