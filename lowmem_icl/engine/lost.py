"""What passes do once something on the way was not finite: results that show it, and a place for every job.

Of what is whole nothing is looked at but its results.
"""

from collections.abc import Sequence

import numpy as np

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores
from lowmem_icl.engine.patch_jobs import PatchJob
from lowmem_icl.engine.places import Place, Suspect, of_unit, places_of
from lowmem_icl.engine.schedule import BlockRow, Job
from lowmem_icl.engine.setup import Lost, PassSetup
from lowmem_icl.engine.unit_gradients import GradientJob, UnitGradients
from lowmem_icl.engine.unit_means import MeanSums
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.rows import PackedRows, Row

SOMEWHERE = "a layer"
WAY_BACK = "on the way back"


def report_sweep(setup: PassSetup, jobs: Sequence[Job], results: Sequence[Scores]) -> None:
    """Name the first document of every job whose scores are not finite, under the first mask where one is."""
    for index, (job, result) in enumerate(zip(jobs, results, strict=True)):
        bad = np.argwhere(result.scored & ~np.isfinite(result.logprobs))
        if not len(bad):
            continue
        mask, row = job.masks[bad[0, 0]], _row_of(job.packed, int(bad[0, 1]))
        # What the clean run meets, it meets under masks too.
        clean, masked = places_of(setup, [Suspect(row), Suspect(row, mask, job.fills)])
        place = clean or masked or Place(SOMEWHERE, _owner(row, int(bad[0, 1])))
        removed = Mask() if clean is not None else mask
        setup.lost.append(Lost(index, place.document, place.where, removed))


def _row_of(packed: PackedRows, option: int) -> Row:
    return next(row for row in packed.rows if option in row.answered)


def _owner(row: Row, option: int) -> int:
    return int(row.owners[row.read_at[row.options == option][0]])


def mark_gradients(
    setup: PassSetup,
    jobs: Sequence[GradientJob],
    block: Sequence[BlockRow],
    results: Sequence[UnitGradients],
) -> None:
    """Make NaN what rows have that lose a value on the way forward, if any of a block does."""
    if not setup.model.watch.overflowed():
        return
    suspects = [Suspect(of.row, jobs[of.job].residual_mask, jobs[of.job].fills) for of in block]
    for member, place in zip(block, places_of(setup, suspects), strict=True):
        if place is not None:
            results[member.job].logprobs[member.row.answered] = np.nan


def report_gradients(setup: PassSetup, jobs: Sequence[GradientJob], results: Sequence[UnitGradients]) -> None:
    """Name the first document of every job whose gradients are not finite."""
    for index, (job, result) in enumerate(zip(jobs, results, strict=True)):
        if len(bad := np.flatnonzero(~np.isfinite(result.logprobs))):
            row = next(row for row in job.rows if bad[0] in row.answered)
            (place,) = places_of(setup, [Suspect(row, job.residual_mask, job.fills)])
            place = place or Place(SOMEWHERE, _owner(row, int(bad[0])))
            setup.lost.append(Lost(index, place.document, place.where, job.mask))
        elif (found := _first_gradient(result)) is not None:
            setup.lost.append(Lost(index, found[0], f"{of_unit(found[1])}, {WAY_BACK}", job.mask))


def _first_gradient(result: UnitGradients) -> tuple[int, Unit] | None:
    """Return the first document with a gradient that is not finite, and the unit: coming back, the last
    layer's is the first.
    """
    heads = ~(np.isfinite(result.head_signed) & np.isfinite(result.head_absolute))
    ffns = ~(np.isfinite(result.ffn_signed) & np.isfinite(result.ffn_absolute))
    owners = np.flatnonzero(heads.any((1, 2)) | ffns.any(1))
    if not len(owners):
        return None
    owner = int(owners[0])
    layer = int(np.flatnonzero(heads[owner].any(1) | ffns[owner])[-1])
    if ffns[owner, layer]:
        return owner, Unit("ffn", layer)
    return owner, Unit("head", layer, int(np.flatnonzero(heads[owner, layer])[0]))


