"""The exact greedy search: every unit of a layer is measured again after each removal."""

from collections.abc import Generator, Sequence

from lowmem_icl.experiments.prune.search import Answer, Progress, Request, Search, SearchPlan
from lowmem_icl.masks.mask import Mask, Unit


def greedy_search(plan: SearchPlan, tolerance: float) -> Search:
    """Search one mask; yields requests and is sent their answers; returns the result.

    Of the units tried together, the one that costs the objective least for its weight on the choosing half is
    removed, then all are measured again; one that the tolerance does not allow (search.Progress) is put back
    and the next cheapest tried.
    """
    clean_choose = yield Request("choose", (Mask(),))
    clean_check = yield Request("check", (Mask(),))
    progress = Progress(plan, tolerance, clean_choose, clean_check)
    for together in plan.visits():
        candidates = together
        while candidates:
            order = yield from progress.by_cost(candidates)
            tried = yield from _remove_first_allowed(progress, [candidates[index] for index in order])
            candidates = [unit for unit in candidates if unit not in tried]
    return progress.result()


def _remove_first_allowed(
    progress: Progress, candidates: Sequence[Unit]
) -> Generator[Request, Answer, list[Unit]]:
    """Remove the first candidate that the checking half allows, if any; return all that were tried."""
    tried: list[Unit] = []
    # The cheapest nearly always passes; where it does not, the others are checked in one sweep.
    for batch in (candidates[:1], candidates[1:]):
        if not batch:
            continue
        answer = yield Request("check", tuple(progress.mask | unit.as_mask() for unit in batch))
        losses = progress.losses(answer)
        for index, unit in enumerate(batch):
            tried.append(unit)
            progress.visit([unit])
            if progress.allows(float(losses[index])):
                progress.remove([unit], answer, index, float(losses[index]))
                return tried
    return tried
