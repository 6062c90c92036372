"""Work that is only described: parts answered with arbitrary numbers, so that stages run without a model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.head_scores import HeadScores
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.experiments.order import run_stages
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.measure import Rates
from lowmem_icl.session import prepare as preparing
from lowmem_icl.session.part_jobs import PartJob
from lowmem_icl.session.parts import of_jobs
from lowmem_icl.session.prepare import Prepared, prepare
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.work import GradientsPart, HeadScoresPart, Made, OutOfTime, Part, SweepPart, Work
from lowmem_icl.tasks.loading import OpenTask, open_task

RATES = Rates(
    call_seconds=0,
    attention_seconds=1e-6,
    projection_seconds=1e-6,
    ffn_seconds=2e-6,
    backward_seconds=1e-5,
    answer_seconds=1e-6,
    disk_bytes_per_second=1e12,
)
ALL_CURVES = ("heads", "ffns", "combined", "transfer", "cross-shot", "random")
SMALL = {"limit": 3, "train_limit": 3, "random_draws": 2, "shots": (0, 4)}
SHARED = {"demonstrations": "shared", "demonstration_sets": 3}
DROPS = {"label_drops": True}


class _Begun(Exception):
    pass


class _NoDraft:
    """Takes the empty arrays of a part, and stops what would fill them."""

    arrays: Mapping[str, NDArray[Any]]

    def resume(self, arrays: Callable[[], Mapping[str, NDArray[Any]]]) -> None:
        self.arrays = arrays()
        raise _Begun


@dataclass(frozen=True)
class PatchingPart:
    """What is known of a part that patches when it is asked for."""

    name: str


@dataclass(frozen=True)
class PlayedWork(Work):
    """Work that answers every part with arbitrary numbers of the right shapes,
    and notes what it was asked.
    """

    asked: list[Any] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    allowed: int = 10**9
    no_time_for: str = "nothing"

    def _ask(self, part: Part | PatchingPart) -> np.random.Generator:
        for earlier in (earlier for earlier in self.asked if earlier.name == part.name):
            assert content_of(part) == content_of(earlier), f"{part.name} would be read from another's file"
        if part.name not in self.finished:
            if len(self.asked) >= self.allowed or part.name.startswith(self.no_time_for):
                raise OutOfTime
            self.asked.append(part)
            self.finished.add(part.name)
        return np.random.default_rng(sum(part.name.encode()))

    def sweep(self, part: SweepPart) -> list[Scores]:
        rng, scores = self._ask(part), []
        for job in part.jobs:
            shape = (len(job.masks), self.prepared.outline(job.task, job.documents).option_count)
            scores.append(
                Scores(rng.normal(size=shape), rng.random(shape) < 0.5, np.ones(shape, dtype=np.bool_))
            )
        return scores

    def made(
        self, name: str, jobs: Sequence[PartJob], make: Callable[[Any, Sequence[int]], Made]
    ) -> list[Mapping[str, NDArray[Any]]]:
        """Parts that patch: the arrays that they would fill, without what fills them. What begins no pass is
        made.
        """
        draft = _NoDraft()
        with suppress(_Begun):
            results, _ = make(draft, range(len(jobs)))
            return [result.arrays() for result in results]
        rng = self._ask(PatchingPart(name))
        arrays = {
            key: np.ones_like(array) if array.dtype == np.bool_ else rng.random(array.shape)
            for key, array in draft.arrays.items()
        }
        found: list[Mapping[str, NDArray[Any]]] = [*of_jobs(arrays)]
        return found

    def gradients(self, part: GradientsPart) -> list[UnitGradients]:
        rng, skeleton = self._ask(part), self.prepared.skeleton
        found = []
        for task in part.tasks:
            options = self.prepared.outline(task, gold_only=True).option_count
            empty = UnitGradients.empty(len(task.documents), options, skeleton.layers, skeleton.heads)
            values: dict[str, Any] = {
                name: rng.random(array.shape) for name, array in empty.arrays().items() if name != "finished"
            }
            found.append(replace(empty, **values))
        return found

    def head_scores(self, part: HeadScoresPart) -> HeadScores:
        rng, skeleton = self._ask(part), self.prepared.skeleton
        empty = HeadScores.empty(len(part.questions.base_tokens), skeleton.layers, skeleton.heads)
        values: dict[str, Any] = {
            name: rng.random(array.shape) for name, array in empty.arrays().items() if name != "finished"
        }
        return replace(empty, **values)


class NoParts:
    def has(self, name: str) -> bool:
        return False


def played(prepared: Prepared, **changes: Any) -> PlayedWork:
    nothing: Any = None
    parts: Any = NoParts()
    unread: Any = SimpleNamespace(
        skeleton=prepared.skeleton, device=torch.device("cpu"), layers=lambda numbers: ()
    )
    return PlayedWork(prepared, unread, SweepLimits.of(1 << 30), nothing, parts, nothing, **changes)


@cache
def opened(name: str, data_dir: Path | None) -> OpenTask:
    """A task whose rows are read once for all tests."""
    return open_task(name, data_dir)


def prepared_for(**changes: Any) -> Prepared:
    options = {"tasks": ("recall", "knowledge", "repeat")} | SMALL | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "open_task", opened)
        return prepare(RunOptions.model_validate(options))


def content_of(part: Part | PatchingPart) -> Any:
    """What the file of a part depends on, of those that have masks."""
    if isinstance(part, SweepPart):
        return [(job.task.documents, job.documents, job.masks) for job in part.jobs]
    return [(task.documents, part.masks) for task in part.tasks] if isinstance(part, GradientsPart) else None


def is_search(part: Part) -> bool:
    return part.name == "" or part.name.startswith(("prune-0", "prune-compared", "prune-certify"))


def described(part: Part | PatchingPart) -> tuple[Any, ...]:
    """What a part is: its name, and for every job the documents and how many masks they are under."""
    if isinstance(part, SweepPart):
        jobs = [(job.task.task, job.task.shots, job.documents, len(job.masks)) for job in part.jobs]
        return part.name, tuple(map(str, jobs))
    if isinstance(part, GradientsPart):
        return part.name, tuple((task.task, task.shots) for task in part.tasks)
    return (part.name,)


def last_results(work: PlayedWork) -> dict[str, StageResult]:
    """What every stage ends with."""
    return {stage.name: result for stage, result, is_over in run_stages(work, {}) if is_over}