def mark_means(setup: PassSetup, block: Sequence[BlockRow], results: Sequence[MeanSums]) -> None:
    """Make NaN the sums that have rows of a block in them which lose a value, if any does."""
    if not setup.model.watch.overflowed():
        return
    for member, place in zip(block, places_of(setup, [Suspect(of.row) for of in block]), strict=True):
        if place is not None:
            results[member.job].heads[:] = np.nan


def report_means(setup: PassSetup, packed: Sequence[PackedRows], results: Sequence[MeanSums]) -> None:
    """Name the first document of every task whose sums are not finite."""
    for index, (of_task, result) in enumerate(zip(packed, results, strict=True)):
        if np.isfinite(result.heads).all() and np.isfinite(result.ffns).all():
            continue
        places = enumerate(places_of(setup, [Suspect(row) for row in of_task.rows]))
        found = next(((number, place) for number, place in places if place is not None), None)
        number, place = found or (0, Place(SOMEWHERE, 0))
        # Rows of prompts that are of no document are counted.
        document = place.document if len(of_task.rows[number].answered) else number
        setup.lost.append(Lost(index, document, place.where))


def mark_heads(
    setup: PassSetup, block: Sequence[BlockRow], questions: HeadQuestions, results: HeadScores
) -> None:
    """Make NaN the scores on sequences of a block that lose a value, if any does."""
    if not setup.model.watch.overflowed():
        return
    sequences = len(questions.base_tokens)
    for member, place in zip(block, places_of(setup, [Suspect(of.row) for of in block]), strict=True):
        if place is not None and member.job < sequences:
            results.prefix_matching[member.job] = np.nan
        elif place is not None:
            results.copying[member.job - sequences] = np.nan


def report_heads(setup: PassSetup, questions: HeadQuestions, results: HeadScores) -> None:
    """Name the first sequence on which scores are not finite."""
    of_patterns = (results.prefix_matching, results.previous_token, results.duplicate_token)
    asked = [*of_patterns, *([results.copying] if questions.unrepeated else [])]
    bad = [~np.isfinite(scores) for scores in asked]
    lost = np.flatnonzero(np.any([each.any((1, 2)) for each in bad], 0))
    if not len(lost):
        # Of weights alone; a head that writes nothing has no number either, which is none to fail for.
        for layer, head in np.argwhere(np.isinf(results.copying_eigenvalues))[:1].tolist():
            setup.lost.append(Lost(0, 0, f"{of_unit(Unit('head', layer, head))}, from tokens to logits,"))
        return
    sequence = int(lost[0])
    rows = [questions.repeated[sequence], *questions.unrepeated[sequence : sequence + 1]]
    found = [place for place in places_of(setup, [Suspect(row) for row in rows]) if place is not None]
    if found:
        where = found[0].where
    else:
        layer, head = np.argwhere(np.any([each[sequence] for each in bad], 0))[0].tolist()
        where = of_unit(Unit("head", layer, head))
    setup.lost.append(Lost(0, sequence, where))


def report_patches(setup: PassSetup, jobs: Sequence[PatchJob], results: Sequence[Scores]) -> None:
    """Name every job under whose changes scores are not finite, and the first change that did it."""
    bad = {
        index: int(np.flatnonzero(flags)[0])
        for index, result in enumerate(results)
        if (flags := (result.scored & ~np.isfinite(result.logprobs)).any(1)).any()
    }
    rows = list(dict.fromkeys(row for index in bad for row in jobs[index].rows))
    place_of = dict(zip(rows, places_of(setup, [Suspect(row) for row in rows]), strict=True))
    for index, number in bad.items():
        job = jobs[index]
        place = next((found for row in job.rows if (found := place_of[row]) is not None), None)
        if place is not None:
            setup.lost.append(Lost(index, 0, place.where))
            continue
        change, first = job.changes[number], max(0, int(job.firsts[number]))
        mask = change if isinstance(change, Mask) else Mask()
        setup.lost.append(Lost(index, 0, f"a layer from {first} on", mask, number))
