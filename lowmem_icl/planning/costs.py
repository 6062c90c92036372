"""The work of a run before it starts: the parts that its stages describe, what they read and compute, and their rows."""

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.experiments.order import STAGES, Stage
from lowmem_icl.rows import PackedRows, Row
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.work import GradientsPart, HeadScoresPart, Part, SweepPart


@dataclass(frozen=True)
class StageWork:
    """The parts of one stage that are still to be made, each once."""

    stage: Stage
    parts: tuple[Part, ...]

    def costs(
        self, prepared: Prepared, limits: SweepLimits, resident: Collection[int]
    ) -> Iterator[tuple[Part, SweepCost]]:
        """Yield every part with what it takes."""
        for part in self.parts:
            yield part, part.cost(prepared, limits, resident)


def planned_work(prepared: Prepared, finished: Callable[[str], bool] = lambda part: False) -> list[StageWork]:
    """Return the work of all stages asked for, in order; `finished` tells which parts are there already.

    What a stage does by the results of others is described by what is expected of these. A part that two stages
    share belongs to the first.
    """
    expected: dict[str, StageResult] = {}
    planned: list[StageWork] = []
    seen: set[str] = set()
    for stage in STAGES:
        if stage.name not in prepared.options.experiments:
            continue
        parts = []
        for part in stage.parts(prepared, **stage.given(expected)):
            # Parts of searches are counted by how often they are expected, and have no names yet.
            if part.name and (part.name in seen or finished(part.name)):
                continue
            seen.add(part.name)
            parts.append(part)
        planned.append(StageWork(stage, tuple(parts)))
        expected[stage.name] = stage.expected(prepared)
    return planned


@dataclass(frozen=True)
class RowLengths:
    """Tokens of the rows of a run: of the longest with its stem, and of the mean one."""

    longest: int
    mean: int


