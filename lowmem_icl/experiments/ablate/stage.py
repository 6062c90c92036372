"""The ablate stage: documents in chunks, each without every unit asked for, until work or time is over."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.ablate import claims, measure
from lowmem_icl.experiments.ablate.differences import (
    DropDifferences,
    drop_differences,
    in_context_blocks,
    label_blocks,
)
from lowmem_icl.experiments.ablate.sweeps import Pass, Selection, passes, scored_so_far, units_of
from lowmem_icl.experiments.importance.stage import ImportanceResult, ranked_settings
from lowmem_icl.masks.rankings import RankingKey, mean_of_ranks, with_ties_broken
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.fills import means_parts
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import Rankings, StageResult, Values, stamp
from lowmem_icl.session.work import OutOfTime, Part, Work
from lowmem_icl.statistics.resampling import DocumentRanking, DocumentScores
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tasks.loading import TaskRows

METHOD = "ablation"
ICL_EFFECT = "icl_effect"
UNIT_PROCEDURES = ("single", "icl-effect", "label-effect")
# Of ablate's numbers about units, those whose aggregate counts all tasks' documents and is no mean.
NOT_AVERAGED = r"q_value$|^documents_"


def parts(prepared: Prepared, importance: ImportanceResult | None) -> list[Part]:
    """Return the sweeps of the training documents, chunk by chunk, under every unit asked for alone.

    With right labels, then, where they are asked for, with shuffled ones.
    """
    sweeps = (part for each in passes(prepared, importance) for part in each.parts)
    return [*means_parts(prepared), *sweeps]


def notes(prepared: Prepared) -> tuple[str, ...]:
    """Return a sentence for a plan: how many units are not ablated exactly."""
    options, n_units = prepared.options, len(units_of(prepared))
    if options.screen is None or options.resolved_exact >= n_units:
        return ()
    return (
        f"ablate: {options.resolved_exact:,} of {n_units:,} units are ablated exactly per task and shots, "
        "all others keep their estimates",
    )


def expected(prepared: Prepared) -> StageResult:
    """Return rankings by arbitrary scores, of what there will be exact rankings of."""
    rng, skeleton = np.random.default_rng(1), prepared.skeleton
    settings = [setting for setting in ranked_settings(prepared) if setting[0] != AGGREGATE]
    keys = [RankingKey(*setting, METHOD) for setting in settings]
    if prepared.options.screen is not None and prepared.options.resolved_exact < len(units_of(prepared)):
        # Which units are exact differs between tasks and leaves out heads of every one.
        return StageResult()
    shown = [
        RankingKey(name, shots, ICL_EFFECT) for name, shots in settings if shots and (name, 0) in settings
    ]
    return StageResult(
        rankings=Rankings(
            {key: rng.random((skeleton.layers, skeleton.heads)) for key in keys + shown},
            {key: rng.random(skeleton.layers) for key in keys},
        )
    )


def run(work: Work, importance: ImportanceResult | None) -> Iterator[StageResult]:
    """Remove every unit asked for alone, on the training documents; yields whenever there is more to show."""
    if work.prepared.options.screen is not None and importance is None:
        # What screens is not there yet.
        raise OutOfTime
    every = passes(work.prepared, importance)
    done: list[list[list[Scores]]] = [[[] for _ in each.tasks] for each in every]
    steps = [(each, chunks, part) for each, chunks in zip(every, done, strict=True) for part in each.parts]
    for number, (each, chunks, part) in enumerate(steps):
        try:
            scores = work.sweep(part)
        except OutOfTime:
            sentence = (
                f"ablate: the time was over after {each.documents_before(part)}; the same command continues"
            )
            yield replace(_result(work.prepared, every, done), unfinished=sentence)
            return
        for job, score in zip(part.jobs, scores, strict=True):
            chunks[next(index for index, task in enumerate(each.swept) if task is job.task)].append(score)
        is_new = number + 1 < len(steps) and not work.parts.has(steps[number + 1][2].name)
        if is_new and work.wants_results():
            yield _result(work.prepared, every, done)
    yield _result(work.prepared, every, done)


@dataclass(frozen=True, eq=False)
class DropsOfUnits:
    """What the units of one task that were removed cost, of the documents that are scored so far."""

    own: claims.ExactDrops
    drops: measure.UnitDrops


def removed_units(
    prepared: Prepared, each: Pass, done: Sequence[Sequence[Scores]]
) -> Iterator[tuple[TaskRows, Selection, DropsOfUnits | None]]:
    """Yield every task of a pass and what its units cost; None before its first document is scored."""
    for task, swept, selection, chunks in zip(each.tasks, each.swept, each.selected, done, strict=True):
        if not chunks:
            yield task, selection, None
            continue
        scored, scores = scored_so_far(task, swept, chunks)
        drops = measure.unit_drops(prepared.pack(scored), scores.logprobs, scores.greedy)
        own = claims.ExactDrops.of_units(scored, selection.exact, drops)
        yield task, selection, DropsOfUnits(own, drops)


def _result(
    prepared: Prepared, every: Sequence[Pass], done: Sequence[Sequence[Sequence[Scores]]]
) -> StageResult:
    """Return what is scored so far as tables and rankings, with estimates for all other units."""
    units = units_of(prepared)
    found: list[blocks.Block] = []
    effects: list[blocks.Block] = []
    exact_drops: list[claims.ExactDrops] = []
    rankings = Rankings()
    for task, selection, removed in removed_units(prepared, every[0], done[0]):
        estimated = np.arange(len(units))
        if removed is not None:
            own, exact = removed.own, [units[index] for index in selection.exact]
            found += measure.drop_blocks(own.task, exact, removed.drops)
            effects += measure.effect_blocks(own.task, exact, removed.drops)
            exact_drops.append(own)
            found += claims.top_drop_records(units, own)
            found += _agreement(selection, own.task, own.gold.mean(1))
            rankings |= _rankings(prepared, selection, own, removed.drops)
            estimated = np.setdiff1d(estimated, selection.exact)
        elif selection.estimates is not None:
            rankings |= _head_ranking(prepared, task, METHOD, selection.estimates.value)
        if selection.estimates is not None:
            found += measure.estimate_blocks(task, units, estimated, selection.estimates)
    found += claims.claim_blocks(units, exact_drops)
    found += claims.listed_top_records(units, exact_drops)
    in_context = _in_context(exact_drops)
    found += in_context_blocks(units, in_context)
    if len(every) > 1:
        controls = [removed.own for _, _, removed in removed_units(prepared, every[1], done[1]) if removed]
        found += label_blocks(units, _about_labels(exact_drops, controls))
    results = blocks.frame("results", found, stamp(prepared, "ablate"))
    return StageResult(
        results=pl.concat([results, _means(results)]),
        effects=blocks.frame("effects", effects),
        rankings=rankings | _in_context_rankings(prepared, in_context),
        warnings=_notes(prepared),
    )


def _notes(prepared: Prepared) -> tuple[str, ...]:
    """Return why tasks have no controls, which evaluate says where it is asked for."""
    said_already = "evaluate" in prepared.options.experiments
    return () if said_already or not prepared.options.label_drops else prepared.notes


def _means(results: pl.DataFrame) -> pl.DataFrame:
    """Return the means over tasks of units' drops and their differences, and of how far estimates agree."""
    is_unit_record = pl.col("procedure").is_in(UNIT_PROCEDURES) & ~pl.col("metric").str.contains(NOT_AVERAGED)
    per_task = results.filter(is_unit_record & (pl.col("task") != AGGREGATE)).with_columns(
        method=pl.lit(METHOD)
    )
    # Which tasks there are differs between shot counts.
    means = pl.concat(
        [results.clear()]
        + [over_tasks(members) for _, members in per_task.group_by("procedure", "shots", maintain_order=True)]
    )
    # A mean that has an estimate in it is an estimate.
    method = pl.when(pl.col("exact")).then(pl.lit(METHOD)).otherwise(pl.lit("attribution"))
    agreement = results.filter(pl.col("procedure") == "agreement")
    return pl.concat(
        [means.with_columns(method=method)]
        + [over_tasks(members) for _, members in agreement.group_by("shots", maintain_order=True)]
    )


