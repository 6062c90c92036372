"""The ablate stage: chunks of documents, each under all units asked for, until the work or its time is over."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments import ablate
from lowmem_icl.masks import Mask, Unit
from lowmem_icl.model.families import Skeleton
from lowmem_icl.rankings import RankingKey, with_ties_broken
from lowmem_icl.stages.work import (
    Gathered,
    OutOfTime,
    Row,
    Work,
    doubling_chunks,
    joined,
    most_documents,
)
from lowmem_icl.tasks.loading import Document, TaskRows


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
    exact, drawn = ablate.screened(estimates, errors, work.options.chosen_exact, work.options.seed)
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
            values[choice.exact] = lost.by_document["gold_logprob"].mean(1)
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
    gathered.results["ablate"], gathered.columns["ablate"] = rows, columns


def _ffn_places(skeleton: Skeleton) -> NDArray[np.int64]:
    """Return the places of the FFNs among the ablated units."""
    return skeleton.layers * skeleton.heads + np.arange(skeleton.layers)


def _scored_documents(task: TaskRows, scores: Scores) -> tuple[Document, ...]:
    """Return the documents, from the first on, whose options the scores are of."""
    ends = list(itertools.accumulate(len(document.options) for document in task.documents))
    return task.documents[: ends.index(scores.logprobs.shape[1]) + 1]
