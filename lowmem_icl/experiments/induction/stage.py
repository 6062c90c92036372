"""The induction stage: heads scored on random sequences, then the top ones removed together, compared with
random draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.copying import REFERENCE_COPYING, CopyingForm
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores
from lowmem_icl.experiments.ablate.measure import unit_drops
from lowmem_icl.experiments.evaluate import measure as evaluation
from lowmem_icl.experiments.induction import measure
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.options import RunOptions
from lowmem_icl.rows import stem_of
from lowmem_icl.session.chunks import joined, masked_chunk
from lowmem_icl.session.fills import expected_mask, fill_for_all, means_parts
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import MaskResult, Rankings, StageResult, rankings_of, stamp
from lowmem_icl.session.work import HeadScoresPart, Part, SweepPart, Work
from lowmem_icl.statistics.intervals import CHANGE, mean_intervals
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.schema import ACCURACIES
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask

DRAWN_DOCUMENTS = slice(0, 32)
"""Documents of every task that induction heads and all random draws compared with them are removed for."""
MORE_DOCUMENTS = slice(32, 512)
"""Those that only induction heads are removed for."""
SEQUENCES_NAME = "random-sequences"

NO_HEADS = f"induction: no head reaches a prefix-matching score of {measure.HEAD_SCORE}; none is removed"
NO_DEMONSTRATIONS = "induction: no task has demonstrations; induction heads are not removed"
NO_DRAWS = "induction: their layers have too few other heads for a random draw; they are removed without one"


@dataclass(frozen=True, kw_only=True)
class InductionResult(StageResult):
    """What the stage finds; `prefix_matching` [L, H]: the mean score of every head; None before there is."""

    prefix_matching: NDArray[np.float64] | None = None


def copying_form(options: RunOptions) -> CopyingForm:
    """Return how copying is scored."""
    if options.protocol_flags.copying_of_own_token:
        return REFERENCE_COPYING
    through = options.copying_with
    return CopyingForm("norm" in through, "softmax" in through, "bias" in through)


def head_questions(prepared: Prepared) -> HeadQuestions:
    """Return the rows that heads are scored on."""
    options = prepared.options
    sequences = prepared.random_sequences
    return HeadQuestions(
        tuple(stem_of(tokens.tolist()) for tokens in sequences.repeated),
        tuple(stem_of(tokens.tolist()) for tokens in sequences.unrepeated),
        sequences.base_tokens,
        copying_form(options),
        spurious=options.protocol_flags.spurious_prefix_entries,
    )


def parts(
    prepared: Prepared,
    importance: StageResult | None,
    ablate: StageResult | None,
    prune: StageResult | None,
) -> list[Part]:
    """Return the pass that scores heads, and the sweep without the induction heads that it is expected to
    find.

    Which heads these are is not known before; they lie beyond the middle as often as not.
    """
    scoring = scores_part(head_questions(prepared))
    if not _tasks_with_demonstrations(prepared):
        return [scoring]
    middle = expected_mask(prepared.options, Mask(frozenset([(prepared.skeleton.layers // 2, 0)])))
    removal = removal_part(prepared, [Mask(), *[middle] * (measure.RANDOM_DRAWS + 1)])
    return [scoring, *means_parts(prepared), removal]


def scores_part(questions: HeadQuestions) -> HeadScoresPart:
    """Return the pass that scores heads."""
    return HeadScoresPart("induction", "induction", questions)


def removal_part(prepared: Prepared, masks: Sequence[Mask]) -> SweepPart:
    """Return the sweep of some documents under all masks, and of more under the first two: clean, and
    induction heads.
    """
    tasks = _tasks_with_demonstrations(prepared)
    jobs = masked_chunk(tasks, [masks] * len(tasks), DRAWN_DOCUMENTS)
    more = masked_chunk(tasks, [masks[:2]] * len(tasks), MORE_DOCUMENTS)
    return SweepPart("induction-evaluate", "induction heads removed", jobs + more)


def _tasks_with_demonstrations(prepared: Prepared) -> list[TaskRows]:
    return [task for task in prepared.evaluate if task.shots > 0]


def run(
    work: Work,
    importance: StageResult | None,
    ablate: StageResult | None,
    prune: StageResult | None,
) -> Iterator[InductionResult]:
    """Score all heads; compare them with all rankings and masks there are; remove the induction heads."""
    prepared = work.prepared
    questions = head_questions(prepared)
    scores = work.head_scores(scores_part(questions))
    found = [
        *_score_blocks(questions, scores),
        *_comparisons(
            scores, rankings_of(importance, ablate), prune.masks if prune else (), prepared.options.seed
        ),
    ]
    results = blocks.frame("results", found, stamp(prepared, "induction"))
    record = {"induction": prepared.random_sequences.as_record()}
    scored = InductionResult(results=results, record=record, prefix_matching=scores.prefix_matching.mean(0))
    yield scored
    removed = _remove_heads(work, scores)
    yield replace(
        scored,
        results=pl.concat([results, removed.results]),
        masks=removed.masks,
        warnings=removed.warnings,
    )


def _score_blocks(questions: HeadQuestions, scores: HeadScores) -> Iterator[blocks.Block]:
    form = questions.form
    through = {"norm": form.final_norm, "softmax": form.softmax, "bias": form.bias}
    copying = "+".join(["output", *(name for name, is_used in through.items() if is_used)])
    methods = {
        "prefix_matching": "reference" if questions.spurious else "exact",
        "previous_token": "exact",
        "duplicate_token": "exact",
        "copying": "reference" if form.own_token else copying,
    }
    for name, method in methods.items():
        yield from measure.score_blocks(name, method, getattr(scores, name))
    yield measure.weight_block("copying_eigenvalues", "weights", scores.copying_eigenvalues)


def _comparisons(
    scores: HeadScores, rankings: Rankings, masks: Sequence[MaskResult], seed: int
) -> Iterator[blocks.Block]:
    """Yield how far important heads are induction heads, and what rankings and masks leave of capacities."""
    yield from measure.important_heads_records(scores.prefix_matching.mean(0), rankings.heads)
    for capacity in measure.CAPACITIES:
        means = getattr(scores, capacity).mean(0)
        yield from measure.capacity_blocks(capacity, means, rankings.heads, seed)
        for made in masks:
            yield measure.capacity_of_mask(capacity, means, made.mask) | {
                "task": made.task,
                "shots": made.shots,
                "method": made.method,
                "mask": made.name,
                "mask_task": made.task,
                "mask_shots": made.shots,
            }


@dataclass(frozen=True)
class _Removal:
    """One way to remove heads: the mask's name, the mask, and how it was made."""

    name: str
    mask: Mask
    method: str | None
    seed: int | None

    @property
    def fields(self) -> dict[str, Any]:
        return {"procedure": "removal", "method": self.method, "seed": self.seed}


