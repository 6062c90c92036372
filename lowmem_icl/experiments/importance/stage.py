"""The importance stage: heads and FFNs of all tasks scored by their gradients, on the training documents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.experiments.importance import measure
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey, mean_of_normalised, mean_of_ranks, mean_of_scores
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.fills import fill_for, means_parts
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import Rankings, StageResult, Values, stamp
from lowmem_icl.session.work import GradientsPart, Part, Work
from lowmem_icl.statistics.resampling import DocumentRanking, DocumentScores
from lowmem_icl.tables import blocks
from lowmem_icl.tasks.packing import PackedTask

GRADIENT = "gradient"
ATTRIBUTION = "attribution"


@dataclass(frozen=True, kw_only=True)
class ImportanceResult(StageResult):
    """What the stage finds; `attribution` [N, U] by document: the estimated drops of all heads, then all
    FFNs.
    """

    attribution: Mapping[tuple[str, int], Values] = field(default_factory=dict)


def parts(prepared: Prepared) -> list[Part]:
    """Return the one pass forward and back over all training documents, and what it needs before."""
    return [*means_parts(prepared), gradients_part(prepared)]


def gradients_part(prepared: Prepared) -> GradientsPart:
    """Return the pass forward and back; its estimates are of what stands in removed units' place."""
    tasks, options = prepared.importance, prepared.options
    whole = tuple(Mask(fill=fill_for(options, task.task, task.shots)) for task in tasks)
    return GradientsPart("importance", "importance", tasks, whole)


def run(work: Work) -> Iterator[ImportanceResult]:
    """Score heads and FFNs of every task, and of all tasks together at every shot count."""
    prepared = work.prepared
    part = gradients_part(prepared)
    tasks = [prepared.pack(task) for task in prepared.importance]
    scores = [
        scores_of(prepared, task, gradients)
        for task, gradients in zip(tasks, work.gradients(part), strict=True)
    ]
    found: list[blocks.Block] = []
    for task, score in zip(tasks, scores, strict=True):
        found += measure.importance_blocks(task, score)
    found += _aggregate_blocks(tasks, scores)
    by_task = _task_rankings(tasks, scores)
    yield ImportanceResult(
        results=blocks.frame("results", found, stamp(prepared, "importance")),
        rankings=by_task | _aggregate_rankings(prepared, tasks, scores),
        attribution={
            (task.task.task, task.task.shots): unit_estimates(score)
            for task, score in zip(tasks, scores, strict=True)
        },
    )


def scores_of(prepared: Prepared, task: PackedTask, gradients: UnitGradients) -> measure.Importance:
    """Return the scores of a task from the unit gradients of its documents."""
    by_answer_tokens = prepared.options.protocol_flags.last_layer_by_continuation
    return measure.importance(task, gradients, last_layer_by_continuation=by_answer_tokens)


def unit_estimates(scores: measure.Importance) -> Values:
    """Return the estimated drop of every document without every unit, [N, U]: all heads, then all FFNs."""
    heads = scores.attribution_heads
    return np.concatenate([heads.reshape(len(heads), -1), scores.attribution_ffns], axis=1)


def expected(prepared: Prepared) -> ImportanceResult:
    """Return rankings by arbitrary scores, of the tasks and shot counts that there will be rankings of."""
    rng, skeleton = np.random.default_rng(0), prepared.skeleton
    heads: dict[RankingKey, Values] = {}
    ffns: dict[RankingKey, Values] = {}
    for name, shots in ranked_settings(prepared):
        for method in (GRADIENT, ATTRIBUTION) if name != AGGREGATE else (GRADIENT,):
            key = RankingKey(name, shots, method)
            heads[key], ffns[key] = rng.random((skeleton.layers, skeleton.heads)), rng.random(skeleton.layers)
    return ImportanceResult(rankings=Rankings(heads, ffns))


def ranked_settings(prepared: Prepared) -> list[tuple[str, int]]:
    """Return every task and shot count, and all tasks together at the shot counts where there are two to be
    ranked.
    """
    settings = [(task.task, task.shots) for task in prepared.train]
    for shots in prepared.options.resolved_shots:
        if sum(in_domain(name) for name, count in settings if count == shots and name != AGGREGATE) > 1:
            settings.append((AGGREGATE, shots))
    return settings


def _task_rankings(tasks: Sequence[PackedTask], scores: Sequence[measure.Importance]) -> Rankings:
    heads: dict[RankingKey, Values] = {}
    ffns: dict[RankingKey, Values] = {}
    documents: dict[RankingKey, DocumentRanking] = {}
    for task, score in zip(tasks, scores, strict=True):
        name, shots = task.task.task, task.task.shots
        gradient, attribution = (RankingKey(name, shots, method) for method in (GRADIENT, ATTRIBUTION))
        heads[gradient], ffns[gradient] = score.gradient_heads, score.gradient_ffns
        heads[attribution] = score.attribution_heads.mean(0)
        documents[gradient] = DocumentRanking((score.head_documents,))
        flat = score.attribution_heads.reshape(len(score.attribution_heads), -1)
        documents[attribution] = DocumentRanking((DocumentScores.of_mean(name, flat, task.task.clusters),))
    return Rankings(heads, ffns, documents)


def _by_shots(
    tasks: Sequence[PackedTask], scores: Sequence[measure.Importance]
) -> Mapping[int, list[tuple[PackedTask, measure.Importance]]]:
    """Return, for each shot count that two tasks have, all that count in a mean over tasks."""
    groups: dict[int, list[tuple[PackedTask, measure.Importance]]] = {}
    for task, score in zip(tasks, scores, strict=True):
        if in_domain(task.task.task):
            groups.setdefault(task.task.shots, []).append((task, score))
    return {shots: members for shots, members in groups.items() if len(members) > 1}


def _aggregate_blocks(
    tasks: Sequence[PackedTask], scores: Sequence[measure.Importance]
) -> Iterator[blocks.Block]:
    """Yield all tasks' scores at every shot count, combined in three ways."""
    for shots, members in _by_shots(tasks, scores).items():
        base = {
            "task": AGGREGATE,
            "shots": shots,
            "split": "train",
            "documents": sum(len(task.task.documents) for task, _ in members),
        }
        for metric, combine in (
            ("gradient", mean_of_scores),
            ("gradient_rank", mean_of_ranks),
            ("gradient_normalised", mean_of_normalised),
        ):
            heads, ffns = (
                combine([getattr(score, name) for _, score in members])
                for name in ("gradient_heads", "gradient_ffns")
            )
            yield from measure.unit_blocks(base, metric, {"value": heads}, {"value": ffns})


def _aggregate_rankings(
    prepared: Prepared, tasks: Sequence[PackedTask], scores: Sequence[measure.Importance]
) -> Rankings:
    """Return the rankings for all tasks: means of ranks or, by protocol, of raw scores."""
    raw = prepared.options.protocol_flags.aggregate_of_raw_scores
    combine = mean_of_scores if raw else mean_of_ranks
    heads: dict[RankingKey, Values] = {}
    ffns: dict[RankingKey, Values] = {}
    documents: dict[RankingKey, DocumentRanking] = {}
    for shots, members in _by_shots(tasks, scores).items():
        key = RankingKey(AGGREGATE, shots, GRADIENT)
        heads[key] = combine([score.gradient_heads for _, score in members])
        ffns[key] = combine([score.gradient_ffns for _, score in members])
        documents[key] = DocumentRanking(
            tuple(score.head_documents for _, score in members), "scores" if raw else "ranks"
        )
    return Rankings(heads, ffns, documents)
