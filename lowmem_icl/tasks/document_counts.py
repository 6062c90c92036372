"""How many documents of a task a limit takes: a number, a fraction of all, or what several limits leave."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lowmem_icl.protocols import Protocol
from lowmem_icl.tasks.selection import Member, Part, scored_order

Limit = int | float | None
"""A number of documents; below 1 a fraction of all that a part has, rounded up; None: all."""


@dataclass(frozen=True)
class DocumentLimit:
    """A limit that depends on another one: at most `most`, and so many `further` ones after that."""

    wanted: Limit
    most: Limit = None
    further: int = 0

    def shares(self, counts: Sequence[Callable[[], int]]) -> list[int | None]:
        """Return how many documents each member of a group gives; counts: how many it has, asked for only
        where a fraction is wanted.
        """
        wanted, further = self.wanted, self.further
        if isinstance(wanted, int):
            # A number is dealt over the members as one.
            wanted, further = wanted + further, 0
        parts = [_shares(limit, counts) for limit in (wanted, self.most, further)]
        return [_least(some, most, more) for some, most, more in zip(*parts, strict=True)]


def _least(wanted: int | None, most: int | None, further: int | None) -> int | None:
    bounds = [bound for bound in (wanted, most) if bound is not None]
    return min(bounds) + (further or 0) if bounds else None


def _shares(limit: Limit, counts: Sequence[Callable[[], int]]) -> list[int | None]:
    """Deal a number evenly over a group's members, the first ones getting what does not divide; a fraction
    is one of each.
    """
    if limit is None:
        return [None] * len(counts)
    if limit != 0 and limit < 1:
        return [ceil_of(limit, count()) for count in counts]
    whole, rest = divmod(int(limit), len(counts))
    return [whole + (number < rest) for number in range(len(counts))]


def ceil_of(fraction: float, count: int) -> int:
    """Return so much of a number, rounded up: 0.1 of 30 is 3, though the nearest double to 0.1 is larger."""
    return math.ceil(Fraction(repr(fraction)) * count)


def limit_words(limit: Limit) -> str:
    """Return a limit as a person reads it: 32, 10 %, all."""
    if limit is None:
        return "all"
    return f"{100 * limit:g} %" if limit < 1 else str(limit)


def document_count(member: Member, part: Part, protocol: Protocol) -> int:
    """Return how many documents of a member a part has under no limit; MultiRC: questions."""
    unit_of: Callable[[Any], Hashable] | None = (member.task.config.metadata or {}).get("scored_together")
    order = scored_order(member, part, protocol)
    if unit_of is None:
        return len(order)
    scored = member.scored(part)
    return len({unit_of(scored(index)) for index in order})
