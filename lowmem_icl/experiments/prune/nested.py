"""The nested greedy search: a few sweeps per layer instead of one per head.

Candidates that are visited together are put in order once, and ever longer beginnings of that order are
scored side by side; the longest that the checking half allows goes. Where the next unit alone breaks the
tolerance it stays, and the search goes on behind it. So only the border is decided unit by unit.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lowmem_icl.experiments.prune.search import (
    Answer,
    Asked,
    EstimateRequest,
    Request,
    Search,
    SearchPlan,
    SearchState,
    Values,
    doubling,
    evenly,
)
from lowmem_icl.masks.mask import Mask, Unit

MOST_ESTIMATES = 8
# A pass forward and back, in full passes forward.
PASSES_PER_ESTIMATE = 3
# Of what may be spent, at most one part in so many goes into estimates.
ESTIMATES_SHARE = 10
# Masks that a group of layers needs at least so that its border is found: of its heads, of its FFNs.
LEAST_MASKS = (6, 2)


@dataclass(frozen=True)
class Effort:
    """How much a nested search measures.

    `groups`: of how many groups of neighbouring layers the units are tried together. `alone`: whether each is
    first measured alone, under the mask so far, on the choosing half; else estimates tell the order, which
    are made again `estimates` times on the way. `head_masks`, `ffn_masks`: how many masks of a group's heads
    and FFNs the checking half is asked for at most.
    """

    groups: int
    alone: bool
    estimates: int
    head_masks: int
    ffn_masks: int

    @classmethod
    def within(cls, plan: SearchPlan, exact_units: int, searches: int) -> "Effort":
        """Return the most that keeps to twice the operations of removing so many units alone.

        exact_units: how many are ablated exactly per task and shot count; searches: how many searches there
        are of every task's documents.
        """
        # In masks of all layers on half the documents; from the first layer up none starts late.
        full_depth = 2 if plan.direction == "up" else 1
        budget = 2 * exact_units * (1 + 1 / plan.layers) / searches / full_depth
        # On its way to a group the clean run costs as much as a mask on each half, shared by all searches.
        clean = -(-2 // searches)
        per_layer = int(2 * budget / (plan.layers + 1)) - clean
        measured_alone = plan.heads + (plan.order == "joint")
        head_masks = per_layer - measured_alone - 1
        if head_masks >= min(plan.heads, LEAST_MASKS[0]):
            return cls(plan.layers, True, 0, head_masks, 1)
        estimates = min(MOST_ESTIMATES, int(budget / (ESTIMATES_SHARE * PASSES_PER_ESTIMATE)))
        left = budget - PASSES_PER_ESTIMATE * estimates
        groups = int(2 * left / (sum(LEAST_MASKS) + clean)) - 1
        groups = min(plan.layers, max(1, groups))
        masks = max(2, int(2 * left / (groups + 1)) - clean)
        ffn_masks = max(1, min(masks // 4, 2 * -(-plan.layers // groups)))
        return cls(groups, False, min(estimates, 2 * groups - 1), masks - ffn_masks, ffn_masks)

    def in_words(self, plan: SearchPlan) -> str:
        """Say how closely a search looks."""
        order = "every unit measured alone" if self.alone else "units ordered by what is known or estimated"
        again = f", estimated again {self.estimates} times" if self.estimates else ""
        groups = "layer by layer" if self.groups == plan.layers else f"layers in {self.groups} groups"
        masks = f"at most {self.head_masks} masks of each one's heads and {self.ffn_masks} of its FFNs"
        return f"nested searches, {groups}, {order}{again}; {masks} are checked"

    def masks(self, together: Sequence[Unit]) -> int:
        """Return how many masks the checking half is asked for, of units that are tried together."""
        kinds = {unit.kind for unit in together}
        return self.head_masks * ("head" in kinds) + self.ffn_masks * ("ffn" in kinds)

    def estimates_before(self, visits: int) -> frozenset[int]:
        """Return before which of so many visits, by their numbers, estimates are made again."""
        return frozenset(visits * number // (self.estimates + 1) for number in range(1, self.estimates + 1))


@dataclass(frozen=True, eq=False)
class KnownCosts:
    """What is known of units beforehand, on the choosing half.

    `estimates`: of every group of documents what units are estimated to cost in gold log-probability [U, N];
    None where nothing is. `exact`: of every group what removing single ones costs, by their index. `slope`:
    how much of what `exact` is in a document loses per nat, from the objective [N].
    """

    estimates: Answer | None = field(default=None, repr=False)
    exact: tuple[Mapping[int, float], ...] = ()
    slope: Callable[[Values], Values] = np.ones_like


def nested_search(plan: SearchPlan, tolerance: float, effort: Effort, known: KnownCosts) -> Search:
    """Search one mask; yields requests and is sent their answers; returns the result."""
    clean_choose = yield Request("choose", (Mask(),))
    clean_check = yield Request("check", (Mask(),))
    state = SearchState(plan, tolerance, clean_choose, clean_check)
    visits = plan.visits(effort.groups)
    again = effort.estimates_before(len(visits))
    estimates = known.estimates
    costs = np.zeros(0)
    for number, together in enumerate(visits):
        if effort.alone:
            order = yield from state.by_cost(together)
        else:
            if number in again or estimates is None:
                estimates = yield EstimateRequest(state.mask)
            if number in again or not len(costs):
                costs = _costs(estimates, clean_choose, known)
            order = state.cheapest_first(together, costs[[plan.index(unit) for unit in together]])
        state.visit(together)
        yield from _remove_beginnings(state, [together[index] for index in order], effort.masks(together))
    return state.result()


def _costs(estimates: Answer, clean: Answer, known: KnownCosts) -> Values:
    """Return what each unit is expected to cost the objective, mean over groups, [U]; the exact cost where it
    is known.
    """
    by_group = [
        (of_units * known.slope(whole[0])).mean(1) for of_units, whole in zip(estimates, clean, strict=True)
    ]
    for costs, exact in zip(by_group, known.exact, strict=bool(known.exact)):
        costs[list(exact)] = list(exact.values())
    return np.asarray(np.mean(by_group, axis=0))


def masks_together(most_masks: int) -> int:
    """Return how many of the masks that a border may take are checked in one sweep: a third of them, so that
    later ones go where earlier ones point; 3 at least.
    """
    return max(3, -(-most_masks // 3))


def _remove_beginnings(
    state: SearchState, candidates: Sequence[Unit], most_masks: int
) -> Generator[Asked, Answer, None]:
    """Remove the longest beginning of an order that is allowed, and again of what stands behind the unit that
    broke it, until so many masks are checked.
    """
    rest, open_units, is_behind = list(candidates), len(candidates), False
    left, together = most_masks, masks_together(most_masks)
    while rest and left:
        count = min(left, together)
        sizes = list(doubling(open_units, count)) if is_behind else evenly(open_units, count)
        answer = yield Request("check", tuple(_without(state.mask, rest[:size]) for size in sizes))
        left -= len(sizes)
        losses = state.losses(answer)
        allowed = [index for index in range(len(sizes)) if state.allows(float(losses[index]))]
        gone = sizes[allowed[-1]] if allowed else 0
        if allowed:
            state.remove(rest[:gone], answer, allowed[-1], float(losses[allowed[-1]]))
        broken = [size for size in sizes if size > gone]
        # One more than are open breaks the tolerance, as is known already, or there are no more.
        open_units = (broken[0] if broken else open_units + 1) - gone - 1
        rest = rest[gone:]
        if rest and not open_units:
            rest, is_behind = rest[1:], True
            open_units = len(rest)


def _without(mask: Mask, units: Sequence[Unit]) -> Mask:
    for unit in units:
        mask |= unit.as_mask()
    return mask
