"""Micro-batches: rows and their variants together through a layer, as many tokens as are worth multiplying at once.

Axis letters: V variants, T tokens of a row, N tokens of a micro-batch, D width, H heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_icl.model.layer import Segment, tree_mask
from lowmem_icl.rows import Row

MICRO_BATCH_TOKENS = 1280


@dataclass(frozen=True)
class Piece:
    """The variants from `first` to before `stop` of the row at `place` of a block."""

    place: int
    first: int
    stop: int


def micro_batches(tokens: Sequence[int], alive: Sequence[int]) -> Iterator[list[Piece]]:
    """Deal the alive variants of rows of so many tokens over micro-batches, in order.

    A micro-batch has at most MICRO_BATCH_TOKENS, or a single variant that is longer.
    """
    batch: list[Piece] = []
    room = MICRO_BATCH_TOKENS
    for place, (length, variants) in enumerate(zip(tokens, alive, strict=True)):
        first = 0
        while first < variants:
            if batch and room < length:
                yield batch
                batch, room = [], MICRO_BATCH_TOKENS
            taken = min(variants - first, max(1, room // length))
            batch.append(Piece(place, first, first + taken))
            room -= taken * length
            first += taken
    if batch:
        yield batch


def segments(pieces: Sequence[Piece], rows: Sequence[Row], device: torch.device) -> list[Segment]:
    """Return the pieces as a layer takes them; `rows` are those of the block."""
    return [
        Segment(piece.stop - piece.first, tree_mask(torch.from_numpy(rows[piece.place].ends).to(device)))
        for piece in pieces
    ]


def gather(residuals: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """Return the pieces' residuals one after the other, [N, D]; `residuals` are a block's, [V, T, D] each."""
    parts = [residuals[piece.place][piece.first : piece.stop].flatten(0, 1) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scatter(flat: Tensor, residuals: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
    """Write [N, D] back to where `gather` took it from."""
    start = 0
    for piece in pieces:
        target = residuals[piece.place][piece.first : piece.stop].flatten(0, 1)
        target.copy_(flat[start : start + len(target)])
        start += len(target)


def join(kept: Sequence[Tensor | None], pieces: Sequence[Piece]) -> Tensor | None:
    """Return what the pieces' variants keep, [V, ...], one after the other; None where they keep everything.

    kept: for every piece its row's tensor of 0 and 1 over all variants of the row, or None for only 1.
    """
    some = next((tensor for tensor in kept if tensor is not None), None)
    if some is None:
        return None
    parts = [
        some.new_ones(piece.stop - piece.first, *some.shape[1:])
        if tensor is None
        else tensor[piece.first : piece.stop]
        for tensor, piece in zip(kept, pieces, strict=True)
    ]
    return torch.cat(parts)
