"""Units (heads and FFNs) and masks, sets of removed ones; both plain values."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import ABLATIONS, Ablation

Kind = Literal["head", "ffn"]
_UNIT = re.compile(r"L(\d{1,4})(?:H(\d{1,4})|F)")


@dataclass(frozen=True)
class Unit:
    """A head (layer, head) or an FFN (layer), 0-based; prints as L12H3 or L12F."""

    kind: Kind
    layer: int
    head: int | None = None

    def __str__(self) -> str:
        return f"L{self.layer}F" if self.head is None else f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> "Unit":
        """Read what `str` prints; raise InputError for anything else."""
        match = _UNIT.fullmatch(text)
        if match is None:
            raise InputError(f"unit {text!r}: expected a form such as L12H3 or L12F")
        head = match[2]
        return cls("ffn" if head is None else "head", int(match[1]), None if head is None else int(head))

    def as_mask(self) -> "Mask":
        """Return the mask that removes this unit alone."""
        if self.head is None:
            return Mask(ffns=frozenset([self.layer]))
        return Mask(heads=frozenset([(self.layer, self.head)]))


@dataclass(frozen=True)
class Mask:
    """Removed units: heads as (layer, head) and FFNs as layers. The empty mask is the clean run.

    `fill` names what is put in their place, None for zeros: `mean:` and which table of means, or `resample:`
    and the seed by which other documents give their values. Whoever sweeps a mask with a name knows what it
    stands for. Where estimates are taken, it is what they are of.
    """

    heads: frozenset[tuple[int, int]] = frozenset()
    ffns: frozenset[int] = frozenset()
    fill: str | None = None

    @property
    def ablation(self) -> Ablation:
        """How units are removed: the kind of what is put in their place."""
        return ablation_of(self.fill)

    def filled(self, fill: str | None) -> "Mask":
        """Return the mask with something else in its units' place."""
        return self if fill == self.fill else replace(self, fill=fill)

    @cached_property
    def first_layer(self) -> int | None:
        """The lowest layer with a removed unit; None for the empty mask."""
        return min([layer for layer, _ in self.heads] + list(self.ffns), default=None)

    def heads_in(self, layer: int) -> tuple[int, ...]:
        """Return the removed heads of a layer, ascending."""
        return tuple(sorted(head for at, head in self.heads if at == layer))

    def units(self) -> Iterator[Unit]:
        """Yield the removed units, heads first, ascending."""
        yield from (Unit("head", layer, head) for layer, head in sorted(self.heads))
        yield from (Unit("ffn", layer) for layer in sorted(self.ffns))

    def __len__(self) -> int:
        return len(self.heads) + len(self.ffns)

    def __or__(self, other: "Mask") -> "Mask":
        return Mask(self.heads | other.heads, self.ffns | other.ffns, self.fill)

    def __and__(self, other: "Mask") -> "Mask":
        return Mask(self.heads & other.heads, self.ffns & other.ffns, self.fill)

    def __sub__(self, other: "Mask") -> "Mask":
        return Mask(self.heads - other.heads, self.ffns - other.ffns, self.fill)


def ablation_of(fill: str | None) -> Ablation:
    """Return the kind of what a name stands for; None stands for zeros."""
    kind = "zero" if fill is None else fill.partition(":")[0]
    (ablation,) = (name for name in ABLATIONS if name == kind)
    return ablation


def resampling(seed: int) -> str:
    """Return the name of other documents' values, given out by a seed."""
    return f"resample:{seed}"


def resampling_seed(fill: str | None) -> int | None:
    """Return the seed by which other documents give their values; None where something else stands for
    removed units.
    """
    return int(fill.partition(":")[2]) if fill is not None and ablation_of(fill) == "resample" else None


MOST_HEADS = 1_000_000
"""In all layers of a model together: none has nearly as many, and to list more takes long."""


def all_heads(layers: int, heads: int) -> list[Unit]:
    """Return every head of a model, ascending."""
    return [Unit("head", layer, head) for layer in range(layers) for head in range(heads)]


def all_ffns(layers: int) -> list[Unit]:
    """Return every FFN of a model, ascending."""
    return [Unit("ffn", layer) for layer in range(layers)]


def jaccard(left: Mask, right: Mask) -> float:
    """Return how far two masks agree: units in both over units in either; 1 for two empty masks."""
    either = len(left | right)
    return len(left & right) / either if either else 1.0
