"""Where a row's first value that is not finite stands: looked for only where a pass has met one.

Rows go through the model one by one, layer by layer, and after each half of a layer it is asked what is lost.
Axis letters: N tokens of a row with its stem, D width, H heads, Z their outputs side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lowmem_icl.engine.fills import DonatedValues, Fill, Fills, MaskFills, donors_of, fill_of
from lowmem_icl.engine.removed_units import RemovedUnits
from lowmem_icl.engine.row_masks import embedded, plain_segments
from lowmem_icl.engine.setup import PassSetup
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.model.layer import DecoderLayer, LayerCut
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.model.watch import is_lost
from lowmem_icl.rows import Row

EMBEDDING, UNEMBEDDING = "the embedding", "the unembedding"


@dataclass(frozen=True)
class Place:
    """The first value that is not finite: the part of the model in words, and the document whose token it is
    at.
    """

    where: str
    document: int


@dataclass(frozen=True, eq=False)
class Suspect:
    """A row under a mask, whose name `fills` explains."""

    row: Row
    mask: Mask = Mask()
    fills: Fills = field(default_factory=dict)


def of_unit(unit: Unit) -> str:
    """Return a unit in words."""
    part = "FFN" if unit.head is None else f"head {unit.head}"
    return f"layer {unit.layer}, {part} ({unit})"


def places_of(setup: PassSetup, suspects: Sequence[Suspect]) -> list[Place | None]:
    """Return where the first lost value of every suspect is, None where there is none.

    As many as fit the memory go through one read of the weights, or less where all are found before.
    """
    model, places = setup.model, list[Place | None]()
    most = setup.limits.block_tokens(model.skeleton.width, model.skeleton.layers, None)
    group: list[Suspect] = []
    held = 0
    for suspect in suspects:
        row = suspect.row
        tokens = sum(map(len, (row, *([row.stem] if row.stem else []), *donors_of(suspect.fills, row))))
        if group and held + tokens > most:
            places += _places_of(model, group)
            group, held = [], 0
        group.append(suspect)
        held += tokens
    return places + _places_of(model, group)


def _places_of(model: StreamedModel, suspects: Sequence[Suspect]) -> list[Place | None]:
    model.watch.overflowed()
    probes = [_Probe(model, suspect) for suspect in suspects]
    with torch.no_grad():
        for number, layer in model.layers(range(model.skeleton.layers)):
            for probe in probes:
                if probe.place is None:
                    probe.step(number, layer)
            if all(probe.place is not None for probe in probes):
                break
        for probe in probes:
            if probe.place is None:
                probe.read()
    model.watch.overflowed()
    return [probe.place for probe in probes]


def _joined(row: Row) -> Row:
    """Return a row with its stem in front, as one that has none."""
    if (stem := row.stem) is None:
        return row
    before = len(stem)
    return Row(
        tokens=np.concatenate([stem.tokens, row.tokens]),
        positions=np.concatenate([stem.positions, row.positions]),
        # A stem is seen by all that grows from it.
        ends=np.concatenate([np.full(before, before + len(row)), row.ends + before]),
        owners=np.concatenate([np.full(before, row.owners[0] if len(row) else 0), row.owners]),
        read_at=row.read_at + before,
        targets=row.targets,
        options=row.options,
    )


class _Probe:
    """A suspect on its way through the layers; `place` is set once something is lost."""

    def __init__(self, model: StreamedModel, suspect: Suspect) -> None:
        row = suspect.row
        self.place: Place | None = None
        self._model, self._parts = model, [row] if row.stem is None else [row.stem, row]
        self._row = _joined(row)
        self._residual = embedded(model, self._row)
        self._segments = plain_segments(model, [self._row])
        self._removed = RemovedUnits([suspect.mask])
        fill: Fill | None = fill_of(suspect.mask, suspect.fills)
        widths = model.skeleton.attention_width, model.skeleton.width
        self._fills = MaskFills([fill], *widths)
        used: Mapping[str, Fill] = {} if fill is None else {"": fill}
        self._donors = {donor: embedded(model, donor) for donor in donors_of(used, row)}
        self._donated = DonatedValues()
        self._ask(EMBEDDING, self._residual)

    def step(self, number: int, layer: DecoderLayer) -> None:
        """Go through a layer, as far as nothing is lost."""
        self._donate(layer)
        z = layer.attend(self._residual, self._segments).z
        heads = z.unflatten(1, (self._model.skeleton.heads, -1)).isfinite().all(-1)
        if not heads.all():
            token, head = (~heads).nonzero()[0].tolist()
            self._found(of_unit(Unit("head", number, head)), token)
            return
        attention, cut = f"layer {number}, attention", self._cut(number)
        self._ask(attention, z)
        if self.place is None:
            self._ask(attention, layer.finish(self._residual, cut.apply(z), without_ffn=True))
        if self.place is None:
            run = layer.finish_captured(self._residual, z, cut)
            ffn = of_unit(Unit("ffn", number))
            self._ask(ffn, run.output if run.ffn is None else run.ffn)
            if self.place is None:
                self._ask(ffn, run.output)
            self._residual = run.output

    def read(self) -> None:
        """Read the answers after the last layer."""
        if not len(self._row.read_at):
            return
        device = self._model.device
        asked = [torch.from_numpy(array).to(device) for array in (self._row.read_at, self._row.targets)]
        logprobs, _ = self._model.vocabulary.log_probabilities(self._residual, *asked)
        if not (finite := logprobs.isfinite()).all():
            self._found(UNEMBEDDING, int(self._row.read_at[int((~finite).nonzero()[0])]))

    def _ask(self, where: str, states: Tensor) -> None:
        """Look at states [N, D], and at what norms met on the way to them."""
        lost = is_lost(states)
        if lost.any():
            self._found(where, int(lost.nonzero()[0]))
        elif self._model.watch.overflowed():
            self._found(where, 0)

    def _found(self, where: str, token: int) -> None:
        self._model.watch.overflowed()
        row = self._row
        # Of what many documents share, the first that is read from there.
        reads = row.read_at[(row.read_at >= token) & (row.read_at < row.ends[token])]
        self.place = Place(where, int(row.owners[reads[0] if len(reads) else token]))

    def _donate(self, layer: DecoderLayer) -> None:
        self._donated.clear()
        for donor, entering in self._donors.items():
            run = layer.run_captured(entering, plain_segments(self._model, [donor]))
            self._donated.keep([donor], run)
            self._donors[donor] = run.output
        if self._donors and self._model.watch.overflowed():
            self._found("what stands in removed units' place", 0)

    def _cut(self, number: int) -> LayerCut:
        """Return what the suspect lacks of a layer."""
        heads, device = self._model.skeleton.heads, self._model.device
        keep_heads, keep_ffn = self._removed.keep_tensors(number, heads)
        keep = None
        if keep_heads is not None:
            keep = torch.from_numpy(keep_heads).to(device).expand(len(self._row), -1)
        return LayerCut(keep, not keep_ffn[0], *self._given(number))

    def _given(self, number: int) -> Iterator[Tensor | None]:
        """Yield what stands in the place of heads, [N, Z], and of the FFN, [N, D]; None for zeros."""
        fills = self._fills.at(number, self._model.device)
        for values in (self._donated.heads_in, self._donated.ffns_in):
            yield (
                None
                if fills is None
                else torch.cat(
                    [values(fills, slice(0, 1), part, None)[0].expand(len(part), -1) for part in self._parts]
                )
            )
