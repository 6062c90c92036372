"""What stages return: tables, masks and rankings, which the run folds and later stages are given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey
from lowmem_icl.session.failures import Failure
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.statistics.resampling import DocumentRanking
from lowmem_icl.tables.schema import empty_frame
from lowmem_icl.tasks.loading import TaskRows

Values = NDArray[np.float64]


@dataclass(frozen=True)
class MaskResult:
    """A mask that a run made: for which task and shot count, by which method, from how many documents; `note`
    says more.
    """

    name: str
    mask: Mask
    method: str
    task: str
    shots: int
    documents: int
    seed: int | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Rankings:
    """Scores by task, shot count and method: of heads [L, H] and of FFNs [L]; higher is more important.

    `documents`: what each document adds, for those of the heads' rankings where that is known.
    """

    heads: Mapping[RankingKey, Values] = field(default_factory=dict)
    ffns: Mapping[RankingKey, Values] = field(default_factory=dict)
    documents: Mapping[RankingKey, DocumentRanking] = field(default_factory=dict)

    def __or__(self, other: "Rankings") -> "Rankings":
        return Rankings(
            {**self.heads, **other.heads}, {**self.ffns, **other.ffns}, {**self.documents, **other.documents}
        )


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage has found so far: records of the three tables, masks, and what run.json keeps of it.

    `rankings`: those that it made; `unfinished`: a sentence on what its time did not do for, empty where all
    is done; `failures`: what could not be done, of which nothing else tells.
    """

    results: pl.DataFrame = field(default_factory=lambda: empty_frame("results"))
    effects: pl.DataFrame = field(default_factory=lambda: empty_frame("effects"))
    answers: pl.DataFrame = field(default_factory=lambda: empty_frame("answers"))
    masks: tuple[MaskResult, ...] = ()
    rankings: Rankings = field(default_factory=Rankings)
    warnings: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    unfinished: str = ""
    failures: tuple[Failure, ...] = ()


def rankings_of(*results: StageResult | None) -> Rankings:
    """Return the rankings of all stages that there are results of."""
    merged = Rankings()
    for result in results:
        merged = merged if result is None else merged | result.rankings
    return merged


def task_fields(task: TaskRows) -> dict[str, Any]:
    """Return the columns that say which documents a number is of."""
    return {
        "task": task.task,
        "shots": task.shots,
        "split": task.split,
        "documents": len(task.documents),
        "labels": task.labels,
    }


def stamp(prepared: Prepared, experiment: str) -> dict[str, Any]:
    """Return the columns that all records of an experiment share unless they say otherwise."""
    options, manifest = prepared.options, prepared.store.manifest
    return {
        "experiment": experiment,
        "protocol": options.protocol,
        "demonstrations": options.demonstrations,
        "model": manifest.source.id,
        "weights": manifest.weights,
        "seed": options.seed,
        "ablation": options.ablation,
    }
