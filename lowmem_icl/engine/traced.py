"""A wave that met what is not finite, run again row by row and variant by variant to see which they are."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.fills import donors_of
from lowmem_icl.engine.micro_batches import Piece
from lowmem_icl.engine.places import Suspect, places_of
from lowmem_icl.engine.schedule import Block, Job, PlannedWave, Variants
from lowmem_icl.engine.setup import PassSetup, ignore_cost
from lowmem_icl.engine.wave import CLEAN, Wave
from lowmem_icl.model.layer import AttentionOutput, DecoderLayer
from lowmem_icl.model.watch import is_lost
from lowmem_icl.rows import Integers, Row


def trace_wave(
    setup: PassSetup, jobs: Sequence[Job], results: Sequence[Scores], block: Block, plan: PlannedWave
) -> list[Row]:
    """Make the scores NaN of all rows and masks of a wave that lose a value on the way; return the rows whose
    clean run does.

    The wave has been run, so that what it scored and kept is there. What the clean run meets counts for all
    that branches from it; the other rows are run again together, and if need be each by itself.
    """
    asked = [member for member in block if not member.is_donor]
    places = places_of(setup, [Suspect(member.row) for member in asked])
    lost = [member for member, place in zip(asked, places, strict=True) if place is not None]
    for member in lost:
        masks = plan.variants.mask[plan.variants.job == member.job]
        if plan.clean_layers is not None:
            clean = [i for i, mask in enumerate(jobs[member.job].masks) if mask.first_layer is None]
            masks = np.array([*clean, *masks], dtype=np.int64)
        results[member.job].logprobs[np.ix_(masks, member.row.answered)] = np.nan
    rows = [member.row for member in lost]
    left = _without(block, {*rows}, jobs)
    if left:
        here = np.isin(plan.variants.job, [member.job for member in left])
        columns = (plan.variants.job, plan.variants.mask, plan.variants.first_layer)
        plan = replace(plan, variants=Variants(*(column[here] for column in columns)))
        _run_again(setup, jobs, results, left, plan)
    return rows


def _without(block: Block, lost: set[Row], jobs: Sequence[Job]) -> Block:
    """Return a block without some rows, and without what only these need."""
    rows = [member for member in block if not member.is_donor and member.row not in lost]
    answered = [member for member in rows if len(member.row.answered)]
    needed = {member.row.stem for member in answered}
    for member in answered:
        needed.update(donors_of(jobs[member.job].fills, member.row))
    return tuple(member for member in block if member in answered or member.row in needed)


def _run_again(
    setup: PassSetup, jobs: Sequence[Job], results: Sequence[Scores], block: Block, plan: PlannedWave
) -> None:
    """Run a wave again, row by row and variant by variant if it still loses a value, and mark what does."""
    together = replace(setup, account=ignore_cost)
    _run(setup, Wave(together, jobs, results, block, plan), plan)
    if not setup.model.watch.overflowed():
        return
    alone = replace(together, limits=replace(setup.limits, micro_batch_tokens=1))
    traced = _TracedWave(alone, jobs, results, block, plan)
    _run(setup, traced, plan)
    setup.model.watch.overflowed()
    traced.mark()


def _run(setup: PassSetup, wave: Wave, plan: PlannedWave) -> None:
    for number, layer in setup.model.layers(range(plan.first_layer, setup.model.skeleton.layers)):
        wave.step(number, layer)
    wave.finish()


class _TracedWave(Wave):
    """Looks after every step which piece it was of; `lost`: rows of the block, by index, and their slots."""

    def __init__(
        self, setup: PassSetup, jobs: Sequence[Job], scores: Sequence[Scores], block: Block, plan: PlannedWave
    ) -> None:
        super().__init__(setup, jobs, scores, block, plan)
        self._watch, self.lost = setup.model.watch, set[tuple[int, int]]()

    def mark(self) -> None:
        """Make the scores NaN of what was lost, and of what grows from it."""
        for index, slot in sorted(self.lost):
            lost = self._rows[index]
            for member in self._block:
                if lost in (member.row, member.row.stem):
                    where = np.ix_(self._masks_of(member.job, slot), member.row.answered)
                    self._scores[member.job].logprobs[where] = np.nan

    def _masks_of(self, job: int, slot: int) -> Integers:
        """Return which masks of a job a slot stands for: the clean run for all that branch from it, too."""
        masks = self._slots[job].masks
        if masks[slot] != CLEAN:
            return masks[slot : slot + 1]
        asked = [index for index, mask in enumerate(self._jobs[job].masks) if mask.first_layer is None]
        return np.array([*asked, *masks[masks != CLEAN]], dtype=np.int64)

    def _look(self, pieces: Sequence[Piece]) -> None:
        if self._watch.overflowed():
            self.lost.update((piece.index, slot) for piece in pieces for slot in piece.slots.tolist())

    def _donate(self, number: int, layer: DecoderLayer, rows: Sequence[Row]) -> None:
        super()._donate(number, layer, rows)
        given = {*rows}
        self._look(
            [
                Piece(index, np.arange(len(self._slots[member.job])))
                for index, member in enumerate(self._block)
                if not given.isdisjoint(donors_of(self._jobs[member.job].fills, member.row))
            ]
        )

    def _clean_rows(
        self, number: int, layer: DecoderLayer, members: Sequence[int], stem: AttentionOutput | None
    ) -> AttentionOutput:
        attention = super()._clean_rows(number, layer, members, stem)
        pieces = [Piece(i, slots) for i in members for slots in self._layer_slots(i).branching]
        if number <= self._clean_layers:
            pieces += [Piece(index, np.zeros(1, dtype=np.int64)) for index in members]
        self._look(pieces)
        return attention

    def _finish(
        self,
        layer: DecoderLayer,
        batch: Sequence[Piece],
        residuals: Sequence[Tensor],
        zs: Sequence[Tensor],
        without_ffn: bool,
    ) -> None:
        super()._finish(layer, batch, residuals, zs, without_ffn)
        self._look(batch)

    def _read(self, piece: Piece, hidden: Tensor) -> None:
        if is_lost(hidden.flatten(0, 1)).any():
            self.lost.update((piece.index, slot) for slot in piece.slots.tolist())
        super()._read(piece, hidden)
        # What others had pending may have been read, which was looked at before.
        self._watch.overflowed()
