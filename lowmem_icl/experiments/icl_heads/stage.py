"""The icl-heads stage: do induction heads or function-vector heads carry learning in context? Both rankings
compared, and their top heads removed: from few-shot prompts, and from plain text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores as Answers
from lowmem_icl.experiments.icl_heads import measure
from lowmem_icl.experiments.icl_heads.prompts import (
    evaluation_prompts,
    text_jobs,
    vector_settings,
)
from lowmem_icl.experiments.icl_heads.removals import (
    PERCENTS,
    RANDOM,
    Removal,
    Scores,
    all_removals,
    levels,
)
from lowmem_icl.experiments.induction.stage import InductionResult, head_questions
from lowmem_icl.experiments.patch.prompts import PromptsFound, VectorPrompts, prompts_of
from lowmem_icl.experiments.patch.stage import PatchResult, Setting, function_vector_parts, head_effects
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans, mean_of_tables
from lowmem_icl.session.failures import TEXT
from lowmem_icl.session.part_jobs import Source
from lowmem_icl.session.patch_parts import PatchPart, PromptMeansPart
from lowmem_icl.session.patch_work import patched
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult, stamp
from lowmem_icl.session.work import HeadScoresPart, Part, Work
from lowmem_icl.statistics.bands import LEAST_DRAWS
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tasks.text_windows import SHORTEST_WINDOW, TextWindows

TEXT_DRAWS = LEAST_DRAWS
"""Random draws that are removed from text, whose windows cost more than prompts: as few as have a band."""
OWN_MEANS = "own-mean"
TASK_MEANS = "task-mean"
TEXT_MEANS = "text-mean"

NO_VECTORS = (
    "icl-heads: no task has demonstrations whose answers can be corrupted; heads have no function-vector "
    "score, and nothing is compared"
)
ONE_TASK = f"icl-heads: with one task the mean over tasks is the task's own; only {OWN_MEANS} is measured"
SHORT_CONTEXT = (
    f"icl-heads: the model's context holds fewer than {SHORTEST_WINDOW} tokens; losses in text are not "
    "compared"
)
OWN_PAGE = (
    "icl-heads: losses are of windows of one short page that overlap; their intervals are too narrow. Give a "
    "longer text by --text"
)

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Basis:
    """Both scores of all heads, and the means that stand in heads' place, by task and shot count."""

    scores: Scores
    means: dict[Setting, UnitMeans]


def parts(prepared: Prepared, patch: StageResult | None, induction: StageResult | None) -> list[Part]:
    """Return the passes that score heads, where no other stage has made them, and those that remove heads.

    Which heads these are is not known before; as many are drawn in their place.
    """
    found = prompts_of(prepared)
    settings = vector_settings(found.vectors)
    if not settings:
        return []
    asked = function_vector_parts(prepared, found.vectors) if _vectors_of(patch) is None else []
    if "induction" not in prepared.options.experiments:
        asked.append(prefix_matching_part(prepared))
    shape, rng = (prepared.skeleton.layers, prepared.skeleton.heads), np.random.default_rng(0)
    removals = all_removals(Scores(rng.random(shape), rng.random(shape)), prepared.options.seed)
    if removals:
        asked.append(removal_part(prepared, settings, removals, None))
        asked += _text_parts(prepared.given.text, removals)
    return asked


def prefix_matching_part(prepared: Prepared) -> HeadScoresPart:
    """Return the pass that scores heads on sequences with repeats alone: copying, which takes longer in
    models of large vocabularies, is not asked for.
    """
    questions = replace(head_questions(prepared), unrepeated=())
    return HeadScoresPart("icl-heads-induction", "prefix matching", questions)


