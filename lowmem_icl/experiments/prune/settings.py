"""What greedy searches are for: every task at every shot count, and all tasks together."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_icl.experiments.prune.nested import Effort
from lowmem_icl.experiments.prune.search import SearchPlan
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import mask_name
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.fills import clean_beside, fill_for
from lowmem_icl.session.prepare import Prepared

CERTIFIED = "certified"
"""The method of the part of a search's path that is certified."""
MOST_TIMES_ABLATIONS = 5
"""Unless one is asked for, the search is exact up to so many times the operations of the ablations."""
METHODS = ("greedy", "gradient", "random")
"""Of the mask that a search returns and those of its size that it is compared with."""


@dataclass(frozen=True)
class Setting:
    """What one search is for: a task, or all of them, at a shot count; `tasks` are the indices of the
    training tasks.
    """

    task: str
    shots: int
    tasks: tuple[int, ...]

    def mask_name(self, method: str) -> str:
        """Return the name of its mask by a method."""
        return mask_name(method, self.task, self.shots)

    def fill(self, options: RunOptions) -> str | None:
        """Return the name of what stands in place of what it removes."""
        return fill_for(options, self.task, self.shots)

    def filled(self, options: RunOptions, masks: Sequence[Mask]) -> tuple[Mask, ...]:
        """Return its masks with that in units' place; the clean run goes over the same rows."""
        fill = self.fill(options)
        return tuple(mask.filled(fill) if mask else clean_beside(fill) for mask in masks)


def settings_of(prepared: Prepared) -> list[Setting]:
    """Return every task at every shot count, and all tasks together where there are two."""
    tasks = prepared.train
    settings = [Setting(task.task, task.shots, (index,)) for index, task in enumerate(tasks)]
    for shots in prepared.options.resolved_shots:
        members = [index for index, task in enumerate(tasks) if task.shots == shots and in_domain(task.task)]
        if len(members) > 1:
            settings.append(Setting(AGGREGATE, shots, tuple(members)))
    return settings


def search_plan(prepared: Prepared) -> SearchPlan:
    """Return what searches visit."""
    skeleton, options = prepared.skeleton, prepared.options
    attention, projection, ffn = skeleton.weights_by_part
    return SearchPlan(
        skeleton.layers,
        skeleton.heads,
        options.direction,
        options.order,
        head_parameters=(attention + projection) // skeleton.heads,
        ffn_parameters=ffn,
    )


def most_searches(prepared: Prepared) -> int:
    """Return how many searches there are of a task's documents at most: its own, and that of all tasks."""
    return 2 if any(setting.task == AGGREGATE for setting in settings_of(prepared)) else 1


def effort_of(prepared: Prepared, plan: SearchPlan) -> Effort | None:
    """Return how much nested searches measure; None where searches are exact."""
    options, searches = prepared.options, most_searches(prepared)
    n_units = plan.layers * (plan.heads + 1)
    exact_units = n_units if options.screen is None else min(options.resolved_exact, n_units)
    # On half the documents each: choosing among ever fewer heads, and checking one of every round.
    masks_per_layer = plan.heads * (plan.heads + 1) / 2 + plan.heads + 1
    times_ablations = plan.layers * masks_per_layer / 2 * searches / exact_units
    if options.search == "exact" or (options.search is None and times_ablations <= MOST_TIMES_ABLATIONS):
        return None
    return Effort.within(plan, exact_units, searches)
