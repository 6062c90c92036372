"""The exact greedy search: every unit of a layer is measured again after each removal."""

from collections.abc import Generator, Sequence

from lowmem_icl.experiments.prune.search import Answer, Request, Search, SearchPlan, SearchState
from lowmem_icl.masks.mask import Mask, Unit


def greedy_search(plan: SearchPlan, tolerance: float) -> Search:
    """Search one mask; yields requests and is sent their answers; returns the result.

    Of the units tried together, the one that costs the objective least for its weight on the choosing half is
    removed, then all are measured again; one that the tolerance does not allow (search.SearchState) is put
    back and the next cheapest tried.
    """
    clean_choose = yield Request("choose", (Mask(),))
    clean_check = yield Request("check", (Mask(),))
    state = SearchState(plan, tolerance, clean_choose, clean_check)
    for together in plan.visits():
        candidates = together
        while candidates:
            order = yield from state.by_cost(candidates)
            tried = yield from _remove_first_allowed(state, [candidates[index] for index in order])
            candidates = [unit for unit in candidates if unit not in tried]
    return state.result()


def _remove_first_allowed(
    state: SearchState, candidates: Sequence[Unit]
) -> Generator[Request, Answer, list[Unit]]:
    """Remove the first candidate that the checking half allows, if any; return all that were tried."""
    tried: list[Unit] = []
    # The cheapest nearly always passes; where it does not, the others are checked in one sweep.
    for batch in (candidates[:1], candidates[1:]):
        if not batch:
            continue
        answer = yield Request("check", tuple(state.mask | unit.as_mask() for unit in batch))
        losses = state.losses(answer)
        for index, unit in enumerate(batch):
            tried.append(unit)
            state.visit([unit])
            if state.allows(float(losses[index])):
                state.remove([unit], answer, index, float(losses[index]))
                return tried
    return tried
