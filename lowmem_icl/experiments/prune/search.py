"""The greedy layerwise pruner: layer by layer, within a tolerance.

Masks only ever hold units of the layers visited; from the last layer down, every candidate so starts from the
clean residual of its own layer. Which unit goes is decided on one half of the training documents, whether it
may go on the other.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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


# Of every group of documents (a search's tasks, which weigh the same) the objective under M masks, [M, N].
Answer = tuple[Values, ...]


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
    """

    mask: Mask
    lost: float
    document_losses: Answer = field(repr=False, compare=False)
    steps: tuple[tuple[Unit, float], ...]


Search = Generator[Request, Answer, Pruned]


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

    def visits(self) -> Iterator[list[Unit]]:
        """Yield the units that are tried together, in order."""
        layers = range(self.layers) if self.direction == "up" else range(self.layers - 1, -1, -1)
        heads = [[Unit("head", layer, head) for head in range(self.heads)] for layer in layers]
        ffns = [[Unit("ffn", layer, None)] for layer in layers]
        if self.order == "joint":
            yield from (layer_heads + layer_ffn for layer_heads, layer_ffn in zip(heads, ffns, strict=True))
        else:
            yield from heads + ffns

    def weight(self, unit: Unit) -> int:
        """Return how much a unit counts."""
        if self.order == "heads-first":
            return 1
        return self.head_parameters if unit.kind == "head" else self.ffn_parameters


def greedy_search(plan: SearchPlan, tolerance: float) -> Search:
    """Search one mask; yields requests and is sent their answers; returns the result.

    Of the units tried together, the one that costs the objective least for its weight on the choosing half is
    removed, then all are measured again. A unit may go where the whole loss on the checking half stays within
    `tolerance` × the share, by weight, of all units visited so far, so that the layers visited first do not
    spend what belongs to the others; one that breaks it is put back and the next cheapest tried.
    """
    clean_choose = yield Request("choose", (Mask(),))
    clean_check = yield Request("check", (Mask(),))
    state = _GreedyState(plan, tolerance, clean_choose, clean_check)
    for together in plan.visits():
        candidates = together
        while candidates:
            order = yield from state.by_cost(candidates)
            tried = yield from state.remove_first_within_tolerance([candidates[index] for index in order])
            candidates = [unit for unit in candidates if unit not in tried]
    lost = float(loss(clean_check, state.current)[0])
    return Pruned(state.mask, lost, document_losses(clean_check, state.current), tuple(state.steps))


class _GreedyState:
    """How far a search is: the mask so far, the checking half's answer under it, and the units that went."""

    def __init__(self, plan: SearchPlan, tolerance: float, clean_choose: Answer, clean_check: Answer) -> None:
        self._plan, self._clean_choose, self._clean_check = plan, clean_choose, clean_check
        self._tolerance = tolerance
        self._whole = sum(plan.weight(unit) for together in plan.visits() for unit in together)
        self._visited = 0
        self.mask, self.current = Mask(), clean_check
        self.steps: list[tuple[Unit, float]] = []

    def by_cost(self, candidates: Sequence[Unit]) -> Generator[Request, Answer, list[int]]:
        """Return the order of candidates, the one that costs the choosing half least for its weight first."""
        if len(candidates) == 1:
            return [0]
        answer = yield Request("choose", tuple(self.mask | unit.as_mask() for unit in candidates))
        weights = np.array([self._plan.weight(unit) for unit in candidates], dtype=np.float64)
        # A stable sort: of equals the lowest unit goes first.
        order = np.argsort(loss(self._clean_choose, answer) / weights, kind="stable")
        return [int(index) for index in order]

    def remove_first_within_tolerance(
        self, candidates: Sequence[Unit]
    ) -> Generator[Request, Answer, list[Unit]]:
        """Remove the first candidate that the checking half allows, if any; return all that were tried."""
        tried: list[Unit] = []
        # The cheapest nearly always passes; where it does not, the others are checked in one sweep.
        for batch in (candidates[:1], candidates[1:]):
            if not batch:
                continue
            masks = tuple(self.mask | unit.as_mask() for unit in batch)
            answer = yield Request("check", masks)
            losses = loss(self._clean_check, answer)
            for index, unit in enumerate(batch):
                tried.append(unit)
                if self._allows(unit, float(losses[index])):
                    self.mask = masks[index]
                    self.current = tuple(group[index : index + 1] for group in answer)
                    self.steps.append((unit, float(losses[index])))
                    return tried
        return tried

    def _allows(self, unit: Unit, lost: float) -> bool:
        """Visit a unit; tell whether the tolerance for all visited so far covers the loss without it too."""
        self._visited += self._plan.weight(unit)
        return lost <= self._tolerance * self._visited / self._whole


ScoreStep = Callable[[int, Mapping[str, Request]], Mapping[str, Answer]]


def in_lockstep(searches: Mapping[str, Search], score: ScoreStep) -> dict[str, Pruned]:
    """Run all searches side by side; each step scores what every one of them asks for in one sweep.

    `score(step, requests by search)` returns the answers by search. Searches that end earlier drop out.
    """
    results: dict[str, Pruned] = {}
    asked: dict[str, Request] = {name: next(search) for name, search in searches.items()}
    step = 0
    while asked:
        answers = score(step, asked)
        following: dict[str, Request] = {}
        for name in asked:
            try:
                following[name] = searches[name].send(answers[name])
            except StopIteration as finished:
                results[name] = finished.value
        asked = following
        step += 1
    return results
