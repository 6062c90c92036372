"""One wave: the residuals of the variants alive together, and how they go through one layer.

Axis letters: S slots of a job (the clean run, then its variants by first layer), V variants of a micro-batch,
T tokens of a row, P of its stem, R tokens of a row that are read, D width, H heads, Z their outputs' width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowmem_icl.engine.answers import AnswerReader, PendingAnswers, Scores
from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.fills import DonatedValues, LayerFills, MaskFills, fill_of
from lowmem_icl.engine.micro_batches import (
    Piece,
    RowGroup,
    Slots,
    flattened,
    micro_batches,
    row_batches,
    row_groups,
)
from lowmem_icl.engine.removed_units import RemovedUnits
from lowmem_icl.engine.row_masks import RowMasks, embedded, plain_segments
from lowmem_icl.engine.schedule import Block, Job, PlannedWave, Variant
from lowmem_icl.engine.setup import PassSetup
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.attention import Segment
from lowmem_icl.model.layer import AttentionOutput, DecoderLayer, cut_heads
from lowmem_icl.rows import Integers, Row

CLEAN = -1
_CLEAN_SLOT: Slots = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _LayerSlots:
    """What a layer means for a job's slots: which branch there and which continue, and what each keeps.

    keep_heads: [S, H] of 0 and 1, None where no head is removed. The second of each pair have their FFN
    removed. fills: what stands in removed units' place, None for zeros.
    """

    branching: tuple[Slots, Slots]
    continuing: tuple[Slots, Slots]
    keep_heads: Tensor | None
    fills: LayerFills | None


class _JobSlots:
    """The variants of one job in a wave; the clean run, where it is among them, is slot 0.

    `masks` [S]: the index of each slot's mask in the job's list, CLEAN for the clean run.
    """

    def __init__(
        self, job: Job, variants: Sequence[Variant], widths: tuple[int, int], *, clean: bool
    ) -> None:
        indices = [variant.mask for variant in variants]
        self.masks: Integers = np.array([CLEAN, *indices] if clean else indices, dtype=np.int64)
        firsts = [variant.first_layer for variant in variants]
        self._first = np.array([CLEAN] * clean + firsts, dtype=np.int64)
        masks = [Mask()] * clean + [job.masks[index] for index in indices]
        self._removed = RemovedUnits(masks)
        # The clean run has nothing to put in place of.
        self._fills = MaskFills([fill_of(mask, job.fills) if mask else None for mask in masks], *widths)

    def __len__(self) -> int:
        return len(self.masks)

    def at(self, layer: int, heads: int, device: torch.device) -> _LayerSlots:
        """Return who does what at a layer."""
        keep_heads, keep_ffn = self._removed.keep_tensors(layer, heads)
        variants = self.masks != CLEAN
        branching, continuing = variants & (self._first == layer), variants & (self._first < layer)
        return _LayerSlots(
            branching=(np.flatnonzero(branching & keep_ffn), np.flatnonzero(branching & ~keep_ffn)),
            continuing=(np.flatnonzero(continuing & keep_ffn), np.flatnonzero(continuing & ~keep_ffn)),
            keep_heads=None if keep_heads is None else torch.from_numpy(keep_heads).to(device),
            fills=self._fills.at(layer, device),
        )


class Wave:
    """The variants of a planned wave, from their first layers to their option scores.

    Rows are named by their index in the block.
    """

    def __init__(
        self, setup: PassSetup, jobs: Sequence[Job], scores: Sequence[Scores], block: Block, plan: PlannedWave
    ) -> None:
        """Allocate the residuals. What variants branch from without the clean run must be in the cache."""
        self._model, self._cache, self._account = setup.model, setup.cache, setup.account
        self._most_tokens = setup.limits.micro_batch_tokens
        self._jobs, self._scores, self._plan = jobs, scores, plan
        self._block = tuple(member for member in block if not member.is_donor)
        clean = plan.clean_layers is not None
        self._clean_layers = -1 if plan.clean_layers is None else plan.clean_layers
        self._rows = [member.row for member in self._block]
        self._lengths = [len(row) for row in self._rows]
        self._groups = row_groups(self._rows, self._most_tokens)
        self._donors = {member.row: self._donor_source(member.row) for member in block if member.is_donor}
        self._donated = DonatedValues()
        variants: dict[int, list[Variant]] = {member.job: [] for member in self._block}
        for variant in plan.variants:
            variants[variant.job].append(variant)
        widths = self._model.skeleton.attention_width, self._model.skeleton.width
        self._slots = {
            job: _JobSlots(jobs[job], of_job, widths, clean=clean) for job, of_job in variants.items()
        }
        self._at: Mapping[int, _LayerSlots] = {}
        self._reader = AnswerReader(setup.model)
        self._reads: list[Tensor | None] = [None] * len(self._block)
        self._masks = RowMasks(setup.model)
        self._residuals: list[Tensor] = []
        for member in self._block:
            shape = len(self._slots[member.job]), len(member.row), self._model.skeleton.width
            self._residuals.append(torch.empty(shape, device=self._model.device))
            if clean:
                self._residuals[-1][0] = embedded(self._model, member.row)

    def step(self, number: int, layer: DecoderLayer) -> None:
        """Take everything alive through one layer."""
        skeleton, device = self._model.skeleton, self._model.device
        self._at = {job: slots.at(number, skeleton.heads, device) for job, slots in self._slots.items()}
        if number == skeleton.layers - 1:
            # Only where answers are read does anything follow.
            self._reads = [torch.from_numpy(row.reads).to(device) for row in self._rows]
        donors = list(self._donors)
        for batch in row_batches(donors, self._most_tokens):
            self._donate(number, layer, [donors[index] for index in batch])
        for group in self._groups:
            self._clean_and_branching(number, layer, group)
            for removed in (False, True):
                self._continuing(layer, group, removed)

    def finish(self) -> None:
        """Score what was read and drop the residuals."""
        self._reader.flush()
        self._residuals.clear()
        self._donors.clear()

    def _donor_source(self, row: Row) -> Tensor:
        """Return a donor's residual where the wave begins, [T, D]."""
        first = self._plan.first_layer
        return self._cache.get(row, first, self._model.device) if first else embedded(self._model, row)

    def _donate(self, number: int, layer: DecoderLayer, rows: Sequence[Row]) -> None:
        """Take donors through a layer, and keep what their units give there."""
        for row in rows:
            if number in self._plan.kept_layers:
                self._cache.keep(row, number, self._donors[row])
        flat = torch.cat([self._donors[row] for row in rows])
        run = layer.run_captured(flat, plain_segments(self._model, rows))
        self._donated.keep(rows, run)
        self._account(SweepCost(len(flat), len(flat), len(flat)))
        self._donors.update(zip(rows, run.output.split([len(row) for row in rows]), strict=True))

    def _cut(self, z: Tensor, piece: Piece) -> Tensor:
        """Return z under the masks of a piece's slots, [V, T, Z]: z [V, T, Z], or [T, Z] for all of them."""
        slots, selection = self._layer_slots(piece.index), piece.selection
        if slots.keep_heads is None:
            return z.expand(len(piece.slots), *z.shape[-2:])
        fill = None
        if slots.fills is not None:
            row, reads = self._rows[piece.index], self._reads[piece.index]
            fill = self._donated.heads_in(slots.fills, selection, row, reads)
        return cut_heads(z, slots.keep_heads[selection], fill)

    def _layer_slots(self, index: int) -> _LayerSlots:
        """Return what the layer in work means for the slots of a row."""
        return self._at[self._block[index].job]

    def _clean_and_branching(self, number: int, layer: DecoderLayer, group: RowGroup) -> None:
        """Run the clean rows of a group, and what branches from them here with their z."""
        clean = number <= self._clean_layers
        branching = tuple(i for i in group.members if any(map(len, self._layer_slots(i).branching)))
        members = group.members if clean else branching
        if not members:
            return
        # Rows of a stem are of one job, so what holds for them holds for it.
        stem = None if group.stem is None else self._clean_rows(number, layer, [group.stem], None)
        work = ((index, _CLEAN_SLOT) for index in members)
        for batch in micro_batches(work, self._lengths, self._most_tokens):
            self._clean_rows(number, layer, [piece.index for piece in batch], stem)

    def _clean_rows(
        self, number: int, layer: DecoderLayer, members: Sequence[int], stem: AttentionOutput | None
    ) -> AttentionOutput:
        """Take some clean rows, and what branches from them, through a layer; return their attention."""
        sources = [self._source(index, number) for index in members]
        flat = torch.cat(sources)
        attention = layer.attend(flat, [self._segment(index, 1, stem) for index in members])
        self._account(SweepCost(attention_tokens=len(flat)))
        zs = dict(zip(members, attention.z.split([len(source) for source in sources]), strict=True))
        inputs = dict(zip(members, sources, strict=True))
        for removed in (False, True):
            work = ((index, self._layer_slots(index).branching[removed]) for index in members)
            for batch in micro_batches(work, self._lengths, self._most_tokens):
                residuals, cut = [], []
                for piece in batch:
                    z, source = (self._at_reads(x[piece.index], piece.index) for x in (zs, inputs))
                    residuals.append(source.expand(len(piece.slots), *source.shape))
                    cut.append(self._cut(z, piece))
                self._finish(layer, batch, residuals, cut, removed)
        if number < self._clean_layers:
            # Last: it overwrites the residuals that the others start from.
            pieces = [Piece(index, _CLEAN_SLOT) for index in members]
            self._finish(
                layer,
                pieces,
                [self._at_reads(inputs[index], index)[None] for index in members],
                [self._at_reads(zs[index], index)[None] for index in members],
                without_ffn=False,
            )
        return attention

    def _source(self, index: int, number: int) -> Tensor:
        """Return a row's clean residual at the layer's input, [T, D]."""
        row = self._rows[index]
        if number > self._clean_layers:
            return self._cache.get(row, number, self._model.device)
        source = self._residuals[index][0]
        if number in self._plan.kept_layers:
            self._cache.keep(row, number, source)
        return source

    def _continuing(self, layer: DecoderLayer, group: RowGroup, removed: bool) -> None:
        """Take the variants that branched earlier through both halves of a layer."""
        if group.stem is None:
            work = ((index, self._layer_slots(index).continuing[removed]) for index in group.members)
            for batch in micro_batches(work, self._lengths, self._most_tokens):
                self._attend_and_finish(layer, batch, None, removed)
            return
        slots = self._layer_slots(group.stem).continuing[removed]
        together = max(1, self._most_tokens // self._lengths[group.stem])
        for first in range(0, len(slots), together):
            chunk = slots[first : first + together]
            stem = self._attend_and_finish(layer, [Piece(group.stem, chunk)], None, removed)
            work = ((index, chunk) for index in group.members)
            for batch in micro_batches(work, self._lengths, self._most_tokens):
                self._attend_and_finish(layer, batch, (stem, chunk), removed)

    def _attend_and_finish(
        self,
        layer: DecoderLayer,
        batch: Sequence[Piece],
        stem: tuple[AttentionOutput, Slots] | None,
        removed: bool,
    ) -> AttentionOutput:
        """Take a micro-batch through a layer; `stem`: its rows' stem's attention, and its slots."""
        inputs = [self._residuals[piece.index][piece.selection] for piece in batch]
        flat = flattened(inputs)
        segments = []
        for piece in batch:
            piece_stem = None if stem is None else _stem_of_slots(stem[0], stem[1], piece.slots)
            segments.append(self._segment(piece.index, len(piece.slots), piece_stem))
        attention = layer.attend(flat, segments)
        self._account(SweepCost(attention_tokens=len(flat)))
        residuals, zs = [], []
        parts = attention.z.split([segment.size for segment in segments])
        for piece, source, part in zip(batch, inputs, parts, strict=True):
            z = self._at_reads(part.view(*source.shape[:-1], -1), piece.index)
            residuals.append(self._at_reads(source, piece.index))
            zs.append(self._cut(z, piece))
        self._finish(layer, batch, residuals, zs, removed)
        return attention

    def _finish(
        self,
        layer: DecoderLayer,
        batch: Sequence[Piece],
        residuals: Sequence[Tensor],
        zs: Sequence[Tensor],
        without_ffn: bool,
    ) -> None:
        """Take [V, T, D] each, in the last layer [V, R, D], through the second half to where they belong."""
        shapes = [residual.shape for residual in residuals]
        tokens = sum(shape[0] * shape[1] for shape in shapes)
        if not tokens:
            return
        ffn = self._ffn_fill(batch, shapes) if without_ffn else None
        after = layer.finish(flattened(residuals), flattened(zs), without_ffn=without_ffn, ffn_fill=ffn)
        self._account(SweepCost(projection_tokens=tokens, ffn_tokens=0 if without_ffn else tokens))
        parts = after.split([shape[0] * shape[1] for shape in shapes])
        for piece, part, shape in zip(batch, parts, shapes, strict=True):
            if self._reads[piece.index] is None:
                self._residuals[piece.index][piece.selection] = part.view(shape)
            else:
                self._read(piece, part.view(shape))

    def _ffn_fill(self, batch: Sequence[Piece], shapes: Sequence[torch.Size]) -> Tensor | None:
        """Return what stands in place of the FFN's output at all tokens of a micro-batch, [N, D]; None for
        zeros.
        """
        fills = [self._layer_slots(piece.index).fills for piece in batch]
        if all(fill is None for fill in fills):
            return None
        return flattened(
            [
                torch.zeros(shape, device=self._model.device)
                if fill is None
                else self._donated.ffns_in(
                    fill, piece.selection, self._rows[piece.index], self._reads[piece.index]
                ).expand(shape)
                for piece, shape, fill in zip(batch, shapes, fills, strict=True)
            ]
        )

    def _read(self, piece: Piece, hidden: Tensor) -> None:
        """Hand on the states [V, R, D] of a row after the last layer, from which its answers are read."""
        member = self._block[piece.index]
        masks = self._slots[member.job].masks[piece.slots]
        if masks[0] == CLEAN:
            asked = [i for i, mask in enumerate(self._jobs[member.job].masks) if mask.first_layer is None]
            masks, hidden = np.array(asked, np.int64), hidden.expand(len(asked), *hidden.shape[1:])
        if hidden.numel():
            self._account(SweepCost(answers=hidden.shape[0] * hidden.shape[1]))
            self._reader.add(PendingAnswers(self._scores[member.job], masks, member.row, hidden))

    def _at_reads(self, states: Tensor, index: int) -> Tensor:
        """Return a row's states [..., T, D] that matter: all, in the last layer those read, [..., R, D]."""
        reads = self._reads[index]
        return states if reads is None else states.index_select(-2, reads)

    def _segment(self, index: int, variants: int, stem: AttentionOutput | None) -> Segment:
        """Return a row's part of a micro-batch; `stem`: its stem's attention under the same masks."""
        mask = self._masks.of(self._rows[index])
        if stem is None:
            return Segment(variants, mask)
        keys, values = (
            states.unflatten(1, (variants, -1)).transpose(0, 1) for states in (stem.keys, stem.values)
        )
        return Segment(variants, mask, keys, values)


def _stem_of_slots(stem: AttentionOutput, stem_slots: Slots, wanted: Slots) -> AttentionOutput:
    """Return the part of a stem's attention that belongs to some of its slots, which stand side by side."""
    first = int(np.searchsorted(stem_slots, wanted[0]))
    tokens = stem.keys.shape[1] // len(stem_slots)
    part = slice(first * tokens, (first + len(wanted)) * tokens)
    return AttentionOutput(stem.z, stem.keys[:, part], stem.values[:, part])
