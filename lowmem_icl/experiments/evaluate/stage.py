"""The evaluate stage: all tasks on the evaluation split, clean and under the masks that were given, then with
other answers shown.
"""

from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.evaluate import measure
from lowmem_icl.experiments.evaluate.measure import MaskScores
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.session.chunks import scores_by_task, sweep_in_chunks
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult, stamp
from lowmem_icl.session.work import SweepPart, Work
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tasks.documents import TaskRows

CHUNK = 128


def parts(prepared: Prepared) -> list[SweepPart]:
    """Return the sweeps of the evaluation documents, clean and under the given masks, and of the controls."""
    return [*clean_parts(prepared, prepared.masks), *control_parts(prepared)]


def clean_parts(prepared: Prepared, masks: Mapping[str, Mask]) -> list[SweepPart]:
    """Return the sweeps of the evaluation documents, clean and under masks; whichever stage comes first makes
    them.
    """
    tasks = prepared.evaluate
    named = (Mask(), *masks.values())
    return sweep_in_chunks("evaluate", "evaluate", tasks, [named] * len(tasks), CHUNK)


def control_parts(prepared: Prepared) -> list[SweepPart]:
    """Return the clean sweeps of the evaluation documents with other answers shown."""
    controls = prepared.label_controls
    if not controls:
        return []
    return sweep_in_chunks("evaluate-labels", "evaluate labels", controls, [(Mask(),)] * len(controls), CHUNK)


def run(work: Work) -> Iterator[StageResult]:
    """Evaluate all tasks clean and under the given masks, then the controls; yields after each."""
    prepared = work.prepared
    scores = _scores(work, prepared.evaluate, clean_parts(prepared, prepared.masks))
    found, answers = _evaluated(prepared, scores, prepared.masks)
    results = blocks.frame("results", found, stamp(prepared, "evaluate"))
    first = StageResult(
        results=pl.concat([results, over_tasks(results)]),
        answers=blocks.frame("answers", answers),
        warnings=(*prepared.notes, *measure.single_cluster_notes(prepared.evaluate)),
    )
    yield first
    if prepared.label_controls:
        controls = _controls(work, scores, results)
        yield StageResult(
            results=pl.concat([first.results, controls]), answers=first.answers, warnings=first.warnings
        )


def _scores(work: Work, tasks: Sequence[TaskRows], sweeps: Sequence[SweepPart]) -> list[Scores]:
    return scores_by_task(tasks, sweeps, [work.sweep(part) for part in sweeps])


def _evaluated(
    prepared: Prepared, scores: Sequence[Scores], masks: Mapping[str, Mask]
) -> tuple[list[blocks.Block], list[blocks.Block]]:
    named = {CLEAN: Mask(), **masks}
    found: list[blocks.Block] = []
    answers: list[blocks.Block] = []
    for task, score in zip(prepared.evaluate, scores, strict=True):
        packed = prepared.pack(task)
        for index, (name, mask) in enumerate(named.items()):
            under = MaskScores(name, mask, score.logprobs[index], score.greedy[index])
            found += measure.evaluation_records(packed, under)
            if name != CLEAN:
                found += measure.drop_records(packed, _clean(score), under)
            answers.append(measure.answer_columns(packed, name, score.logprobs[index]))
    return found, answers


def _controls(work: Work, with_right: Sequence[Scores], results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of the controls, their means over tasks and what right labels give beyond them.

    results: the records with right labels, which say of which tasks a mean must be.
    """
    prepared = work.prepared
    right = {
        (task.task, task.shots): (task, _clean(score))
        for task, score in zip(prepared.evaluate, with_right, strict=True)
    }
    scored: list[blocks.Block] = []
    effects: list[blocks.Block] = []
    scores = _scores(work, prepared.label_controls, control_parts(prepared))
    for control, score in zip(prepared.label_controls, scores, strict=True):
        task, under = right[control.task, control.shots]
        scored += measure.evaluation_records(prepared.pack(control), _clean(score))
        effects += measure.label_effect_records(task, control, under, _clean(score))
    stamped = stamp(prepared, "evaluate")
    of_tasks, gained = (blocks.frame("results", found, stamped) for found in (scored, effects))
    means = over_tasks(pl.concat([results, of_tasks])).filter(pl.col("labels") != "right")
    # A task without a control has no part in the mean of what labels give.
    mean_gains = [over_tasks(of_control) for of_control in gained.partition_by("labels", maintain_order=True)]
    return pl.concat([of_tasks, means, gained, *mean_gains])


def _clean(score: Scores) -> MaskScores:
    return MaskScores(CLEAN, Mask(), score.logprobs[0], score.greedy[0])
