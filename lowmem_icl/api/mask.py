"""Masks as Python users hold them: removed units, and the file, if any, that they come from."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_icl.api.words import python_errors
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import NAME_PATTERN, MaskFile, MaskModel, read_mask, write_mask
from lowmem_icl.masks.mask import Mask as RemovedUnits
from lowmem_icl.masks.mask import Unit, all_ffns, all_heads
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.options import did_you_mean
from lowmem_icl.protocols import ABLATIONS, Ablation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem_icl.export.applied import AppliedMask

LONGEST_TEXT = 60
"""Characters of a mask's units up to which these are its name."""
DIGEST_DIGITS = 8
"""Of other masks' names, which tell those of one size apart."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Removed units of a model: heads as (layer, head), FFNs as layers. `Mask()` is the clean model.

    ablation: what stands in removed units' place: `zero`, `mean` (means over the task's training documents,
    or those that the mask's file brings) or `resample` (another document's values). origin: the file that
    the mask comes from, with its name, model and scores; None for units that somebody named, which fit any
    model that has them. Two masks are equal where they remove the same units in the same way.

    >>> import lowmem_icl as icl
    >>> mask = icl.Mask.parse("L12H3 L4F")
    >>> mask.removed
    ['L12H3', 'L4F']
    >>> mask | icl.Mask(heads=[(0, 1)])
    Mask('L0H1 L12H3 L4F')
    """

    heads: frozenset[tuple[int, int]] = frozenset()
    ffns: frozenset[int] = frozenset()
    ablation: Ablation = "zero"
    origin: MaskFile | None = field(default=None, compare=False, repr=False)

    def __init__(
        self,
        heads: Iterable[tuple[int, int]] = (),
        ffns: Iterable[int] = (),
        ablation: Ablation = "zero",
        origin: MaskFile | None = None,
    ) -> None:
        if ablation not in ABLATIONS:
            hint = did_you_mean(str(ablation), ABLATIONS)
            raise InputError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {ablation!r}{hint}")
        pairs = frozenset((int(layer), int(head)) for layer, head in heads)
        layers = frozenset(int(layer) for layer in ffns)
        for unit in RemovedUnits(pairs, layers).units():
            Unit.parse(str(unit))
        for name, value in (("heads", pairs), ("ffns", layers), ("ablation", ablation), ("origin", origin)):
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, text: str, ablation: Ablation = "zero") -> "Mask":
        """Return the mask of units in a text, separated by spaces or commas: `L12H3` a head, `L4F` an FFN.

        Raises InputError for anything else.
        """
        units = [Unit.parse(word) for word in re.split(r"[\s,]+", text) if word]
        heads = [(unit.layer, unit.head) for unit in units if unit.head is not None]
        return cls(heads, [unit.layer for unit in units if unit.head is None], ablation)

    @classmethod
    @python_errors
    def read(cls, path: str | Path) -> "Mask":
        """Return the mask of a file; raise InputError naming the file and the field that is wrong."""
        return cls.of_file(read_mask(Path(path)))

    @classmethod
    def of_file(cls, mask_file: MaskFile) -> "Mask":
        """Return the mask of a file that is read already."""
        mask = mask_file.mask
        return cls(mask.heads, mask.ffns, mask.ablation, mask_file)

    @property
    def name(self) -> str:
        """What tables call it: its file's name, `clean`, its units, or how many these are."""
        if self.origin is not None and self.origin.name:
            return self.origin.name
        text = " ".join(self.removed) or CLEAN
        if len(text) > LONGEST_TEXT:
            digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]
            text = f"{len(self.heads)} heads and {len(self.ffns)} FFNs, {digest}"
        return text if self.ablation == "zero" or not self else f"{text} ({self.ablation})"

    @property
    def units(self) -> RemovedUnits:
        """The removed units as the engine takes them, with the name of what stands in their place where a
        file says it.
        """
        return RemovedUnits(self.heads, self.ffns, self.origin.mask.fill if self.origin else None)

    @property
    def removed(self) -> list[str]:
        """The removed units, heads first: `['L0H1', 'L4F']`."""
        return [str(unit) for unit in self.units.units()]

    @property
    def kept(self) -> list[str]:
        """The units that the mask leaves, heads first; raises InputError where its model is not known."""
        model = self.model
        if model is None:
            raise InputError(
                "kept: expected a mask of a file or a run, whose model is known; got units that somebody "
                "named: ask for removed"
            )
        gone = set(self.units.units())
        every = [*all_heads(model.layers, model.heads), *all_ffns(model.layers)]
        return [str(unit) for unit in every if unit not in gone]

    @property
    def model(self) -> MaskModel | None:
        """The model that the mask was made on, by id, shape and digest; None where nobody said."""
        return None if self.origin is None else self.origin.model

    @property
    def scores(self) -> dict[str, Any]:
        """What its file says that the mask scored; empty where there is none."""
        return {} if self.origin is None else dict(self.origin.scores)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        # Of a mask that removes nothing, nothing stands in a unit's place.
        filled = (self.ablation, self.units.fill) if self else ()
        return self.heads, self.ffns, *filled

    def __len__(self) -> int:
        """Return how many units are removed."""
        return len(self.heads) + len(self.ffns)

    def __or__(self, other: "Mask") -> "Mask":
        return self._combined(other, "union", self.units | other.units)

    def __and__(self, other: "Mask") -> "Mask":
        return self._combined(other, "intersection", self.units & other.units)

    def __sub__(self, other: "Mask") -> "Mask":
        return self._combined(other, "difference", self.units - other.units)

    def __repr__(self) -> str:
        if self.origin is None or not self.origin.name:
            return f"Mask({self.name!r})"
        heads, ffns, model = len(self.heads), len(self.ffns), self.origin.model
        return (
            f"Mask({self.name!r}: {heads} of {model.layers * model.heads} heads and {ffns} of {model.layers} "
            f"FFNs of {model.id} removed)"
        )

    @python_errors
    def applied(self, model: "PreTrainedModel") -> "AppliedMask":
        """Put the mask on a plain transformers model at once, without the engine; return what takes it off.

        It is on until the end of a `with`, or until `.remove()`. Scores are the engine's. Raises InputError
        for a model of an unknown family or another shape, and for a mask that needs other documents
        (`resample`) or brings no table of means.

        >>> import lowmem_icl as icl
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("lowmem_icl/demo")
        >>> with icl.Mask.parse("L1H3 L2F").applied(model) as on:
        ...     on.is_on
        True
        """
        from lowmem_icl.export.applied import applied

        units, origin = self.units, self.origin
        if self.ablation != "zero" and units.fill is None and self:
            raise InputError(
                f"ablation {self.ablation}: expected a mask that brings what stands in removed units' place; "
                "read one of a file, or take one of zeros"
            )
        return applied(units, model, None if origin is None else origin.means, self.model)

    @python_errors
    def save(self, path: str | Path, model: MaskModel | None = None) -> Path:
        """Write a mask file, `<name>.json`, and beside it the table of means that it needs; return its path.

        model: what it is for, such as `open_model(...).mask_model`; as the mask's own origin says where there
        is one. Raises InputError where neither is known, for a name that no mask may have and for a mask of
        means that brings no table.
        """
        path = Path(path)
        of_model = model or self.model
        if of_model is None:
            raise InputError("model: expected the model that it is for; give its mask_model")
        if path.suffix != ".json" or not re.fullmatch(NAME_PATTERN, path.stem):
            raise InputError(
                f"path: expected NAME.json, at most 200 letters, digits and . _ + -; got {path.name!r}"
            )
        origin = self.origin
        if self.ablation != "zero" and self.units.fill is None and self:
            raise InputError(
                f"ablation {self.ablation}: expected a mask that brings what stands in removed units' place; "
                "save masks of a run, or one of zeros"
            )
        made = {"method": "named"} if origin is None else origin.made
        means = None if origin is None else origin.means
        extra = {} if origin is None else origin.extra
        write_mask(path, MaskFile(path.stem, self.units, of_model, made, self.scores, extra, means=means))
        return path

    def _combined(self, other: "Mask", method: str, units: RemovedUnits) -> "Mask":
        # A mask that removes nothing does not say what stands in units' place.
        filled = self or other
        if self and other and (self.ablation, self.units.fill) != (other.ablation, other.units.fill):
            raise InputError(
                f"masks: {self.name} and {other.name} put other things in place of what they remove "
                f"({self.ablation}, {other.ablation}, or other means); combine masks that put the same there"
            )
        if self.model and other.model and self.model.shape != other.model.shape:
            raise InputError(f"masks: {self.name} and {other.name} are for models of different shapes")
        units = units.filled(filled.units.fill)
        origin = filled.origin or self.origin or other.origin
        if origin is not None:
            made = {"method": method, "from": [self.name, other.name]}
            means = None if filled.origin is None else filled.origin.means
            origin = MaskFile("", units, origin.model, made, means=means)
        return Mask(units.heads, units.ffns, filled.ablation, origin)
