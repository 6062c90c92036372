"""One wave: the residuals of the variants alive together, and how they go through one layer.

Axis letters: S slots of a job (the clean run, then its variants by first layer), V variants of a micro-batch, T tokens
of a row, P of its stem, R places of a row where answers are read, D width, H heads, d head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.answers import AnswerReader, Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.micro_batches import Piece, RowGroup, Slots, micro_batches, row_groups
from lowmem_icl.engine.schedule import BlockRow, Job, SweepLimits, Variant
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.layer import Attended, DecoderLayer, Segment, attention_mask, cut_heads
from lowmem_icl.model.streamed import StreamedModel

CLEAN = -1
_CLEAN_SLOT: Slots = np.zeros(1, dtype=np.int64)
KEPT_MASK_ELEMENTS = 1 << 21

Account = Callable[[SweepCost], None]


@dataclass(frozen=True, eq=False)
class _AtLayer:
    """What a layer means for a job's slots: who branches there and who goes on, and what each keeps.

    keep_heads: [S, H] of 0 and 1, None where no head is removed. The second of each pair have their FFN removed.
    """

    joining: tuple[Slots, Slots]
    going_on: tuple[Slots, Slots]
    keep_heads: Tensor | None


class _Slots:
    """The variants of one job in a wave; the clean run, where it is among them, is slot 0."""

    def __init__(self, masks: Sequence[Mask], variants: Sequence[Variant], *, clean: bool) -> None:
        places = [variant.mask for variant in variants]
        self.places = np.array([CLEAN, *places] if clean else places, dtype=np.int64)
        self._first = np.array(
            [CLEAN] * clean + [variant.first_layer for variant in variants], dtype=np.int64
        )
        self._removed = RemovedUnits([Mask()] * clean + [masks[place] for place in places])

    def __len__(self) -> int:
        return len(self.places)

    def at(self, layer: int, heads: int, device: torch.device) -> _AtLayer:
        """Return who does what at a layer."""
        keep_heads, keep_ffn = self._removed.keep_tensors(layer, heads)
        variants = self.places != CLEAN
        joining, going_on = variants & (self._first == layer), variants & (self._first < layer)
        return _AtLayer(
            joining=(np.flatnonzero(joining & keep_ffn), np.flatnonzero(joining & ~keep_ffn)),
            going_on=(np.flatnonzero(going_on & keep_ffn), np.flatnonzero(going_on & ~keep_ffn)),
            keep_heads=None if keep_heads is None else torch.from_numpy(keep_heads).to(device),
        )


class RemovedUnits:
    """The removed units of S masks as arrays by layer: the one place where masks become what a layer works with."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._masks = len(masks)
        heads = [(layer, slot, head) for slot, mask in enumerate(masks) for layer, head in mask.heads]
        ffns = [(layer, slot) for slot, mask in enumerate(masks) for layer in mask.ffns]
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
    """Return the rows of a layer from rows that are sorted by it."""
    first, last = np.searchsorted(units[:, 0], [layer, layer + 1])
    return units[first:last]