def _remove_heads(work: Work, scores: HeadScores) -> StageResult:
    """Remove the top induction heads together, and as many others of the same layers, many times over."""
    prepared, seed = work.prepared, work.prepared.options.seed
    prefix_matching, previous_token = scores.prefix_matching.mean(0), scores.previous_token.mean(0)
    heads = measure.top_induction_heads(prefix_matching)
    fill = fill_for_all(prepared.options)
    if not heads.heads:
        return StageResult(warnings=(NO_HEADS,))
    if not _tasks_with_demonstrations(prepared):
        return StageResult(warnings=(NO_DEMONSTRATIONS,))
    draws = measure.random_draws(heads, prefix_matching, previous_token, seed)
    removals = [
        _Removal(CLEAN, Mask(), None, None),
        _Removal(measure.HEADS_MASK, heads.filled(fill), "induction", seed),
        *(
            _Removal(f"{measure.RANDOM_MASK}-{number:02d}", mask.filled(fill), "random", seed)
            for number, mask in enumerate(draws, start=1)
        ),
    ]
    results = blocks.frame("results", _removal_records(work, removals), stamp(prepared, "induction"))
    results = pl.concat([results, over_tasks(results)])
    drawn = [record for record in results.iter_rows(named=True) if record["method"] == "random"]
    bands = blocks.frame("results", measure.band_records(drawn), stamp(prepared, "induction"))
    clean = _accuracies(results, CLEAN)
    masks = tuple(
        MaskResult(
            removal.name,
            removal.mask,
            str(removal.method),
            SEQUENCES_NAME,
            0,
            scores.prefix_matching.shape[0],
            seed,
            {"split": "evaluation", "acc": _accuracies(results, removal.name), "acc_clean": clean},
        )
        for removal in removals[1:]
    )
    return StageResult(
        results=pl.concat([results, bands]), masks=masks, warnings=() if draws else (NO_DRAWS,)
    )


def _removal_records(work: Work, removals: Sequence[_Removal]) -> Iterator[blocks.Block]:
    """Yield the records of all masks; the clean run and induction heads have more documents than the random
    draws.
    """
    prepared, tasks = work.prepared, _tasks_with_demonstrations(work.prepared)
    swept = work.sweep(removal_part(prepared, [removal.mask for removal in removals]))
    some, more = swept[: len(tasks)], iter(swept[len(tasks) :])
    for task, score in zip(tasks, some, strict=True):
        both = Scores(score.logprobs[:2], score.greedy[:2], score.scored[:2])
        if len(task.documents) > MORE_DOCUMENTS.start:
            both = joined([both, next(more)])
        everything = prepared.pack(task, slice(0, MORE_DOCUMENTS.stop))
        yield from _mask_records(everything, removals[:2], both)
        if len(removals) > 2:
            few = prepared.pack(task, DRAWN_DOCUMENTS)
            for record in _mask_records(few, removals, score):
                if record["method"] == "random":
                    yield record


def _mask_records(
    packed: PackedTask, removals: Sequence[_Removal], scores: Scores
) -> Iterator[dict[str, Any]]:
    """Yield the records under each mask, with the accuracy that it costs on the same documents."""
    drops = unit_drops(packed, scores.logprobs, scores.greedy)
    lost = mean_intervals(drops.accuracy, drops.accuracy_clusters, CHANGE)
    for index, removal in enumerate(removals):
        under = evaluation.MaskScores(
            removal.name, removal.mask, scores.logprobs[index], scores.greedy[index]
        )
        record: dict[str, Any] = {}
        for block in evaluation.evaluation_records(packed, under):
            record = {**block, **removal.fields}
            yield record
        if index:
            interval = {name: float(values[index - 1]) for name, values in lost._asdict().items()}
            yield record | {"metric": "acc_drop", "chance": None} | interval


def _accuracies(results: pl.DataFrame, mask: str) -> Mapping[str, float]:
    named = results.filter((pl.col("mask") == mask) & pl.col("metric").is_in(ACCURACIES))
    return {
        f"{record['task']}-{record['shots']}shot": record["value"] for record in named.iter_rows(named=True)
    }