def removal_part(
    prepared: Prepared,
    settings: Sequence[VectorPrompts],
    removals: Sequence[Removal],
    means: dict[Setting, UnitMeans] | None,
) -> PatchPart:
    """Return the pass that removes heads from the evaluation prompts of all tasks, by each kind of means in
    turn; before there are means, None.
    """
    changes = (Mask(), *(removal.mask for removal in removals))
    tables = _tables(settings, means)
    prompts = list(evaluation_prompts(prepared, settings))
    jobs = [
        job
        for of_tasks in tables.values()
        for task, of_task in zip(prompts, of_tasks, strict=True)
        for job in task.jobs(changes, of_task)
    ]
    of_prompts = [source for task in prompts for source in task.sources]
    return PatchPart("icl-heads", "heads removed", tuple(jobs), sources=tuple(of_prompts * len(tables)))


def _tables(
    settings: Sequence[VectorPrompts], means: dict[Setting, UnitMeans] | None
) -> dict[str, list[UnitMeans | None]]:
    """Return what stands in heads' place by kind of means, a table per task."""
    own = [None if means is None else means[setting.task, setting.shots] for setting in settings]
    known = [table for table in own if table is not None]
    if len(settings) == 1:
        return {OWN_MEANS: own}
    return {OWN_MEANS: own, TASK_MEANS: [mean_of_tables(known) if known else None] * len(own)}


def _text_parts(text: TextWindows | None, removals: Sequence[Removal]) -> list[Part]:
    """Return the passes over windows of text: their means, and heads removed."""
    if text is None:
        return []
    return [text_means_part(text), text_part(text, text_removals(removals), None)]


def text_means_part(text: TextWindows) -> PromptMeansPart:
    """Return the pass that takes the means of all units over the tokens of the windows."""
    return PromptMeansPart(
        "icl-heads-text-means",
        "means of text",
        (text.windows,),
        ends_only=False,
        sources=(_windows(text),),
    )


def text_part(text: TextWindows, removals: Sequence[Removal], means: UnitMeans | None) -> PatchPart:
    """Return the pass that removes heads from the windows; before there are means, None."""
    changes = (Mask(), *(removal.mask for removal in removals))
    jobs = tuple(text_jobs(text, changes, means))
    return PatchPart("icl-heads-text", "heads removed from text", jobs, sources=_windows(text))


def _windows(text: TextWindows) -> tuple[Source, ...]:
    return tuple(Source(TEXT, f"window {number + 1}") for number in range(len(text.windows)))


def text_removals(removals: Sequence[Removal]) -> list[Removal]:
    """Return the removals that text is read under: of the random draws only some."""
    return [removal for removal in removals if removal.number is None or removal.number <= TEXT_DRAWS]


def run(work: Work, patch: StageResult | None, induction: StageResult | None) -> Iterator[StageResult]:
    """Compare both rankings, then remove their top heads from prompts, then from text; yields after each."""
    prepared = work.prepared
    found = prompts_of(prepared)
    settings = vector_settings(found.vectors)
    notes = found.notes if "patch" not in prepared.options.experiments else ()
    if not settings:
        yield StageResult(warnings=(*notes, NO_VECTORS))
        return
    basis = _basis(work, found, settings, patch, induction)
    text, removals = prepared.given.text, all_removals(basis.scores, prepared.options.seed)
    stamped = stamp(prepared, "icl-heads") | {"ablation": "mean"}
    result = StageResult(
        results=blocks.frame("results", measure.overlap_records(basis.scores), stamped),
        warnings=(*notes, *_notes(prepared, settings)),
        record={"icl_heads": _record(settings, text)},
    )
    yield result
    if not removals:
        return
    prompts = list(evaluation_prompts(prepared, settings))
    removed = _with_bands(
        blocks.frame("results", _removed(work, settings, removals, basis), stamped), stamped
    )
    cut = [f"{of.task.task} ({of.truncated})" for of in prompts if of.truncated]
    if cut:
        sentence = f"icl-heads: evaluation prompts that do not fit the context are left out: {', '.join(cut)}"
        result = replace(result, warnings=(*result.warnings, sentence))
    result = replace(result, results=pl.concat([result.results, removed]))
    yield result
    if text is not None:
        losses = blocks.frame("results", _text_losses(work, text, text_removals(removals)), stamped)
        yield replace(result, results=pl.concat([result.results, _with_bands(losses, stamped)]))


