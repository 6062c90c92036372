"""What the stages of a run share: the model and its documents, finished parts, and what is gathered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.config import RunOptions
from lowmem_icl.engine.stream import Scores, sweep
from lowmem_icl.engine.waves import Job, SweepMemory, layer_tokens
from lowmem_icl.experiments.overlap import RankingKey
from lowmem_icl.masks import Mask
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.parts import Parts
from lowmem_icl.prepare import Prepared
from lowmem_icl.progress import Progress
from lowmem_icl.tasks.loading import TaskRows

EVALUATE_CHUNK = 128
ABLATE_CHUNK = 16
AGGREGATE = "aggregate"

Row = dict[str, Any]


@dataclass(frozen=True)
class MadeMask:
    """A mask that a run made: for which task and shot count, by which method, from how many documents."""

    name: str
    mask: Mask
    method: str
    task: str
    shots: int
    documents: int
    seed: int | None
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass
class Gathered:
    """What the experiments of a run put together: table rows, table columns, masks and warnings."""

    results: list[Row] = field(default_factory=list)
    effects: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    masks: list[MadeMask] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rankings: dict[RankingKey, NDArray[np.float64]] = field(default_factory=dict)
    ffn_rankings: dict[RankingKey, NDArray[np.float64]] = field(default_factory=dict)


def chunk_starts(tasks: Sequence[TaskRows], chunk: int) -> range:
    """Return the first document of every chunk."""
    return range(0, max(len(task.documents) for task in tasks), chunk)


def chunk_jobs(
    prepared: Prepared, tasks: Sequence[TaskRows], masks: Sequence[tuple[Mask, ...]], start: int, chunk: int
) -> list[Job]:
    """Return one chunk of documents of all tasks that have any there, packed, under each task's masks."""
    return [
        Job(prepared.pack(task, slice(start, start + chunk)).packed, of_task)
        for task, of_task in zip(tasks, masks, strict=True)
        if start < len(task.documents)
    ]


@dataclass(frozen=True)
class Work:
    """What every stage needs: the documents, the model, the memory for residuals, and where finished parts are."""

    options: RunOptions
    prepared: Prepared
    model: StreamedModel
    memory: SweepMemory
    parts: Parts
    progress: Progress
    spill_folder: Path

    def sweep(self, name: str, label: str, jobs: Callable[[], Sequence[Job]]) -> list[Scores]:
        """Return the scores of a part's jobs, from its file or by sweeping."""

        def make() -> dict[str, NDArray[Any]]:
            wanted = jobs()
            total = layer_tokens(wanted, self.model.skeleton.layers)
            with self.progress(label, total, "layer-tokens") as advance:
                scores = sweep(
                    self.model, wanted, memory=self.memory, spill_folder=self.spill_folder, advance=advance
                )
            arrays: dict[str, NDArray[Any]] = {"jobs": np.array(len(wanted))}
            for number, score in enumerate(scores):
                arrays |= {f"{number}.logprobs": score.logprobs, f"{number}.greedy": score.greedy}
            return arrays

        arrays = self.parts.get_or_make(name, make)
        return [
            Scores(arrays[f"{number}.logprobs"], arrays[f"{number}.greedy"])
            for number in range(int(arrays["jobs"]))
        ]

    def sweep_in_chunks(
        self,
        name: str,
        label: str,
        tasks: Sequence[TaskRows],
        masks: Sequence[tuple[Mask, ...]],
        chunk: int,
    ) -> list[Scores]:
        """Sweep tasks in chunks of documents, a part each; return the whole scores of every task.

        Packing goes by chunk, whatever the memory, so that a chunk's result is always the same.
        """
        per_task: list[list[Scores]] = [[] for _ in tasks]
        starts = chunk_starts(tasks, chunk)
        for number, start in enumerate(starts):
            here = [place for place, task in enumerate(tasks) if start < len(task.documents)]
            jobs = partial(chunk_jobs, self.prepared, tasks, masks, start, chunk)
            shown = label if len(starts) == 1 else f"{label} {number + 1}/{len(starts)}"
            scores = self.sweep(f"{name}-{start:06d}", shown, jobs)
            for place, score in zip(here, scores, strict=True):
                per_task[place].append(score)
        return [
            Scores(
                np.concatenate([score.logprobs for score in chunks], axis=1),
                np.concatenate([score.greedy for score in chunks], axis=1),
            )
            for chunks in per_task
        ]