def row_lengths(prepared: Prepared, planned: list[StageWork]) -> RowLengths:
    """Return the lengths of the rows that planned work is on, or of the clean evaluation where there is none."""
    parts = list(itertools.chain.from_iterable(work.parts for work in planned))
    rows = [row for packed in _outlines(prepared, parts) for row in packed.rows]
    lengths = [len(row) for row in rows]
    questions = [row for part in parts if isinstance(part, HeadScoresPart) for row in part.questions.rows]
    if not rows and not questions:
        rows = [row for task in prepared.evaluate for row in prepared.outline(task, slice(1)).rows]
        lengths = [len(row) for row in rows]
    longest = max(_with_stem(row) for row in [*rows, *questions])
    return RowLengths(longest, sum(lengths) // len(lengths) if lengths else longest)


def _outlines(prepared: Prepared, parts: list[Part]) -> Iterator[PackedRows]:
    """Yield the rows of parts, those of the same documents once."""
    seen: set[tuple[int, str]] = set()
    for part in parts:
        if isinstance(part, GradientsPart):
            for task in part.tasks:
                if (key := (id(task), "gold")) not in seen:
                    seen.add(key)
                    yield prepared.outline(task, gold_only=True)
        elif isinstance(part, SweepPart):
            for job in part.jobs:
                if (key := (id(job.task), str(job.documents))) not in seen:
                    seen.add(key)
                    yield prepared.outline(job.task, job.documents)


<<<<<<< HEAD
def _with_stem(row: Row) -> int:
    return len(row) + (0 if row.stem is None else len(row.stem))


def largest_sweeps(prepared: Prepared, planned: list[StageWork]) -> list[SweepPart]:
    """Return the largest sweep of every stage whose work is known beforehand: these decide how memory is dealt out."""
=======
def planned_sweeps(
    experiment: str, options: RunOptions, prepared: Prepared, laid: Laid, masks: Sequence[Mask]
) -> Iterator[PlannedSweep]:
    """Yield the sweeps of `evaluate` (clean and under `masks`), `ablate`, `prune` or `induction`; of others none.

    The pruner's are those of removing every head, one after the other, so that a layer's sweeps try all its heads, one
    less, …, one; the first of a layer also runs the clean model up to it.
    """
    skeleton = prepared.store.skeleton
    layers, heads = skeleton.layers, skeleton.heads
    if experiment == "evaluate":
        for chunk in laid.evaluate:
            part = f"evaluate-{chunk.documents.start:06d}"
            yield PlannedSweep([Job(rows, (Mask(), *masks)) for rows in chunk.rows.values()], part=part)
    elif experiment == "ablate":
        every = ablation_masks(layers, heads)
        if options.screen is not None and options.resolved_exact < len(every) - 1:
            # Which ones is not known yet: as many, spread over all layers.
            places = np.linspace(1, len(every) - 1, options.resolved_exact).round().astype(int)
            every = (Mask(), *(every[place] for place in places))
        for chunk in laid.ablate:
            part = f"ablate-{chunk.documents.start:06d}"
            jobs = [Job(rows, every) for rows in chunk.rows.values()]
            yield PlannedSweep(jobs, part=part, documents=chunk.documents.stop)
    elif experiment == "prune":
        if options.curves and "importance" in options.experiments:
            yield from _curve_sweeps(options, prepared, laid)
        packed = [
            _joined([c.rows[place] for c in laid.ablate if place in c.rows]) for place in laid.ablate[0].rows
        ]
        for layer in range(layers):
            # From the first layer up, masks hold units of the layers below.
            lowest = frozenset([(0, 0)] if options.direction == "up" else [])
            of_layer = [Mask(heads=lowest | {(layer, head)}) for head in range(heads)]
            # Two searches, a task's own and that of all tasks, each on half of the documents.
            yield PlannedSweep([Job(rows, tuple(of_layer)) for rows in packed])
            for tried in (of_layer, of_layer[:1]):
                yield PlannedSweep([Job(rows, tuple(tried)) for rows in packed], (heads - 1) / 2, cached=True)
            first_ffn = (Mask(ffns=frozenset([layer])),)
            yield PlannedSweep([Job(rows, first_ffn) for rows in packed], cached=True)
        # Its own and the shared mask of three methods each, then judged.
        for chunk in laid.evaluate:
            six = (Mask(ffns=frozenset([0])),) * 6
            yield PlannedSweep([Job(rows, six) for rows in chunk.rows.values()])
    elif experiment == "induction":
        # Which heads is not known yet; they lie beyond the middle as often as not.
        few = causal_masks(RANDOM_DRAWS, layers // 2)
        jobs = [
            Job(rows, masked)
            for chunk, masked in zip(laid.causal, (few, few[:2]), strict=False)
            for rows in chunk.rows.values()
        ]
        if jobs:
            yield PlannedSweep(jobs, part=EVALUATION_PART)


def _curve_sweeps(options: RunOptions, prepared: Prepared, laid: Laid) -> Iterator[PlannedSweep]:
    """Yield the sweeps of the pruning curves: what they will remove is not known yet, how much of it is."""
    skeleton = prepared.store.skeleton
    # Stand-ins of all scores give as many levels as the real ones.
    names = dict.fromkeys((*(task.task for task in prepared.train), AGGREGATE))
    keys = [
        RankingKey(name, shots, method)
        for name in names
        for shots in options.resolved_shots
        for method in ("gradient", "ablation")
    ]
    rng = np.random.default_rng(0)
    rankings = Rankings(
        {key: rng.random((skeleton.layers, skeleton.heads)) for key in keys},
        {key: rng.random(skeleton.layers) for key in keys},
        "ablation" if "ablate" in options.experiments else "gradient",
        AGGREGATE,
        tuple(name for name in names if name != AGGREGATE and in_domain(name)),
    )
    points = points_of(options, prepared.train, rankings)
    masks = [tuple(dict.fromkeys([Mask(), *(point.mask for point in of_task)])) for of_task in points]
    judged = [
        tuple(dict.fromkeys([Mask(), *(point.mask for point in of_task if point.judged)]))
        for of_task in points
    ]
    rescored = (Mask(ffns=frozenset([0])),) * (len(LEVELS) - 1) if options.rescore else ()
    for chunk in laid.curves:
        jobs = [Job(rows, masks[place] + rescored) for place, rows in chunk.rows.items()]
        yield PlannedSweep(jobs, part=f"curves-{chunk.documents.start:06d}")
    for chunk in laid.ablate:
        yield PlannedSweep([Job(rows, judged[place]) for place, rows in chunk.rows.items()])
>>>>>>> wt-B

    def tokens(part: SweepPart) -> int:
        return sum(prepared.outline(job.task, job.documents).token_count for job in part.jobs)

    largest = []
    for work in planned:
        sweeps = [part for part in work.parts if isinstance(part, SweepPart)]
        if sweeps and not work.stage.rough:
            largest.append(max(sweeps, key=tokens))
    return largest
