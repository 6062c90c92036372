"""What greedy searches have in common: what they ask for, what they visit, and how they run side by side.

Masks only ever hold units of the layers visited; from the last layer down, every candidate so starts from the
clean residual of its own layer. Which unit goes is decided on one half of the training documents, whether it
may go on the other.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask, Unit

Values = NDArray[np.float64]
Half = Literal["choose", "check"]


@dataclass(frozen=True)
class Request:
    """Masks to score on one half of the training documents: `choose` decides the order, `check` the
    tolerance.
    """

    half: Half
    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class EstimateRequest:
    """A mask whose model every unit's cost is to be estimated for, by gradients, on the choosing half."""

    mask: Mask


# Of every group of documents (a search's tasks, which weigh the same) the objective under M masks, [M, N]; or
# what each unit is estimated to cost in gold log-probability, [U, N]: all heads, then all FFNs.
Answer = tuple[Values, ...]
Asked = Request | EstimateRequest


def loss(clean: Answer, now: Answer) -> Values:
    """Return how much of the objective is lost under each mask, mean over groups, [M]."""
    drops = [before.mean(1) - after.mean(1) for before, after in zip(clean, now, strict=True)]
    return np.asarray(np.mean(drops, axis=0))


def document_losses(clean: Answer, now: Answer) -> Answer:
    """Return how much every document loses under one mask, [N] of every group."""
    return tuple(before[0] - after[0] for before, after in zip(clean, now, strict=True))


@dataclass(frozen=True)
class Pruned:
    """What a search ends with: the mask, what it loses on the check half and what of that each document does
    (of every group, [N]), and its steps.

    A step is a unit and the whole loss once it is gone; of units that go together that of all of them.
    """

    mask: Mask
    lost: float
    document_losses: Answer = field(repr=False, compare=False)
    steps: tuple[tuple[Unit, float], ...]


Search = Generator[Asked, Answer, Pruned]


@dataclass(frozen=True)
class SearchPlan:
    """What a search visits and in which order.

    `direction`: from the last layer `down`, or from the first `up`. `order`: all heads and then all FFNs,
    each unit counting the same, or `joint`ly, layer by layer, counting by parameters: `head_parameters`,
    `ffn_parameters` each.
    """

    layers: int
    heads: int
    direction: Literal["down", "up"] = "down"
    order: Literal["heads-first", "joint"] = "heads-first"
    head_parameters: int = 1
    ffn_parameters: int = 1

    def visits(self, groups: int | None = None) -> list[list[Unit]]:
        """Return the units that are tried together, in order: those of a layer, or of one of so many groups
        of neighbouring layers.
        """
        layers = range(self.layers) if self.direction == "up" else range(self.layers - 1, -1, -1)
        count = groups or self.layers
        ends = [self.layers * number // count for number in range(count + 1)]
        members = [layers[start:end] for start, end in pairwise(ends)]
        heads = [
            [Unit("head", layer, head) for layer in group for head in range(self.heads)] for group in members
        ]
        ffns = [[Unit("ffn", layer, None) for layer in group] for group in members]
        if self.order == "joint":
            return [of_heads + of_ffns for of_heads, of_ffns in zip(heads, ffns, strict=True)]
        return heads + ffns

    def weight(self, unit: Unit) -> int:
        """Return how much a unit counts."""
        if self.order == "heads-first":
            return 1
        return self.head_parameters if unit.kind == "head" else self.ffn_parameters

    def index(self, unit: Unit) -> int:
        """Return a unit's place among all: heads by layer, then FFNs."""
        if unit.head is None:
            return self.layers * self.heads + unit.layer
        return unit.layer * self.heads + unit.head


class SearchState:
    """How far a search is: the mask so far, the checking half's answer under it, and the units that went.

    A unit may go where the whole loss on the checking half stays within the tolerance × the share, by weight,
    of all units visited so far, so that those visited first do not spend what belongs to the others.
    """

    def __init__(self, plan: SearchPlan, tolerance: float, clean_choose: Answer, clean_check: Answer) -> None:
        self._plan, self._tolerance = plan, tolerance
        self._clean_choose, self._clean_check = clean_choose, clean_check
        self._whole = sum(plan.weight(unit) for together in plan.visits() for unit in together)
        self._visited = 0
        self.mask, self.current = Mask(), clean_check
        self.steps: list[tuple[Unit, float]] = []

    def visit(self, units: Sequence[Unit]) -> None:
        """Let what the tolerance grants these units be spent from now on."""
        self._visited += sum(self._plan.weight(unit) for unit in units)

    def allows(self, lost: float) -> bool:
        """Tell whether the tolerance for all visited so far covers a loss."""
        return lost <= self._tolerance * self._visited / self._whole

    def losses(self, answer: Answer) -> Values:
        """Return the whole losses on the checking half, [M]."""
        return loss(self._clean_check, answer)

    def remove(self, units: Sequence[Unit], answer: Answer, index: int, lost: float) -> None:
        """Remove units; the answer at an index is the checking half's without them."""
        for unit in units:
            self.mask |= unit.as_mask()
            self.steps.append((unit, lost))
        self.current = tuple(group[index : index + 1] for group in answer)

    def by_cost(self, candidates: Sequence[Unit]) -> Generator[Request, Answer, list[int]]:
        """Return the order of candidates, the one that costs the choosing half least for its weight first."""
        if len(candidates) == 1:
            return [0]
        answer = yield Request("choose", tuple(self.mask | unit.as_mask() for unit in candidates))
        return self.cheapest_first(candidates, loss(self._clean_choose, answer))

    def cheapest_first(self, candidates: Sequence[Unit], costs: Values) -> list[int]:
        """Return the order of candidates by what they cost [C] for their weight; of equals the lowest unit
        goes first.
        """
        weights = np.array([self._plan.weight(unit) for unit in candidates], dtype=np.float64)
        return [int(index) for index in np.argsort(costs / weights, kind="stable")]

    def result(self) -> Pruned:
        """Return what the search ends with."""
        lost = float(self.losses(self.current)[0])
        losses = document_losses(self._clean_check, self.current)
        return Pruned(self.mask, lost, losses, tuple(self.steps))


ScoreStep = Callable[[int, Mapping[str, Asked]], Mapping[str, Answer]]


def in_lockstep(searches: Mapping[str, Search], score: ScoreStep) -> dict[str, Pruned]:
    """Run all searches side by side; each step scores what every one of them asks for in one sweep.

    `score(step, requests by search)` returns the answers by search; a step's requests are of one kind, and
    estimates wait until all that is asked for is estimates, so that they share their reads. Searches that end
    earlier drop out.
    """
    results: dict[str, Pruned] = {}
    asked: dict[str, Asked] = {name: next(search) for name, search in searches.items()}
    step = 0
    while asked:
        scored = {name: request for name, request in asked.items() if isinstance(request, Request)}
        answers = score(step, scored or asked)
        for name, answer in answers.items():
            try:
                asked[name] = searches[name].send(answer)
            except StopIteration as finished:
                results[name] = finished.value
                del asked[name]
        step += 1
    return results


def evenly(limit: int, count: int) -> list[int]:
    """Return at most `count` sizes up to a limit, evenly spaced, the limit being the last."""
    return sorted({-(-limit * number // count) for number in range(1, count + 1)} - {0})


def doubling(limit: int, count: int) -> Iterator[int]:
    """Yield at most `count` sizes up to a limit: 1, 2, 4 and so on."""
    yield from (2**number for number in range(count) if 2**number <= limit)
