"""The work that searches are expected to ask for, before any has chosen a unit."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lowmem_icl.experiments.prune.known import estimated_before
from lowmem_icl.experiments.prune.nested import Effort, masks_together
from lowmem_icl.experiments.prune.search import Half, SearchPlan
from lowmem_icl.experiments.prune.settings import effort_of, most_searches
from lowmem_icl.experiments.prune.steps import AskedMasks, estimates_part, half_of, sweep_part
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.session.fills import expected_mask, fill_for_all
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.work import Part


def search_parts(prepared: Prepared, plan: SearchPlan) -> Iterator[Part]:
    """Yield the parts of all steps, those that recur once and with how often."""
    effort = effort_of(prepared, plan)
    yield from _exact(prepared, plan) if effort is None else _nested(prepared, plan, effort)


def _exact(prepared: Prepared, plan: SearchPlan) -> Iterator[Part]:
    """Yield the steps of exact searches: in every layer the choosing half is swept under all heads, then
    under one fewer, and so on; each time the checking half under the one that is to go.
    """
    heads = plan.heads
    for together in SearchPlan(plan.layers, heads, plan.direction).visits()[: plan.layers]:
        layer = together[0].layer
        masks = [_with_first_layer(plan, unit) for unit in together]
        ffn = [_with_first_layer(plan, Unit("ffn", layer, None))]
        yield _sweep(prepared, "choose", masks, 1.0, cached=False)
        yield _sweep(prepared, "check", masks[:1], 1.0, cached=False)
        yield _sweep(prepared, "choose", masks, (heads - 1) / 2, cached=True)
        yield _sweep(prepared, "check", masks[:1], heads - 1, cached=True)
        yield _sweep(prepared, "check", ffn, 1.0, cached=True)


def _nested(prepared: Prepared, plan: SearchPlan, effort: Effort) -> Iterator[Part]:
    """Yield the steps of nested searches: estimates, or every unit alone, then beginnings of the order."""
    visits = plan.visits(effort.groups)
    again = effort.estimates_before(len(visits))
    halves = [half_of(task, "choose") for task in prepared.train]
    if not effort.alone and estimated_before(prepared, halves) is None:
        again |= {0}
    seen: set[int] = set()
    for number, together in enumerate(visits):
        lowest = min(unit.layer for unit in together)
        if number in again:
            whole = Mask(fill=fill_for_all(prepared.options))
            asked = {(index, whole): None for index in range(len(prepared.train))}
            part = estimates_part(prepared, "", "prune", asked)
            yield replace(part, times=most_searches(prepared))
        cached = lowest in seen
        seen.add(lowest)
        if effort.alone and len(together) > 1:
            masks = [_with_first_layer(plan, unit) for unit in together]
            yield _sweep(prepared, "choose", masks, 1.0, cached=cached)
        asked_for = effort.masks(together)
        deepest = _with_first_layer(plan, next(unit for unit in together if unit.layer == lowest))
        together_masks = min(asked_for, masks_together(asked_for))
        yield _sweep(prepared, "check", [deepest] * together_masks, 1.0, cached=cached)
        if further := asked_for - together_masks:
            yield _sweep(prepared, "check", [deepest] * together_masks, further / together_masks, cached=True)


def _with_first_layer(plan: SearchPlan, unit: Unit) -> Mask:
    """Return a candidate's mask: from the first layer up, masks hold units of the layers below."""
    return unit.as_mask() | Mask(heads=frozenset([(0, 0)] if plan.direction == "up" else []))


def _sweep(prepared: Prepared, half: Half, masks: Sequence[Mask], times: float, *, cached: bool) -> Part:
    """Return a step of all searches: every task's documents are in one of its own and, where there are two
    searches of it, in one of all tasks.
    """
    expected = tuple(expected_mask(prepared.options, mask) for mask in masks)
    asked: AskedMasks = {(index, half): expected for index in range(len(prepared.train))}
    part = sweep_part(prepared, "", "prune", asked)
    return replace(part, cached=cached, times=times * most_searches(prepared))
