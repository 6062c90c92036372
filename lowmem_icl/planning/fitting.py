"""How much of a screened programme fits the hours there are."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from lowmem_icl.experiments.ablate.sweeps import units_of
from lowmem_icl.planning.costs import planned_work, work_left
from lowmem_icl.planning.plan import Counting, Plan
from lowmem_icl.session.prepare import Prepared

# What units cost is nearly proportional to their number.
MOST_GUESSES = 4
CLOSE_ENOUGH = 0.95


def exact_that_fits(prepared: Prepared, plan: Plan, finished: Callable[[str], bool]) -> int | None:
    """Return the largest --exact with which everything that is left fits the plan's hours, found to within
    5 % of these; 0 where not even 1 does, None where there are no hours or nothing is screened.

    A search that keeps to a multiple of the ablations grows with them.
    """
    if plan.hours is None or prepared.options.screen is None or "ablate" not in prepared.options.experiments:
        return None
    allowed, most = plan.hours * 3600, len(units_of(prepared))

    @cache
    def seconds(exact: int) -> float:
        changed = replace(prepared, options=prepared.options.model_copy(update={"exact": exact}))
        counting = Counting(changed, plan.rates, plan.memory, plan.wave_tokens)
        return sum(counting.stage(work)[0].seconds for work in work_left(planned_work(changed), finished))

    if seconds(1) > allowed:
        return 0
    fits, too_many, guess = 1, most + 1, min(prepared.options.resolved_exact, most)
    for _ in range(MOST_GUESSES):
        fits, too_many = (guess, too_many) if seconds(guess) <= allowed else (fits, guess)
        if too_many - fits <= 1 or seconds(fits) >= CLOSE_ENOUGH * allowed:
            break
        other = guess if guess > 1 else 2
        per_unit = max(1e-9, (seconds(other) - seconds(1)) / (other - 1))
        guess = min(too_many - 1, max(fits + 1, math.floor(fits + (allowed - seconds(fits)) / per_unit)))
    return fits
