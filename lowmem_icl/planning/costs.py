"""What each experiment of a run computes and reads: all rows laid out once, then the sweeps that it will make of them."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowmem_icl.engine.head_scores import HeadQuestions
from lowmem_icl.engine.schedule import Job
from lowmem_icl.experiments.ablate.measure import ablation_masks
from lowmem_icl.experiments.induction.measure import RANDOM_DRAWS
from lowmem_icl.experiments.induction.stage import (
    DRAWN_DOCUMENTS,
    EVALUATION_PART,
    MORE_DOCUMENTS,
    causal_masks,
    causal_tasks,
    head_questions,
)
from lowmem_icl.experiments.prune.curve_stage import points_of
from lowmem_icl.experiments.prune.curves import LEVELS, Rankings
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey
from lowmem_icl.options import RunOptions
from lowmem_icl.rows import PackedRows, Row, outline
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.work import AGGREGATE, EVALUATE_CHUNK, chunks_of, doubling_chunks, most_documents
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.sources import in_domain


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk of the documents of all tasks: which ones, and rows by the place of their task."""

    documents: slice
    rows: dict[int, PackedRows]


@dataclass(frozen=True, eq=False)
class Laid:
    """Outlines of all rows as the experiments lay them out, without content, and the seconds that laying out took.

    `evaluate`, `ablate`, `curves`: all documents in chunks; `gold`: the gold options alone, of all documents; `questions`:
    what heads are scored on, if they are, and `causal` the documents that induction heads are then removed for.
    """

    evaluate: tuple[Chunk, ...]
    ablate: tuple[Chunk, ...]
    curves: tuple[Chunk, ...]
    gold: tuple[PackedRows, ...]
    evaluate_seconds: float
    train_seconds: float
    questions: HeadQuestions | None = None
    causal: tuple[Chunk, ...] = ()

    def _rows(self) -> Iterator[Row]:
        for chunk in (*self.evaluate, *self.ablate, *self.curves, *self.causal):
            for packed in chunk.rows.values():
                yield from packed.rows
        for packed in self.gold:
            yield from packed.rows

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest row with its stem."""
        of_heads = () if self.questions is None else self.questions.rows
        rows = itertools.chain(self._rows(), of_heads)
        return max(len(row) + (0 if row.stem is None else len(row.stem)) for row in rows)

    @property
    def mean_tokens(self) -> int:
        """Tokens of the mean row."""
        lengths = [len(row) for row in self._rows()]
        return sum(lengths) // len(lengths)


def lay_out(options: RunOptions, prepared: Prepared) -> Laid:
    """Pack all documents once, to know their rows before anything is decided."""
    asked = set(options.experiments)

    def chunks(tasks: Sequence[TaskRows], slices: Sequence[slice], wanted: bool) -> tuple[Chunk, ...]:
        if not wanted:
            return ()
        return tuple(
            Chunk(
                part,
                {
                    place: _outlined(prepared.pack(task, part).packed)
                    for place, task in enumerate(tasks)
                    if part.start < len(task.documents)
                },
            )
            for part in slices
        )

    start = time.perf_counter()
    evaluate = chunks(
        prepared.evaluate,
        chunks_of(most_documents(prepared.evaluate), EVALUATE_CHUNK),
        bool(asked & {"evaluate", "prune"}),
    )
    curves = chunks(
        prepared.curves,
        chunks_of(most_documents(prepared.curves), EVALUATE_CHUNK),
        "prune" in asked and bool(options.curves),
    )
    between = time.perf_counter()
    ablate = chunks(
        prepared.train, doubling_chunks(most_documents(prepared.train)), bool(asked & {"ablate", "prune"})
    )
    gold: tuple[PackedRows, ...] = ()
    if "importance" in asked or not (evaluate or ablate):
        gold = tuple(_outlined(prepared.pack(task, gold_only=True).packed) for task in prepared.importance)
    training = time.perf_counter() - between
    inducing = "induction" in asked
    questions = head_questions(options, prepared) if inducing else None
    shown = causal_tasks(prepared)
    causal = chunks(shown, [DRAWN_DOCUMENTS, MORE_DOCUMENTS], inducing and bool(shown))
    return Laid(evaluate, ablate, curves, gold, between - start, training, questions, causal)


def _outlined(packed: PackedRows) -> PackedRows:
    stems: dict[Row, Row] = {}
    return PackedRows(tuple(outline(row, stems) for row in packed.rows), packed.option_count)


class PlannedSweep(NamedTuple):
    """A sweep, how often it is made, whether its clean residuals are kept from another, and its part of the run."""

    jobs: list[Job]
    times: float = 1
    cached: bool = False
    part: str = ""
    documents: int = 0


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


def _joined(chunks: Sequence[PackedRows]) -> PackedRows:
    return PackedRows(
        tuple(row for packed in chunks for row in packed.rows), sum(packed.option_count for packed in chunks)
    )
