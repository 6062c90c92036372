"""The prune stage: curves by rankings, then greedy searches, then their masks on other tasks."""

from collections.abc import Iterator
from dataclasses import replace

import polars as pl

from lowmem_icl.experiments.ablate.sweeps import units_of
from lowmem_icl.experiments.evaluate import stage as evaluate
from lowmem_icl.experiments.importance.stage import ImportanceResult
from lowmem_icl.experiments.prune import certify, curves, greedy, greedy_transfer
from lowmem_icl.experiments.prune.judging import clean_evaluation
from lowmem_icl.experiments.prune.settings import effort_of, search_plan
from lowmem_icl.session.fills import means_parts
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import Rankings, StageResult, rankings_of
from lowmem_icl.session.work import Part, Work


def parts(prepared: Prepared, importance: ImportanceResult | None, ablate: StageResult | None) -> list[Part]:
    """Return the work of curves, and what searches are expected to ask for."""
    return [
        *means_parts(prepared),
        *evaluate.clean_parts(prepared, {}),
        *curves.parts(prepared, _curve_rankings(prepared, importance, ablate)),
        *greedy.parts(prepared),
        *greedy_transfer.expected_parts(prepared),
    ]


def notes(prepared: Prepared) -> tuple[str, ...]:
    """Return sentences for a plan: how closely nested searches look, how many documents certificates need,
    and where there are too few.
    """
    plan = search_plan(prepared)
    effort, need = effort_of(prepared, plan), certify.need(prepared)
    closely = [] if effort is None else [f"prune: {effort.in_words(plan)}"]
    return (*closely, *([need] if need else []), *certify.notes(prepared))


def run_early(work: Work, importance: ImportanceResult) -> Iterator[StageResult]:
    """Draw the curves before the ablations, where these do not change them: where only some units are ablated
    exactly, nothing is ranked by that.
    """
    if _curves_come_first(work.prepared):
        rankings = _curve_rankings(work.prepared, importance, None)
        yield curves.run(work, rankings, clean_evaluation(work))


def is_early(prepared: Prepared, part: Part) -> bool:
    """Tell whether a part is done before the ablations."""
    return part.name.startswith(curves.PART) and _curves_come_first(prepared)


def _curves_come_first(prepared: Prepared) -> bool:
    options = prepared.options
    is_screened = options.screen is not None and options.resolved_exact < len(units_of(prepared))
    return is_screened and {"importance", "ablate"} <= set(options.experiments)


def _curve_rankings(
    prepared: Prepared, importance: ImportanceResult | None, ablate: StageResult | None
) -> Rankings:
    """Return what curves remove units by; also where screened ablations happen to hold all FFNs of a task,
    the curves that were drawn before them stay.
    """
    return rankings_of(importance, None if _curves_come_first(prepared) else ablate)


def run(work: Work, importance: ImportanceResult | None, ablate: StageResult | None) -> Iterator[StageResult]:
    """Prune by rankings and by greedy search; yields when the curves are there, which come first, when the
    searches have ended, and when their masks are judged on other tasks.
    """
    rankings = _curve_rankings(work.prepared, importance, ablate)
    clean = clean_evaluation(work)
    curved = curves.run(work, rankings, clean)
    yield curved
    searched = greedy.run(work, importance, ablate, clean)
    found = StageResult(
        results=pl.concat([curved.results, searched.results]),
        effects=pl.concat([curved.effects, searched.effects]),
        masks=curved.masks + searched.masks,
        warnings=curved.warnings + searched.warnings,
        record=searched.record,
    )
    yield found
    elsewhere = greedy_transfer.transferred(work, searched.masks)
    if len(elsewhere):
        yield replace(found, results=pl.concat([found.results, elsewhere]))
