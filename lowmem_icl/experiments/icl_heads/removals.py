"""Which heads are removed: the top ones of two rankings, without the other's top ones, and random ones.

Axis letters: L layers, H heads of a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import highest_heads, removed_count

Values = NDArray[np.float64]

PERCENTS = (1, 2, 5, 10, 20)
STRUCK_PERCENT = 2
"""Of the other ranking's heads, which are struck out before the top ones are taken."""
RANDOM_DRAWS = 20
FUNCTION_VECTOR = "function_vector"
INDUCTION = "induction"
RANDOM = "random"
RANDOM_MEDIAN = "random-median"
MASK = "icl-heads"


@dataclass(frozen=True)
class Scores:
    """Two scores of all heads, [L, H] each: of function vectors, and of induction (prefix matching)."""

    function_vector: Values
    induction: Values

    @property
    def by_method(self) -> dict[str, Values]:
        """The scores by the name of their method."""
        return {FUNCTION_VECTOR: self.function_vector, INDUCTION: self.induction}


@dataclass(frozen=True)
class Removal:
    """Some heads that are removed together; `seed` of a random draw, `number` which draw it is."""

    method: str
    percent: int
    mask: Mask
    seed: int | None = None
    number: int | None = None

    @property
    def name(self) -> str:
        """What `mask` says in tables."""
        return f"{MASK}-{self.method}" + ("" if self.number is None else f"-{self.number:02d}")

    @property
    def fields(self) -> dict[str, Any]:
        """The columns that say what is removed."""
        return {
            "mask": self.name, "method": self.method, "percent": self.percent, "seed": self.seed,
            "count": len(self.mask), "heads_removed": len(self.mask), "ffns_removed": 0,
        }  # fmt: skip


def levels(heads: int) -> dict[int, int]:
    """Return how many of so many heads every percentage is, without those that are less than one head."""
    counts = {percent: removed_count(percent, heads) for percent in PERCENTS}
    return {percent: count for percent, count in counts.items() if count}


def struck(scores: Values) -> Mask:
    """Return the top heads by a score that another ranking does without: at least one."""
    return highest_heads(scores, max(1, removed_count(STRUCK_PERCENT, scores.size)))


def top_heads(scores: Values, count: int, without: Mask = Mask()) -> Mask:
    """Return the `count` highest heads by a score, but for some."""
    # As highest_heads orders them, so that sets without `without` are nested in those with more heads.
    wanted = highest_heads(scores, min(scores.size, count + len(without))) - without
    if len(wanted) > count:
        ordered = sorted(wanted.heads, key=lambda head: (scores[head], head), reverse=True)
        return Mask(frozenset(ordered[:count]))
    return wanted


def ranked_removals(scores: Scores) -> Iterator[Removal]:
    """Yield the top heads of both rankings at all levels, then those without the other's top ones."""
    by_method, at = scores.by_method, levels(scores.induction.size)
    for method, values in by_method.items():
        for percent, count in at.items():
            yield Removal(method, percent, top_heads(values, count))
    for method, other in ((FUNCTION_VECTOR, INDUCTION), (INDUCTION, FUNCTION_VECTOR)):
        without = struck(by_method[other])
        for percent, count in at.items():
            yield Removal(
                f"{method}-excluding-{other}", percent, top_heads(by_method[method], count, without)
            )


def random_removals(scores: Scores, seed: int, draws: int = RANDOM_DRAWS) -> Iterator[Removal]:
    """Yield random heads at all levels, those of one draw nested; the top ones of both rankings are never
    drawn.
    """
    barred = struck(scores.function_vector) | struck(scores.induction)
    heads = [head for head in np.ndindex(*scores.induction.shape) if head not in barred.heads]
    for number in range(1, draws + 1):
        order = np.random.default_rng(seed + number).permutation(len(heads))
        for percent, count in levels(scores.induction.size).items():
            drawn = frozenset(heads[index] for index in order[:count])
            yield Removal(RANDOM, percent, Mask(drawn), seed + number, number)


def all_removals(scores: Scores, seed: int, draws: int = RANDOM_DRAWS) -> list[Removal]:
    """Return everything that is removed."""
    return [*ranked_removals(scores), *random_removals(scores, seed, draws)]


def columns(removals: Sequence[Removal]) -> dict[str, list[Any]]:
    """Return the columns that say what is removed, one record each."""
    fields = [removal.fields for removal in removals]
    return {name: [of[name] for of in fields] for name in fields[0]}
