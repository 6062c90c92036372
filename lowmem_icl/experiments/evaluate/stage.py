"""The evaluate stage: all tasks on the evaluation split, clean and under the masks that were given."""

from collections.abc import Iterator, Mapping

import polars as pl

from lowmem_icl.experiments.evaluate import measure
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult, stamp
from lowmem_icl.session.work import SweepPart, Work, scores_by_task, sweep_in_chunks
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks

CHUNK = 128


def parts(prepared: Prepared) -> list[SweepPart]:
    """Return the sweeps of the evaluation documents, clean and under the given masks."""
    return clean_parts(prepared, prepared.masks)


def clean_parts(prepared: Prepared, masks: Mapping[str, Mask]) -> list[SweepPart]:
    """Return the sweeps of the evaluation documents, clean and under masks; whichever stage comes first makes
    them.
    """
    tasks = prepared.evaluate
    named = (Mask(), *masks.values())
    return sweep_in_chunks("evaluate", "evaluate", tasks, [named] * len(tasks), CHUNK)


def run(work: Work) -> Iterator[StageResult]:
    """Evaluate all tasks clean and under the given masks."""
    prepared = work.prepared
    found, answers = evaluated(work, parts(prepared), prepared.masks)
    results = blocks.frame("results", found, stamp(prepared, "evaluate"))
    yield StageResult(
        results=pl.concat([results, over_tasks(results)]), answers=blocks.frame("answers", answers)
    )


def evaluated(
    work: Work, sweeps: list[SweepPart], masks: Mapping[str, Mask]
) -> tuple[list[blocks.Block], list[blocks.Block]]:
    """Return the records of all tasks clean and under masks, and blocks of their option scores."""
    prepared = work.prepared
    tasks = prepared.evaluate
    named = {CLEAN: Mask(), **masks}
    scores = scores_by_task(tasks, sweeps, [work.sweep(part) for part in sweeps])
    found: list[blocks.Block] = []
    answers: list[blocks.Block] = []
    for task, score in zip(tasks, scores, strict=True):
        packed = prepared.pack(task)
        for index, (name, mask) in enumerate(named.items()):
            under = measure.MaskScores(name, mask, score.logprobs[index], score.greedy[index])
            found += measure.evaluation_records(packed, under, prepared.options.seed)
            answers.append(measure.answer_columns(packed, name, score.logprobs[index]))
    return found, answers
