"""The work of a run before it starts: the parts that its stages describe, what they read and compute, and
their rows.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.experiments.order import STAGES, Stage
from lowmem_icl.rows import PackedRows, Row
from lowmem_icl.session.fills import MeansPart
from lowmem_icl.session.jobs import outlined_gold, outlined_jobs
from lowmem_icl.session.patch_parts import PatchEstimatesPart, PatchPart, PromptMeansPart
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.work import GradientsPart, HeadScoresPart, Part, SweepPart


@dataclass(frozen=True)
class StageWork:
    """The parts of one stage that are still to be made, each once; `last`: the name of the stage's last part,
    empty where it has none.
    """

    stage: Stage
    parts: tuple[Part, ...]
    last: str = ""

    def costs(
        self, prepared: Prepared, limits: SweepLimits, resident: Collection[int]
    ) -> Iterator[tuple[Part, SweepCost]]:
        """Yield every part with what it takes."""
        counted = {} if prepared.counted is None else prepared.counted
        for part in self.parts:
            # The part is kept with its cost, so that its id stays its.
            key = ("cost", id(part), limits, frozenset(resident))
            if key not in counted:
                counted[key] = part, part.cost(prepared, limits, resident)
            yield part, counted[key][1]


def planned_work(prepared: Prepared) -> list[StageWork]:
    """Return the work of all stages asked for, in order.

    What a stage does by the results of others is described by what is expected of these. A part that two
    stages share belongs to the first.
    """
    if prepared.counted is None:
        return _described(prepared)
    # It depends on neither memory nor hours, so a plan with others of these finds it here.
    options = prepared.options.model_copy(update={"memory": None, "device_memory": None, "hours": None})
    documents = prepared.evaluate, prepared.train, prepared.importance, prepared.curves, prepared.certify
    key = ("work", options.model_dump_json(), *map(id, documents))
    if key not in prepared.counted:
        # The documents are kept with it, so that their ids stay theirs.
        prepared.counted[key] = _described(prepared), documents
    return list(prepared.counted[key][0])


def _described(prepared: Prepared) -> list[StageWork]:
    expected: dict[str, StageResult] = {}
    planned: list[StageWork] = []
    seen: set[str] = set()
    for stage in STAGES:
        if stage.name not in prepared.options.experiments:
            continue
        parts: list[Part] = []
        described = list(stage.parts(prepared, **stage.given(expected)))
        for part in described:
            # Parts of searches are counted by how often they are expected, and have no names yet.
            if part.name and part.name in seen:
                continue
            seen.add(part.name)
            parts.append(part)
        planned.append(StageWork(stage, tuple(parts), described[-1].name if described else ""))
        expected[stage.name] = stage.expected(prepared)
    return planned


def work_left(planned: Sequence[StageWork], finished: Callable[[str], bool]) -> list[StageWork]:
    """Return what is left of work; `finished` tells which parts are there already."""
    left = []
    for work in planned:
        # Parts are made in order: where the last one is there, all are, those that have no names yet too.
        is_over = bool(work.last) and finished(work.last)
        parts = [part for part in work.parts if not (part.name and finished(part.name))]
        left.append(replace(work, parts=() if is_over else tuple(parts)))
    return left


@dataclass(frozen=True)
class RowLengths:
    """Tokens of the rows of a run: of the longest with its stem, and of the mean one."""

    longest: int
    mean: int


def row_lengths(prepared: Prepared, planned: list[StageWork]) -> RowLengths:
    """Return the lengths of the rows of planned work, or of the clean evaluation where there is none."""
    parts = list(itertools.chain.from_iterable(work.parts for work in planned))
    rows = [row for packed in _outlines(prepared, parts) for row in packed.rows]
    lengths = [len(row) for row in rows]
    questions = [row for part in parts if isinstance(part, HeadScoresPart) for row in part.questions.rows]
    if not rows and not questions:
        rows = [row for task in prepared.evaluate for row in prepared.outline(task, slice(1)).rows]
        lengths = [len(row) for row in rows]
    # A run without tasks may have no work that has rows.
    longest = max((_with_stem(row) for row in [*rows, *questions]), default=1)
    return RowLengths(longest, sum(lengths) // len(lengths) if lengths else longest)


def _outlines(prepared: Prepared, parts: list[Part]) -> Iterator[PackedRows]:
    """Yield the rows of parts, those of the same documents once."""
    # They are kept, so that one's id stays its.
    seen: set[int] = set()
    for part in parts:
        outlines: list[PackedRows] = []
        if isinstance(part, MeansPart):
            outlines = [prepared.outline(task, gold_only=True) for task in part.tasks]
        elif isinstance(part, GradientsPart):
            pairs = zip(part.tasks, part.masks, strict=True)
            outlines = [outlined_gold(prepared, task, mask)[0] for task, mask in pairs]
        elif isinstance(part, PatchPart):
            for patched in part.jobs:
                yield PackedRows(tuple(patched.rows), 0)
        elif isinstance(part, PromptMeansPart):
            yield from part.packed(prepared)
        elif isinstance(part, PatchEstimatesPart):
            yield PackedRows(part.rows, len(part.rows))
        elif isinstance(part, SweepPart):
            outlines = [job.packed for job in outlined_jobs(prepared, part.jobs)]
        for packed in outlines:
            if id(packed) not in seen:
                seen.add(id(packed))
                yield packed


def _with_stem(row: Row) -> int:
    return len(row) + (0 if row.stem is None else len(row.stem))


def largest_sweeps(prepared: Prepared, planned: list[StageWork]) -> list[SweepPart]:
    """Return the largest sweep of every stage whose work is known beforehand: these decide how memory is
    dealt out.
    """

    def tokens(part: SweepPart) -> int:
        return sum(prepared.outline(job.task, job.documents).token_count for job in part.jobs)

    largest = []
    for work in planned:
        sweeps = [part for part in work.parts if isinstance(part, SweepPart)]
        if sweeps and not work.stage.rough:
            largest.append(max(sweeps, key=tokens))
    return largest