class Wave:
    """Variants of a block of rows from their first layers to their option scores."""

    def __init__(
        self,
        model: StreamedModel,
        jobs: Sequence[Job],
        block: Sequence[BlockRow],
        variants: Sequence[Variant],
        *,
        clean_layers: int | None,
        keep_at: frozenset[int],
        cache: CleanCache,
        limits: SweepLimits,
        scores: Sequence[Scores],
        account: Account,
    ) -> None:
        """Allocate the residuals; the clean run goes through so many layers with this wave, None where it does not.

        `keep_at`: the layers at whose input it is kept. What variants branch from without it must be in the cache.
        """
        self._model, self._block, self._cache = model, block, cache
        self._jobs, self._scores, self._account = jobs, scores, account
        self._most_tokens = limits.micro_batch_tokens
        clean = clean_layers is not None
        self._clean_layers = -1 if clean_layers is None else clean_layers
        self._keep_at = keep_at
        self.first_layer = 0 if clean else variants[0].first_layer
        self._rows = [member.row for member in block]
        self._lengths = [len(row) for row in self._rows]
        self._groups = row_groups(self._rows, self._most_tokens)
        self._slots = {
            job: _Slots(jobs[job].masks, [v for v in variants if v.job == job], clean=clean)
            for job in {member.job for member in block}
        }
        self._reader = AnswerReader(model)
        self._reads: list[Tensor | None] = [None] * len(block)
        self._masks: dict[int, Tensor] = {}
        self._mask_room = KEPT_MASK_ELEMENTS
        skeleton, device = model.skeleton, model.device
        self._residuals: list[Tensor] = []
        for member in block:
            slots = len(self._slots[member.job])
            self._residuals.append(torch.empty(slots, len(member.row), skeleton.width, device=device))
            if clean:
                tokens, positions = (
                    torch.from_numpy(array) for array in (member.row.tokens, member.row.positions)
                )
                self._residuals[-1][0] = model.embed(tokens, positions)

    def step(self, number: int, layer: DecoderLayer) -> None:
        """Take everything alive through one layer."""
        skeleton, device = self._model.skeleton, self._model.device
        at = {job: slots.at(number, skeleton.heads, device) for job, slots in self._slots.items()}
        if number == skeleton.layers - 1:
            # Only where answers are read does anything follow.
            self._reads = [torch.from_numpy(row.reads).to(device) for row in self._rows]
        for group in self._groups:
            self._clean_and_joining(number, layer, group, at)
            for removed in (False, True):
                self._going_on(layer, group, at, removed)

    def finish(self) -> None:
        """Score what was read and drop the residuals."""
        self._reader.flush()
        self._residuals.clear()

    def _at(self, at: dict[int, _AtLayer], place: int) -> _AtLayer:
        return at[self._block[place].job]

    def _clean_and_joining(
        self, number: int, layer: DecoderLayer, group: RowGroup, at: dict[int, _AtLayer]
    ) -> None:
        """Run the clean rows of a group, and what branches from them here with their z."""
        clean = number <= self._clean_layers
        joining = tuple(place for place in group.places if any(map(len, self._at(at, place).joining)))
        places = group.places if clean else joining
        if not places:
            return
        # Rows of a stem are of one job, so what holds for them holds for it.
        stem = None if group.stem is None else self._clean_rows(number, layer, [group.stem], None, at)
        work = ((place, _CLEAN_SLOT) for place in places)
        for batch in micro_batches(work, self._lengths, self._most_tokens):
            self._clean_rows(number, layer, [piece.place for piece in batch], stem, at)

    def _clean_rows(
        self,
        number: int,
        layer: DecoderLayer,
        places: Sequence[int],
        stem: Attended | None,
        at: dict[int, _AtLayer],
    ) -> Attended:
        """Take some clean rows, and the variants that branch from them, through a layer; return what they attended."""
        sources = [self._source(place, number) for place in places]
        flat = torch.cat(sources)
        attended = layer.attend(flat, [self._segment(place, 1, stem) for place in places])
        self._account(SweepCost(attended=len(flat)))
        zs = dict(zip(places, attended.z.split([len(source) for source in sources]), strict=True))
        inputs = dict(zip(places, sources, strict=True))
        for removed in (False, True):
            work = ((place, self._at(at, place).joining[removed]) for place in places)
            for batch in micro_batches(work, self._lengths, self._most_tokens):
                residuals, cut = [], []
                for piece in batch:
                    keep = self._at(at, piece.place).keep_heads
                    z, source = (self._at_reads(x[piece.place], piece.place) for x in (zs, inputs))
                    variants = len(piece.slots)
                    residuals.append(source.expand(variants, *source.shape))
                    cut.append(
                        z.expand(variants, *z.shape) if keep is None else cut_heads(z, keep[piece.index])
                    )
                self._finish(layer, batch, residuals, cut, removed)
        if number < self._clean_layers:
            # Last: it overwrites the residuals that the others start from.
            pieces = [Piece(place, _CLEAN_SLOT) for place in places]
            self._finish(
                layer,
                pieces,
                [self._at_reads(inputs[place], place)[None] for place in places],
                [self._at_reads(zs[place], place)[None] for place in places],
                without_ffn=False,
            )
        return attended

    def _source(self, place: int, number: int) -> Tensor:
        """Return a row's clean residual at the layer's input, [T, D]."""
        row = self._rows[place]
        if number > self._clean_layers:
            return self._cache.get(row, number, self._model.device)
        source = self._residuals[place][0]
        if number in self._keep_at:
            self._cache.keep(row, number, source)
        return source

    def _going_on(self, layer: DecoderLayer, group: RowGroup, at: dict[int, _AtLayer], removed: bool) -> None:
        """Take the variants that branched earlier through both halves of a layer."""
        if group.stem is None:
            work = ((place, self._at(at, place).going_on[removed]) for place in group.places)
            for batch in micro_batches(work, self._lengths, self._most_tokens):
                self._attend_and_finish(layer, batch, None, at, removed)
            return
        slots = self._at(at, group.stem).going_on[removed]
        together = max(1, self._most_tokens // self._lengths[group.stem])
        for first in range(0, len(slots), together):
            chunk = slots[first : first + together]
            stem = self._attend_and_finish(layer, [Piece(group.stem, chunk)], None, at, removed)
            work = ((place, chunk) for place in group.places)
            for batch in micro_batches(work, self._lengths, self._most_tokens):
                self._attend_and_finish(layer, batch, (stem, chunk), at, removed)

    def _attend_and_finish(
        self,
        layer: DecoderLayer,
        batch: Sequence[Piece],
        stem: tuple[Attended, Slots] | None,
        at: dict[int, _AtLayer],
        removed: bool,
    ) -> Attended:
        inputs = [self._residuals[piece.place][piece.index] for piece in batch]
        flat = _flattened(inputs)
        segments = []
        for piece in batch:
            of_stem = None if stem is None else _of_slots(stem[0], stem[1], piece.slots)
            segments.append(self._segment(piece.place, len(piece.slots), of_stem))
        attended = layer.attend(flat, segments)
        self._account(SweepCost(attended=len(flat)))
        residuals, zs = [], []
        parts = attended.z.split([segment.size for segment in segments])
        for piece, source, part in zip(batch, inputs, parts, strict=True):
            keep = self._at(at, piece.place).keep_heads
            z = self._at_reads(part.view(source.shape), piece.place)
            residuals.append(self._at_reads(source, piece.place))
            zs.append(z if keep is None else cut_heads(z, keep[piece.index]))
        self._finish(layer, batch, residuals, zs, removed)
        return attended

    def _finish(
        self,
        layer: DecoderLayer,
        batch: Sequence[Piece],
        residuals: Sequence[Tensor],
        zs: Sequence[Tensor],
        without_ffn: bool,
    ) -> None:
        """Take [V, T, D] each, or in the last layer [V, R, D], through the second half and to where they belong."""
        shapes = [residual.shape for residual in residuals]
        tokens = sum(shape[0] * shape[1] for shape in shapes)
        if not tokens:
            return
        after = layer.finish(_flattened(residuals), _flattened(zs), without_ffn=without_ffn)
        self._account(SweepCost(projected=tokens, fed=0 if without_ffn else tokens))
        parts = after.split([shape[0] * shape[1] for shape in shapes])
        for piece, part, shape in zip(batch, parts, shapes, strict=True):
            if self._reads[piece.place] is None:
                self._residuals[piece.place][piece.index] = part.view(shape)
            else:
                self._read(piece, part.view(shape))

    def _read(self, piece: Piece, hidden: Tensor) -> None:
        member = self._block[piece.place]
        masks = self._slots[member.job].places[piece.slots]
        if masks[0] == CLEAN:
            asked = self._jobs[member.job].masks
            clean = np.array(
                [place for place, mask in enumerate(asked) if mask.first_layer is None], np.int64
            )
            masks, hidden = clean, hidden.expand(len(clean), *hidden.shape[1:])
        if hidden.numel():
            self._account(SweepCost(answers=hidden.shape[0] * hidden.shape[1]))
            self._reader.add(self._scores[member.job], masks, member.row, hidden)

    def _at_reads(self, states: Tensor, place: int) -> Tensor:
        """Return states [..., T, D] at the places that matter: all, or in the last layer those read [..., R, D]."""
        reads = self._reads[place]
        return states if reads is None else states.index_select(-2, reads)

    def _segment(self, place: int, variants: int, stem: Attended | None) -> Segment:
        row = self._rows[place]
        mask = self._masks.get(place)
        if mask is None:
            stem_tokens = 0 if row.stem is None else len(row.stem)
            mask = attention_mask(torch.from_numpy(row.ends).to(self._model.device), stem_tokens)
            if mask.numel() <= self._mask_room:
                # Kept for the next layers as long as they are small together.
                self._masks[place] = mask
                self._mask_room -= mask.numel()
        if stem is None:
            return Segment(variants, len(row), mask)
        keys, values = (
            states.unflatten(1, (variants, -1)).transpose(0, 1) for states in (stem.keys, stem.values)
        )
        return Segment(variants, len(row), mask, keys, values)


def _flattened(parts: Sequence[Tensor]) -> Tensor:
    """Return [V, T, D] each as one [N, D]."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _of_slots(stem: Attended, of_stem: Slots, wanted: Slots) -> Attended:
    """Return the part of what a stem attended that belongs to some of its slots, which stand side by side."""
    first = int(np.searchsorted(of_stem, wanted[0]))
    tokens = stem.keys.shape[1] // len(of_stem)
    places = slice(first * tokens, (first + len(wanted)) * tokens)
    return Attended(stem.z, stem.keys[:, places], stem.values[:, places])