def _agreement(selection: Selection, task: TaskRows, exact_means: Values) -> Iterator[blocks.Block]:
    """Yield how far a task's estimates agree with its exact drops, of all exact units and of those that
    chance picked.
    """
    if selection.estimates is None:
        return
    exact = selection.estimates.value.copy()
    exact[selection.exact] = exact_means
    compared = {"attribution": selection.exact, "attribution-drawn": selection.drawn}
    yield from measure.agreement_records(task, selection.estimates.value, exact, compared)


def _rankings(
    prepared: Prepared, selection: Selection, own: claims.ExactDrops, drops: measure.UnitDrops
) -> Rankings:
    """Return a task's rankings: of its heads, by estimates where none was removed, and of its FFNs."""
    skeleton, task = prepared.skeleton, own.task
    values = np.full(len(units_of(prepared)), np.nan)
    if selection.estimates is not None:
        values = selection.estimates.value.copy()
    values[selection.exact] = own.gold.mean(1)
    rankings = _head_ranking(prepared, task, METHOD, values)
    if _has_all_heads(prepared, own.indices):
        rankings |= _document_ranking(prepared, task, METHOD, own.gold, task.clusters)
    ffns = skeleton.layers * skeleton.heads + np.arange(skeleton.layers)
    if len(np.intersect1d(selection.exact, ffns)) == skeleton.layers:
        # The oracle: what removing each FFN alone costs in accuracy, ties told apart by probability.
        at = np.searchsorted(selection.exact, ffns)
        ties = drops.by_document["gold_prob" if "gold_prob" in own.others else "gold_logprob"]
        scores = with_ties_broken(drops.accuracy.mean(1)[at], ties.mean(1)[at])
        rankings |= Rankings(ffns={RankingKey(task.task, task.shots, METHOD): scores})
    return rankings


