"""The ablate stage: chunks of documents, each under all units asked for, until the work or its time is over."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.ablate import claims as unit_claims
from lowmem_icl.experiments.ablate import measure as ablate
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.masks.rankings import RankingKey, mean_of_ranks, with_ties_broken
from lowmem_icl.model.families import Skeleton
from lowmem_icl.session.work import (
    AGGREGATE,
    Gathered,
    OutOfTime,
    Row,
    Work,
    doubling_chunks,
    joined,
    most_documents,
)
from lowmem_icl.statistics.resampling import DocumentRanking, DocumentScores
from lowmem_icl.tasks.loading import Document, TaskRows
from lowmem_icl.tasks.sources import in_domain

ICL_EFFECT = "icl_effect"


@dataclass(frozen=True, eq=False)
class _Choice:
    """Which units of one task and shot count are ablated exactly, in the order of the masks, and what is known of all.

    estimates, errors: [U] over all units, None where nothing is screened; drawn: places of the units that chance chose.
    """

    exact: NDArray[np.int64]
    drawn: NDArray[np.int64]
    estimates: NDArray[np.float64] | None = None
    errors: NDArray[np.float64] | None = None


def run_ablate(work: Work, gathered: Gathered) -> Iterator[None]:
    """Remove every unit asked for alone, on the training documents; yields whenever there is more to show."""
    skeleton, tasks = work.model.skeleton, work.prepared.train
    units = ablate.ablated_units(skeleton.layers, skeleton.heads)
    choices = [_choice(work, gathered, task, units) for task in tasks]
    masks = [(Mask(), *(units[place].as_mask() for place in choice.exact)) for choice in choices]
    done: list[list[Scores]] = [[] for _ in tasks]
    chunks = doubling_chunks(most_documents(tasks))
    for number, chunk in enumerate(chunks):
        label = f"ablate, chunk {number + 1} of {len(chunks)}"
        try:
            by_place = work.sweep_chunk("ablate", "ablate", label, tasks, masks, chunk)
        except OutOfTime:
            gathered.left.append(_what_is_left(tasks, chunk.start))
            break
        for place, scores in by_place.items():
            done[place].append(scores)
        if number + 1 < len(chunks) and not work.parts.has(_next_part(chunks[number + 1])):
            _gather(work, gathered, units, choices, done)
            yield
    _gather(work, gathered, units, choices, done)
    yield


def _next_part(chunk: slice) -> str:
    return f"ablate-{chunk.start:06d}"


def _what_is_left(tasks: Sequence[TaskRows], documents: int) -> str:
    most = most_documents(tasks)
    return f"ablate: the time was over after {documents} of {most} documents a task; the same command goes on"


def _choice(work: Work, gathered: Gathered, task: TaskRows, units: Sequence[Unit]) -> _Choice:
    everything = np.arange(len(units))
    if work.options.screen is None:
        return _Choice(everything, everything[:0])
    scores = gathered.importance[task.task, task.shots]
    by_document = np.concatenate(
        [scores.attribution_heads.reshape(len(scores.attribution_heads), -1), scores.attribution_ffns], axis=1
    )
    estimates, errors = ablate.estimated_drops(by_document)
    exact, drawn = ablate.screened(estimates, errors, work.options.resolved_exact, work.options.seed)
    return _Choice(exact, drawn, estimates, errors)


def _gather(
    work: Work,
    gathered: Gathered,
    units: Sequence[Unit],
    choices: Sequence[_Choice],
    done: Sequence[Sequence[Scores]],
) -> None:
    """Turn what is scored so far into rows, and estimates into the rows of all other units."""
    skeleton = work.model.skeleton
    rows: list[Row] = []
    columns: list[dict[str, Any]] = []
    measured: list[unit_claims.Measured] = []
    gathered.effects["ablate"] = []
    for task, choice, chunks in zip(work.prepared.train, choices, done, strict=True):
        values = np.full(len(units), np.nan) if choice.estimates is None else choice.estimates.copy()
        if chunks:
            scores = joined(chunks)
            documents = _scored_documents(task, scores)
            packed = work.prepared.pack(replace(task, documents=documents))
            lost = ablate.drops(packed, scores.logprobs, scores.greedy)
            exact = [units[place] for place in choice.exact]
            columns += ablate.drop_columns(packed, exact, lost, work.options.seed)
            gathered.effects["ablate"] += ablate.effect_columns(packed, exact, lost)
            gold = lost.by_document["gold_logprob"]
            values[choice.exact] = gold.mean(1)
            one = unit_claims.Measured(packed.task, choice.exact, gold, lost.accuracy, lost.accuracy_clusters)
            measured.append(one)
            rows += unit_claims.top_drop_rows(units, one, work.options.seed)
            _rank_documents(
                gathered, skeleton, packed.task, "ablation", choice.exact, gold, packed.task.clusters
            )
            if choice.estimates is not None:
                rows += ablate.agreement_rows(packed, choice.estimates, values, choice.exact, choice.drawn)
        if choice.estimates is not None and choice.errors is not None:
            estimated = np.setdiff1d(np.arange(len(units)), choice.exact if chunks else choice.exact[:0])
            columns += ablate.estimate_columns(task, units, estimated, choice.estimates, choice.errors)
        if chunks and len(np.intersect1d(choice.exact, _ffn_places(skeleton))) == skeleton.layers:
            # The oracle: what removing each FFN alone costs in accuracy, ties told apart by probability.
            ffns = np.searchsorted(choice.exact, _ffn_places(skeleton))
            ranking = with_ties_broken(
                lost.accuracy.mean(1)[ffns], lost.by_document["gold_prob"].mean(1)[ffns]
            )
            gathered.ffn_rankings[RankingKey(task.task, task.shots, "ablation")] = ranking
        heads = values[: skeleton.layers * skeleton.heads]
        if np.isfinite(heads).all():
            key = RankingKey(task.task, task.shots, "ablation")
            gathered.rankings[key] = heads.reshape(skeleton.layers, skeleton.heads)
    columns += unit_claims.claim_columns(units, measured)
    columns += _in_context(work, gathered, units, measured)
    gathered.results["ablate"], gathered.columns["ablate"] = rows, columns


def _in_context(
    work: Work, gathered: Gathered, units: Sequence[Unit], measured: Sequence[unit_claims.Measured]
) -> list[dict[str, Any]]:
    """Return blocks of in-context effects at every shot count against none, and rank the heads by them."""
    skeleton = work.model.skeleton
    alone = {one.task.task: one for one in measured if one.task.shots == 0}
    pairs = [
        unit_claims.in_context(one, alone[one.task.task])
        for one in measured
        if one.task.shots and one.task.task in alone
    ]
    effects = [effect for effect in pairs if effect is not None]
    by_shots: dict[int, list[RankingKey]] = {}
    for one in effects:
        if _rank_documents(
            gathered, skeleton, one.task, ICL_EFFECT, one.places, one.gold, one.clusters
        ):  # fmt: skip
            key = RankingKey(one.task.task, one.task.shots, ICL_EFFECT)
            heads = one.gold[: skeleton.layers * skeleton.heads].mean(1)
            gathered.rankings[key] = heads.reshape(skeleton.layers, skeleton.heads)
            if in_domain(key.task):
                by_shots.setdefault(key.shots, []).append(key)
    for shots, keys in by_shots.items():
        if len(keys) > 1:
            key = RankingKey(AGGREGATE, shots, ICL_EFFECT)
            gathered.rankings[key] = mean_of_ranks([gathered.rankings[member] for member in keys])
            members = (gathered.document_rankings[member].members for member in keys)
            gathered.document_rankings[key] = DocumentRanking(tuple(itertools.chain.from_iterable(members)))
    return unit_claims.in_context_columns(units, effects, work.options.seed)


def _rank_documents(
    gathered: Gathered,
    skeleton: Skeleton,
    task: TaskRows,
    method: str,
    places: NDArray[np.int64],
    values: NDArray[np.float64],
    clusters: Sequence[str],
) -> bool:
    """Keep what documents add to a ranking of heads, from values [U, N] of units at `places`; tell if all heads have them."""
    heads = skeleton.layers * skeleton.heads
    complete = np.array_equal(places[:heads], np.arange(heads))
    if complete:
        scores = DocumentScores.of_mean(task.task, values[:heads].T.astype(np.float32), clusters)
        gathered.document_rankings[RankingKey(task.task, task.shots, method)] = DocumentRanking((scores,))
    return complete


def _ffn_places(skeleton: Skeleton) -> NDArray[np.int64]:
    """Return the places of the FFNs among the ablated units."""
    return skeleton.layers * skeleton.heads + np.arange(skeleton.layers)


def _scored_documents(task: TaskRows, scores: Scores) -> tuple[Document, ...]:
    """Return the documents, from the first on, whose options the scores are of."""
    ends = list(itertools.accumulate(len(document.options) for document in task.documents))
    return task.documents[: ends.index(scores.logprobs.shape[1]) + 1]
