"""Rows without stems, each under one mask: how they enter the model and how a layer sees them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_icl.model.layer import Segment, attention_mask
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import Row


def embedded(model: StreamedModel, row: Row) -> Tensor:
    """Return a row's residual at the first layer's input, [T, D]; of any row, its stem left aside."""
    return model.embed(torch.from_numpy(row.tokens), torch.from_numpy(row.positions))


def plain_segments(model: StreamedModel, rows: Sequence[Row]) -> list[Segment]:
    """Return the segments of rows without stems."""
    return [Segment(1, len(row), attention_mask(torch.from_numpy(row.ends).to(model.device))) for row in rows]
