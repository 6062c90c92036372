"""Which rows are shown before a scored document: drawn for each, or a few sets that many share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["per-document", "shared"]
DEFAULT_SETS = 8


@dataclass(frozen=True)
class Demonstrations:
    """How a run's documents come by their demonstrations; `sets` counts in shared mode alone."""

    mode: Mode = "per-document"
    sets: int = DEFAULT_SETS


PER_DOCUMENT = Demonstrations()


@dataclass(frozen=True)
class DemonstrationDraw:
    """A document's demonstrations: indices of rows in prompt order, and their set's number, if shared."""

    indices: tuple[int, ...]
    set_number: int | None = None


@dataclass
class Dealer:
    """Gives documents, one after the other, their demonstrations out of a pool of row indices.

    `scores_the_pool`: whether a scored document may itself lie in the pool and must not be shown before
    itself.
    """

    demonstrations: Demonstrations
    rng: random.Random
    pool: Sequence[int]
    shots: int
    scores_the_pool: bool
    _sets: list[list[int]] = field(default_factory=list)
    _set_of_cluster: dict[str, int] = field(default_factory=dict)

    @property
    def needed(self) -> int:
        """Rows that the pool must have."""
        spare = self.scores_the_pool
        return self.shots + spare if self.shots else 0

    def deal(self, index: int, cluster: str) -> DemonstrationDraw:
        """Return the demonstrations of the document at an index; documents of one cluster share a set.

        Drawn without replacement, one more where the document could be among them.
        """
        if not self.shots:
            return DemonstrationDraw(())
        if self.demonstrations.mode == "per-document":
            return DemonstrationDraw(self._without(self._draw(), index))
        if not self._sets:
            self._sets = [self._draw() for _ in range(self.demonstrations.sets)]
        number = self._set_of_cluster.setdefault(
            cluster, len(self._set_of_cluster) % self.demonstrations.sets
        )
        # The one more takes the place of a document that would stand before itself.
        return DemonstrationDraw(self._without(self._sets[number], index), number)

    def _draw(self) -> list[int]:
        return self.rng.sample(self.pool, self.needed)

    def _without(self, drawn: Sequence[int], index: int) -> tuple[int, ...]:
        kept = [shown for shown in drawn if not self.scores_the_pool or shown != index]
        return tuple(kept[: self.shots])