def _head_ranking(prepared: Prepared, task: TaskRows, method: str, values: Values) -> Rankings:
    """Return a task's ranking of heads from values of all units [U]; none where some are missing."""
    skeleton = prepared.skeleton
    heads = values[: skeleton.layers * skeleton.heads]
    if not np.isfinite(heads).all():
        return Rankings()
    return Rankings(
        {RankingKey(task.task, task.shots, method): heads.reshape(skeleton.layers, skeleton.heads)}
    )


def _document_ranking(
    prepared: Prepared, task: TaskRows, method: str, values: Values, clusters: Sequence[str]
) -> Rankings:
    """Return what each document adds to a ranking of heads, from values [U, N] of units of which all heads
    come first.
    """
    heads = prepared.skeleton.layers * prepared.skeleton.heads
    scores = DocumentScores.of_mean(task.task, values[:heads].T.astype(np.float32), clusters)
    return Rankings(documents={RankingKey(task.task, task.shots, method): DocumentRanking((scores,))})


def _has_all_heads(prepared: Prepared, indices: NDArray[np.int64]) -> bool:
    heads = prepared.skeleton.layers * prepared.skeleton.heads
    return np.array_equal(indices[:heads], np.arange(heads))


def _in_context(drops: Sequence[claims.ExactDrops]) -> list[DropDifferences]:
    """Return the in-context effects at every shot count against none."""
    alone = {own.task.task: own for own in drops if own.task.shots == 0}
    pairs = [
        drop_differences(own, alone[own.task.task])
        for own in drops
        if own.task.shots and own.task.task in alone
    ]
    return [effects for effects in pairs if effects is not None]


def _about_labels(
    drops: Sequence[claims.ExactDrops], controls: Sequence[claims.ExactDrops]
) -> list[DropDifferences]:
    """Return how much larger drops are with right labels than in every control."""
    right = {(own.task.task, own.task.shots): own for own in drops}
    pairs = [drop_differences(right[other.task.task, other.task.shots], other) for other in controls]
    return [effects for effects in pairs if effects is not None]


def _in_context_rankings(prepared: Prepared, effects: Sequence[DropDifferences]) -> Rankings:
    """Return the rankings of heads by their in-context effects, of every task and of all tasks together."""
    rankings = Rankings()
    by_shots: dict[int, list[RankingKey]] = {}
    for own in effects:
        if not _has_all_heads(prepared, own.indices):
            continue
        rankings |= _document_ranking(prepared, own.task, ICL_EFFECT, own.gold, own.clusters)
        rankings |= _head_ranking(prepared, own.task, ICL_EFFECT, own.gold.mean(1))
        if in_domain(own.task.task):
            by_shots.setdefault(own.task.shots, []).append(
                RankingKey(own.task.task, own.task.shots, ICL_EFFECT)
            )
    for shots, keys in by_shots.items():
        if len(keys) > 1:
            rankings |= _aggregate_ranking(rankings, shots, keys)
    return rankings


def _aggregate_ranking(rankings: Rankings, shots: int, keys: Sequence[RankingKey]) -> Rankings:
    key = RankingKey(AGGREGATE, shots, ICL_EFFECT)
    members = itertools.chain.from_iterable(rankings.documents[member].members for member in keys)
    return Rankings(
        {key: mean_of_ranks([rankings.heads[member] for member in keys])},
        documents={key: DocumentRanking(tuple(members))},
    )
