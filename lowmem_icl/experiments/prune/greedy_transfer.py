"""What a task's greedy mask leaves of the other tasks: every task under the greedy masks of all tasks at its
shot count, on the documents that curves are judged on.
"""

from collections.abc import Iterator, Sequence

import polars as pl

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.evaluate import measure as evaluation
from lowmem_icl.experiments.evaluate.stage import CHUNK
from lowmem_icl.experiments.prune import measure
from lowmem_icl.experiments.prune.judging import mask_fields
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.chunks import scores_by_task, sweep_in_chunks
from lowmem_icl.session.fills import expected_mask
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import MaskResult, stamp
from lowmem_icl.session.work import SweepPart, Work
from lowmem_icl.tables import blocks
from lowmem_icl.tables.schema import empty_frame
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask

PART = "prune-transfer"
LABEL = "masks on other tasks"

Masks = Sequence[Mask]


def expected_parts(prepared: Prepared) -> list[SweepPart]:
    """Return the sweeps as if no two tasks had the same mask and every mask began in the first layer."""
    stand_in = expected_mask(prepared.options, Mask(ffns=frozenset([0])))
    made = [MaskResult("", stand_in, "greedy", task.task, task.shots, 0) for task in prepared.curves]
    return _parts(prepared, [[Mask(), *[stand_in] * len(_masks_for(made, task))] for task in prepared.curves])


def _masks_for(made: Sequence[MaskResult], task: TaskRows) -> list[MaskResult]:
    """Return the greedy masks that a task is judged under: its own, and those of all tasks but the ones that
    are out of domain, by which no other is pruned.
    """
    return [
        mask
        for mask in made
        if mask.method == "greedy"
        and mask.task != AGGREGATE
        and mask.shots == task.shots
        and (mask.task == task.task or in_domain(mask.task))
    ]


def _parts(prepared: Prepared, masks: Sequence[Masks]) -> list[SweepPart]:
    """Return the sweeps of all tasks under each one's masks; none of a single task."""
    tasks = prepared.curves
    if len({task.task for task in tasks}) < 2:
        return []
    return sweep_in_chunks(PART, LABEL, tasks, masks, CHUNK)


def transferred(work: Work, made: Sequence[MaskResult]) -> pl.DataFrame:
    """Return the evaluation of every task, clean and under the greedy masks of the tasks, its own among them;
    empty for a single task.

    made: all masks of the searches. Masks that remove the same are swept once. There are no means over tasks:
    a mask's mean would hold the task that it was made for.
    """
    prepared = work.prepared
    tasks = prepared.curves
    greedy = [_masks_for(made, task) for task in tasks]
    swept = [tuple(dict.fromkeys([Mask(), *(mask.mask for mask in masks)])) for masks in greedy]
    parts = _parts(prepared, swept)
    if not parts:
        return empty_frame("results")
    scores = scores_by_task(tasks, parts, [work.sweep(part) for part in parts])
    found: list[blocks.Block] = []
    for task, score, masks, of_masks in zip(tasks, scores, greedy, swept, strict=True):
        found += _records(prepared.pack(task), score, masks, of_masks)
    return blocks.frame("results", found, stamp(prepared, "prune") | {"procedure": "greedy-transfer"})


def _records(
    task: PackedTask, score: Scores, made: Sequence[MaskResult], swept: Masks
) -> Iterator[blocks.Block]:
    """Yield the records of a task, clean and under the masks made, from its scores under the masks swept, the
    first of which is the clean run.
    """
    under = measure.scores_under_masks(task, score.logprobs, score.greedy)
    lost = measure.drop_records(task, under.at([0]), under)
    yield from evaluation.evaluation_records(task, _under(CLEAN, score, swept, Mask()))
    for mask in made:
        records = evaluation.evaluation_records(task, _under(mask.name, score, swept, mask.mask))
        for record in (*records, *lost[swept.index(mask.mask)].values()):
            yield {**record, **mask_fields(mask)}


def _under(name: str, score: Scores, swept: Masks, mask: Mask) -> evaluation.MaskScores:
    index = swept.index(mask)
    return evaluation.MaskScores(name, mask, score.logprobs[index], score.greedy[index])