def _basis(
    work: Work,
    found: PromptsFound,
    settings: Sequence[VectorPrompts],
    patch: StageResult | None,
    induction: StageResult | None,
) -> _Basis:
    """Return what heads are ranked by: from the stages that found it, or from passes of its own."""
    shape = work.prepared.skeleton.layers, work.prepared.skeleton.heads
    known = _vectors_of(patch)
    if known is None:
        effects, means = head_effects(work, found.vectors)
        names = [(prompts.task, prompts.shots) for prompts in found.vectors]
        vectors = {name: of[0] for name, of in zip(names, effects, strict=True)}
        tables = dict(zip(names, means, strict=True))
    else:
        vectors, tables = dict(known.vectors), dict(known.end_means)
    prefix_matching = _prefix_matching_of(induction)
    if prefix_matching is None:
        prefix_matching = work.head_scores(prefix_matching_part(work.prepared)).prefix_matching.mean(0)
    by_task = [vectors[setting.task, setting.shots].mean(1) for setting in settings]
    return _Basis(Scores(np.mean(by_task, 0).reshape(shape), prefix_matching), tables)


def _vectors_of(patch: StageResult | None) -> PatchResult | None:
    return patch if isinstance(patch, PatchResult) and patch.vectors else None


def _prefix_matching_of(induction: StageResult | None) -> Values | None:
    return induction.prefix_matching if isinstance(induction, InductionResult) else None


def _removed(
    work: Work, settings: Sequence[VectorPrompts], removals: Sequence[Removal], basis: _Basis
) -> Iterator[blocks.Block]:
    """Yield the records of all tasks, with all heads and without some."""
    prepared = work.prepared
    found = iter(patched(work, removal_part(prepared, settings, removals, basis.means)))
    prompts = list(evaluation_prompts(prepared, settings))
    for kind in _tables(settings, basis.means):
        for task in prompts:
            answers: list[Answers] = [next(found) for _ in task.prompts]
            if not answers:
                continue
            scores = task.scores(answers)
            if kind == OWN_MEANS:
                yield from measure.clean_records(scores)
            yield from measure.removal_blocks(scores, removals, kind)


def _text_losses(work: Work, text: TextWindows, removals: Sequence[Removal]) -> Iterator[blocks.Block]:
    """Yield the records of text, with all heads and without some."""
    (sums,) = work.means(text_means_part(text))
    found = patched(work, text_part(text, removals, sums.means()))
    return measure.text_blocks(np.stack([answers.logprobs for answers in found], 1), removals, TEXT_MEANS)


def _with_bands(results: pl.DataFrame, stamped: blocks.Block) -> pl.DataFrame:
    """Return records with their means over tasks, and bands of the random draws."""
    results = pl.concat([results, over_tasks(results)])
    drawn = results.filter(pl.col("method") == RANDOM).iter_rows(named=True)
    return pl.concat([results, blocks.frame("results", measure.band_records(list(drawn)), stamped)])


def _notes(prepared: Prepared, settings: Sequence[VectorPrompts]) -> Iterator[str]:
    """Yield sentences on what is not measured."""
    heads = prepared.skeleton.layers * prepared.skeleton.heads
    if few := [str(percent) for percent in PERCENTS if percent not in levels(heads)]:
        yield f"icl-heads: {', '.join(few)} % of {heads} heads are less than one; these levels are left out"
    if len(settings) == 1:
        yield ONE_TASK
    if prepared.given.text is None:
        yield SHORT_CONTEXT
    elif prepared.given.text.overlap:
        yield OWN_PAGE


def _record(settings: Sequence[VectorPrompts], text: TextWindows | None) -> dict[str, Any]:
    return {
        "tasks": [setting.task for setting in settings],
        "shots": settings[0].shots,
        "text": None if text is None else text.as_record(),
    }
