"""Patching: many changes to prompts' clean runs at chosen tokens, from one read of the weights per block.

A change takes from the clean run what lies before its first layer and before its row: of a prompt of which
only the end is changed, the rest is a stem that is run once, and a change is as long as that end.

Axis letters: S changes of a job that go together, V those of a micro-batch, T tokens of a row, P those that
are patched, R those that are read, N tokens of a micro-batch, D width, H heads, Z their outputs' width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.answers import AnswerReader, PendingAnswers, Scores
from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.lost import report_patches
from lowmem_icl.engine.micro_batches import Piece, Slots, flattened, micro_batches, row_batches
from lowmem_icl.engine.patch_jobs import (
    Addition,
    PatchBlock,
    PatchJob,
    PatchMember,
    TokenBytes,
    patch_blocks,
)
from lowmem_icl.engine.places import Suspect, places_of
from lowmem_icl.engine.removed_units import RemovedUnits
from lowmem_icl.engine.row_masks import RowMasks, embedded
from lowmem_icl.engine.setup import PassSetup
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.attention import Segment
from lowmem_icl.model.layer import DecoderLayer, cut_heads
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.model.watch import is_lost
from lowmem_icl.rows import Row


def patch(setup: PassSetup, jobs: Sequence[PatchJob], results: Sequence[Scores]) -> None:
    """Fill in the option scores under every change of all jobs.

    They depend neither on the limits nor on which jobs and changes go together. What is scored is not scored
    again. Changes under which a value on the way is not finite score NaN, and `setup.lost` names one for
    every job. Raises DoesNotFit where one change of a row exceeds the memory.
    """
    wanted = [np.flatnonzero(result.missing(job.into.row)) for job, result in zip(jobs, results, strict=True)]
    model = setup.model
    for block in patch_blocks(jobs, wanted, TokenBytes.of(model.skeleton), setup.limits.alive_bytes):
        model.watch.overflowed()
        _run(model, _PatchedBlock(setup, jobs, results, block))
        if model.watch.overflowed():
            _mark(setup, jobs, results, block)
        setup.after_step()
    report_patches(setup, jobs, results)


def _run(model: StreamedModel, runs: "_PatchedBlock") -> None:
    for number, layer in model.layers(range(model.skeleton.layers)):
        with torch.no_grad():
            runs.step(number, layer)
    runs.finish()


def _mark(setup: PassSetup, jobs: Sequence[PatchJob], results: Sequence[Scores], block: PatchBlock) -> None:
    """Make the scores NaN of rows that lose a value without any change, and run the others again, change by
    change, to mark those that do.
    """
    found = zip(block.rows, places_of(setup, [Suspect(row) for row in block.rows]), strict=True)
    lost_rows = {row for row, place in found if place is not None}
    left: list[PatchMember] = []
    for member in block.members:
        if lost_rows.isdisjoint(jobs[member.job].rows):
            left.append(member)
        else:
            results[member.job].logprobs[member.changes] = np.nan
    if not left:
        return
    rows = list(dict.fromkeys(row for member in left for row in jobs[member.job].rows))
    alone = replace(setup, limits=replace(setup.limits, micro_batch_tokens=1), account=lambda cost: None)
    traced = _TracedBlock(alone, jobs, results, PatchBlock(rows, left))
    _run(setup.model, traced)
    setup.model.watch.overflowed()
    for index, slot in traced.lost:
        member = left[index]
        results[member.job].logprobs[member.changes[slot]] = np.nan


@dataclass(frozen=True, eq=False)
class _CleanLayer:
    """A row's clean run through the layer in work: the residual at its input and output, [T, D], what heads,
    [T, Z], and the FFN, [T, D], give, and keys and values [G, T, d].
    """

    entering: Tensor
    leaving: Tensor
    z: Tensor
    ffn: Tensor
    keys: Tensor
    values: Tensor


class _CleanRows:
    """Rows without changes, layer by layer; rows that grow from a stem see it."""

    def __init__(self, setup: PassSetup, rows: Sequence[Row], masks: RowMasks) -> None:
        self._setup, self._masks = setup, masks
        grown = [row for row in rows if row.stem is not None]
        most = setup.limits.micro_batch_tokens
        self._batches = [
            [part[index] for index in batch]
            # Stems first: what grows from them needs their keys.
            for part in ([row for row in rows if row.stem is None], grown)
            for batch in row_batches(part, most)
        ]
        self._residuals = {row: embedded(setup.model, row) for row in rows}
        self.at: dict[Row, _CleanLayer] = {}

    def step(self, layer: DecoderLayer) -> None:
        """Take all rows through a layer."""
        self.at.clear()
        for batch in self._batches:
            lengths = [len(row) for row in batch]
            flat = torch.cat([self._residuals[row] for row in batch])
            attention = layer.attend(flat, [self.segment(row, 1) for row in batch])
            run = layer.finish_captured(flat, attention.z)
            assert run.ffn is not None, "of the whole model"
            self._setup.account(SweepCost(len(flat), len(flat), len(flat)))
            parts = (flat, run.output, attention.z, run.ffn)
            entering, leaving, z, ffn = (part.split(lengths) for part in parts)
            keys, values = (states.split(lengths, 1) for states in (attention.keys, attention.values))
            for row, *of_row in zip(batch, entering, leaving, z, ffn, keys, values, strict=True):
                self.at[row] = _CleanLayer(*of_row)
                self._residuals[row] = self.at[row].leaving

    def segment(self, row: Row, variants: int) -> Segment:
        """Return a row's part of a micro-batch of the layer in work; its stem has been there already."""
        mask = self._masks.of(row)
        if row.stem is None:
            return Segment(variants, mask)
        stem = self.at[row.stem]
        return Segment(variants, mask, stem.keys[None], stem.values[None], shares_stem=True)


