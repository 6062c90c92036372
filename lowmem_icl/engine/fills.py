"""What stands in removed units' place: the same at all tokens, or other rows' values at aligned ones.

Axis letters: S masks, V masks of a micro-batch, F fills, T tokens of a row, Z the heads' outputs side by
side, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.layer import CapturedRun
from lowmem_icl.rows import Integers, Row


@dataclass(frozen=True, eq=False)
class Donor:
    """A row whose clean values stand in another's: `source` [T] is, of every token of the other, the donor's.

    The donor goes through the whole model by itself, without a stem; its answers are not read.
    """

    row: Row
    source: Integers


@dataclass(frozen=True, eq=False)
class RowValues:
    """Other rows' clean values at aligned tokens: by row, and by stem that rows grow from, its donor."""

    donors: Mapping[Row, Donor]


Fill = UnitMeans | RowValues
Fills = Mapping[str, Fill]
"""What the names in masks stand for."""


def donors_of(fills: Fills, row: Row) -> tuple[Row, ...]:
    """Return the rows whose values stand in a row and in its stem, each once."""
    rows = (row,) if row.stem is None else (row, row.stem)
    values = [fill for fill in fills.values() if isinstance(fill, RowValues)]
    return tuple(dict.fromkeys(fill.donors[each].row for fill in values for each in rows))


@dataclass(frozen=True, eq=False)
class LayerFills:
    """What stands in removed units' place in one layer.

    heads [F, Z] and ffns [F, D]: what is the same at all tokens, the first all zeros; `means` [S]: which of
    them is each mask's. `values`: other rows' values; `values_of` [S]: which are each mask's, -1 for none.
    """

    heads: Tensor
    ffns: Tensor
    means: Integers
    values: tuple[RowValues, ...]
    values_of: Integers

    def heads_at(self, masks: slice | Integers) -> Tensor:
        """Return what some masks put in place of their heads' outputs at all tokens, [V, 1, Z]."""
        return self.heads[torch.from_numpy(self.means[masks]).to(self.heads.device)][:, None]

    def ffns_at(self, masks: slice | Integers) -> Tensor:
        """Return what some masks put in place of what their FFN writes at all tokens, [V, 1, D]."""
        return self.ffns[torch.from_numpy(self.means[masks]).to(self.ffns.device)][:, None]


class MaskFills:
    """What S masks put in their units' place; None for zeros."""

    def __init__(self, of_masks: Sequence[Fill | None], attention_width: int, width: int) -> None:
        used = list({id(fill): fill for fill in of_masks if fill is not None}.values())
        self._tables = [fill for fill in used if isinstance(fill, UnitMeans)]
        self._values = tuple(fill for fill in used if isinstance(fill, RowValues))
        tables = {id(fill): number for number, fill in enumerate(self._tables, start=1)}
        values = {id(fill): number for number, fill in enumerate(self._values)}
        self._means = np.array([tables.get(id(fill), 0) for fill in of_masks], dtype=np.int64)
        self._values_of = np.array([values.get(id(fill), -1) for fill in of_masks], dtype=np.int64)
        self._widths = attention_width, width

    def at(self, layer: int, device: torch.device) -> LayerFills | None:
        """Return what stands in units' place in a layer; None where it is zeros under all masks."""
        if not self._tables and not self._values:
            return None
        no_heads, no_ffn = (np.zeros(width, dtype=np.float32) for width in self._widths)
        heads = np.stack([no_heads, *(table.heads[layer] for table in self._tables)])
        ffns = np.stack([no_ffn, *(table.ffns[layer] for table in self._tables)])
        return LayerFills(
            torch.from_numpy(heads).to(device),
            torch.from_numpy(ffns).to(device),
            self._means,
            self._values,
            self._values_of,
        )


def fill_of(mask: Mask, fills: Fills) -> Fill | None:
    """Return what a mask's name stands for; None for zeros."""
    return None if mask.fill is None else fills[mask.fill]


class DonatedValues:
    """What donors' units give at the layer in work, by donor; forgotten group by group."""

    def __init__(self) -> None:
        self._runs: dict[Row, tuple[Tensor, Tensor]] = {}

    def keep(self, rows: Sequence[Row], run: CapturedRun) -> None:
        """Take what some rows, one after the other, give."""
        assert run.ffn is not None, "of the whole model"
        lengths = [len(row) for row in rows]
        parts = zip(rows, run.z.split(lengths), run.ffn.split(lengths), strict=True)
        self._runs.update({row: (z, ffn) for row, z, ffn in parts})

    def clear(self) -> None:
        """Forget everything."""
        self._runs.clear()

    def heads_in(self, fills: LayerFills, masks: slice | Integers, row: Row, reads: Tensor | None) -> Tensor:
        """Return what some masks put in place of heads' outputs in a row, [V, T or 1, Z]; reads: at which of
        its tokens, None at all.
        """
        return self._filled(fills.heads_at(masks), fills, masks, (row, reads, 0))

    def ffns_in(self, fills: LayerFills, masks: slice | Integers, row: Row, reads: Tensor | None) -> Tensor:
        """Return likewise what stands in place of what FFNs write, [V, T or 1, D]."""
        return self._filled(fills.ffns_at(masks), fills, masks, (row, reads, 1))

    def _filled(
        self,
        same: Tensor,
        fills: LayerFills,
        masks: slice | Integers,
        at: tuple[Row, Tensor | None, int],
    ) -> Tensor:
        (row, reads, kind), values_of = at, fills.values_of[masks]
        for number, values in enumerate(fills.values):
            if not (is_this := values_of == number).any():
                continue
            donor = values.donors[row]
            source = torch.from_numpy(donor.source).to(same.device)
            given = self._runs[donor.row][kind][source if reads is None else source[reads]]
            same = torch.where(torch.from_numpy(is_this).to(same.device)[:, None, None], given, same)
        return same