class _ChangedRow:
    """Changes of one job that go together, in the order of their first layers, and what the layer in work is
    to them.

    residual: [S, T, D]; `reads` [R], in the last layer alone: the tokens that go on; `keep_ffn` [S]: which
    have the layer's FFN.
    """

    def __init__(self, model: StreamedModel, job: PatchJob, member: PatchMember) -> None:
        self.job, self.member, self._model = job, member, model
        self.row, self.firsts = job.into.row, job.firsts[member.changes]
        changes = [job.changes[index] for index in member.changes]
        self._removed = RemovedUnits([each if isinstance(each, Mask) else Mask() for each in changes])
        self._vectors = [each.vector if isinstance(each, Addition) else None for each in changes]
        self.into = torch.from_numpy(job.into.tokens).to(model.device)
        shape = len(changes), len(self.row), model.skeleton.width
        self.residual = torch.empty(shape, device=model.device)
        self.reads: Tensor | None = None
        self.keep_ffn = np.ones(len(changes), dtype=np.bool_)
        self._keep_heads: NDArray[np.float32] | None = None
        self._heads: Tensor | None = None
        self._ffn: Tensor | None = None

    def enter(self, number: int, clean: Mapping[Row, _CleanLayer]) -> None:
        """Come to a layer, through which the clean rows have gone."""
        skeleton = self._model.skeleton
        self._keep_heads, self.keep_ffn = self._removed.keep_tensors(number, skeleton.heads)
        self._heads, self._ffn = self._given(number, clean)
        if number == skeleton.layers - 1:
            self.reads = torch.from_numpy(self.row.reads).to(self._model.device)

    def _given(self, number: int, clean: Mapping[Row, _CleanLayer]) -> tuple[Tensor | None, Tensor | None]:
        """Return what stands in the place of heads, [P or 1, Z], and of the FFN, [P or 1, D]; None for
        zeros.
        """
        source, device = self.job.source, self._model.device
        if source is None:
            return None, None
        if isinstance(source, UnitMeans):
            heads, ffn = (torch.from_numpy(table[number]).to(device) for table in (source.heads, source.ffns))
            return heads[None], ffn[None]
        run, tokens = clean[source.row], torch.from_numpy(source.tokens).to(device)
        return run.z[tokens], run.ffn[tokens]

    def continuing(self, number: int) -> Slots:
        """Return the slots whose changes began before a layer."""
        return np.flatnonzero((self.firsts >= 0) & (self.firsts < number))

    def at_first_layer(self, number: int, *, additions: bool) -> Slots:
        """Return the slots whose changes begin in a layer: additions at its output, or units."""
        mine = [(vector is not None) == additions for vector in self._vectors]
        return np.flatnonzero((self.firsts == number) & mine)

    def added(self, slots: Slots) -> Tensor:
        """Return the vectors of some additions, [V, 1, D]."""
        names = [self._vectors[slot] for slot in slots]
        vectors = np.stack([self.job.vectors[name] for name in names if name is not None])
        return torch.from_numpy(vectors).to(self._model.device)[:, None]

    def cut(self, z: Tensor, piece: Piece) -> Tensor:
        """Return z [V, T, Z] of some changes with what stands in heads' place put in."""
        keep = None if self._keep_heads is None else self._keep_heads[piece.selection]
        if keep is None or keep.all():
            return z
        given = None if self._heads is None else self._heads[None]
        cut = cut_heads(z[:, self.into], torch.from_numpy(keep).to(z.device), given)
        return z.index_copy(1, self.into, cut)

    def without_ffn(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Return at which tokens that go on some changes lack the FFN, [V, T or R], and what stands in its
        place there, one after the other, [N, D].
        """
        shape, device = (len(self.row), self._model.skeleton.width), self._model.device
        lack = torch.from_numpy(~self.keep_ffn[piece.selection]).to(device)
        where = torch.zeros(len(lack), len(self.row), dtype=torch.bool, device=device)
        where[:, self.into] = lack[:, None]
        given = torch.zeros(shape, device=device)
        if self._ffn is not None:
            given[self.into] = self._ffn
        if self.reads is not None:
            where, given = where[:, self.reads], given[self.reads]
        return where, given.expand(*where.shape, -1)[where]


class _PatchedBlock:
    """A block on its way through the layers."""

    def __init__(
        self, setup: PassSetup, jobs: Sequence[PatchJob], results: Sequence[Scores], block: PatchBlock
    ) -> None:
        self._model, self._account = setup.model, setup.account
        self._most_tokens = setup.limits.micro_batch_tokens
        self._clean = _CleanRows(setup, block.rows, RowMasks(setup.model))
        self._changed = [_ChangedRow(setup.model, jobs[member.job], member) for member in block.members]
        self._results = [results[member.job] for member in block.members]
        self._lengths = [len(changed.row) for changed in self._changed]
        self._reader = AnswerReader(setup.model)

    def step(self, number: int, layer: DecoderLayer) -> None:
        """Take everything through one layer."""
        self._clean.step(layer)
        self._changes(number, layer)

    def finish(self) -> None:
        """Score what is still to be read."""
        self._reader.flush()

    def _changes(self, number: int, layer: DecoderLayer) -> None:
        """Take all changes through a layer, which the clean rows have been through."""
        for changed in self._changed:
            changed.enter(number, self._clean.at)
        continuing = [changed.continuing(number) for changed in self._changed]
        for batch in micro_batches(enumerate(continuing), self._lengths, self._most_tokens):
            self._finish(layer, batch, *self._continued(layer, batch))
        branching = [changed.at_first_layer(number, additions=False) for changed in self._changed]
        for batch in micro_batches(enumerate(branching), self._lengths, self._most_tokens):
            self._finish(layer, batch, *self._branched(batch))
        for index, changed in enumerate(self._changed):
            leaving = self._clean.at[changed.row].leaving
            reads = slice(None) if changed.reads is None else changed.reads
            if len(slots := changed.at_first_layer(number, additions=True)):
                states = leaving.repeat(len(slots), 1, 1)
                states[:, changed.into] += changed.added(slots)
                self._leave(Piece(index, slots), states[:, reads])
            if changed.reads is not None and len(slots := np.flatnonzero(changed.firsts < 0)):
                self._leave(Piece(index, slots), leaving.expand(len(slots), -1, -1)[:, reads])

    def _continued(self, layer: DecoderLayer, batch: Sequence[Piece]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the residuals [V, T, D] of changes that began in earlier layers, and their z [V, T, Z]."""
        inputs = [self._changed[piece.index].residual[piece.selection] for piece in batch]
        flat = flattened(inputs)
        segments = [self._clean.segment(self._changed[p.index].row, len(p.slots)) for p in batch]
        attention = layer.attend(flat, segments)
        self._account(SweepCost(attention_tokens=len(flat)))
        parts = attention.z.split([segment.size for segment in segments])
        return inputs, [z.view(*states.shape[:-1], -1) for z, states in zip(parts, inputs, strict=True)]

    def _branched(self, batch: Sequence[Piece]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the same of changes that begin in this layer: the clean run's."""
        at = [self._clean.at[self._changed[piece.index].row] for piece in batch]
        counts = [len(piece.slots) for piece in batch]
        return (
            [clean.entering.expand(count, -1, -1) for clean, count in zip(at, counts, strict=True)],
            [clean.z.expand(count, -1, -1) for clean, count in zip(at, counts, strict=True)],
        )

    def _finish(
        self, layer: DecoderLayer, batch: Sequence[Piece], inputs: list[Tensor], zs: list[Tensor]
    ) -> None:
        """Put what stands in units' place, and take a micro-batch through the layer's second half."""
        residuals, cut = [], []
        for piece, states, z in zip(batch, inputs, zs, strict=True):
            changed = self._changed[piece.index]
            reads = slice(None) if changed.reads is None else changed.reads
            residuals.append(states[:, reads])
            cut.append(changed.cut(z, piece)[:, reads])
        shapes = [states.shape for states in residuals]
        if not (tokens := sum(shape[0] * shape[1] for shape in shapes)):
            return
        flat, z, spared = flattened(residuals), flattened(cut), 0
        if all(self._changed[piece.index].keep_ffn[piece.selection].all() for piece in batch):
            after = layer.finish(flat, z)
        else:
            found = [self._changed[piece.index].without_ffn(piece) for piece in batch]
            without = torch.cat([where.flatten() for where, _ in found])
            given = torch.cat([values for _, values in found])
            after = torch.empty_like(flat)
            after[~without] = layer.finish(flat[~without], z[~without])
            after[without] = layer.finish(flat[without], z[without], without_ffn=True, ffn_fill=given)
            spared = len(given)
        self._account(SweepCost(projection_tokens=tokens, ffn_tokens=tokens - spared))
        parts = after.split([shape[0] * shape[1] for shape in shapes])
        for piece, part, shape in zip(batch, parts, shapes, strict=True):
            self._leave(piece, part.view(shape))

    def _leave(self, piece: Piece, states: Tensor) -> None:
        """Take the residuals [V, T, D] of some changes at the layer's output, after the last [V, R, D]."""
        changed = self._changed[piece.index]
        if changed.reads is None:
            changed.residual[piece.selection] = states
        elif states.numel():
            self._account(SweepCost(answers=states.shape[0] * states.shape[1]))
            masks = changed.member.changes[piece.slots]
            self._reader.add(PendingAnswers(self._results[piece.index], masks, changed.row, states))


class _TracedBlock(_PatchedBlock):
    """Looks after every step which change it was of; `lost`: members, by index in the block, and slots."""

    def __init__(
        self, setup: PassSetup, jobs: Sequence[PatchJob], results: Sequence[Scores], block: PatchBlock
    ) -> None:
        super().__init__(setup, jobs, results, block)
        self.lost = set[tuple[int, int]]()

    def _changes(self, number: int, layer: DecoderLayer) -> None:
        # What the rows themselves met is no change's.
        self._model.watch.overflowed()
        super()._changes(number, layer)

    def _finish(
        self, layer: DecoderLayer, batch: Sequence[Piece], inputs: list[Tensor], zs: list[Tensor]
    ) -> None:
        super()._finish(layer, batch, inputs, zs)
        if self._model.watch.overflowed():
            self.lost.update((piece.index, slot) for piece in batch for slot in piece.slots.tolist())

    def _leave(self, piece: Piece, states: Tensor) -> None:
        lost = is_lost(states.flatten(0, 1)).view(len(piece.slots), -1).any(1).tolist()
        slots = zip(piece.slots.tolist(), lost, strict=True)
        self.lost.update((piece.index, slot) for slot, is_lost_here in slots if is_lost_here)
        before = self._model.watch.overflowed()
        super()._leave(piece, states)
        # Answers that are read here may be others', which were looked at before.
        self._model.watch.overflowed()
        if before:
            self.lost.update((piece.index, slot) for slot in piece.slots.tolist())
