"""Rows of documents whose removed units get other documents' values, with these documents beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lowmem_icl.engine.fills import Donor, RowValues
from lowmem_icl.rows import PackedRows, Row, outline
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.tasks.document_sizes import estimated_rows
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.donors import aligned, donor_from, donor_path, donors_among, rows_alone
from lowmem_icl.tasks.row_arrays import outlined_row

POOLS = ("evaluate", "train", "importance", "curves", "label_controls", "train_controls")
"""The documents of a run that give values to each other, by field of Prepared; where one holds all documents
asked for, the others are not looked at, so that a document has one donor in all of a run.
"""


@dataclass(frozen=True, eq=False)
class ResampledRows:
    """Rows that hold one document each, and what stands in place of their units' outputs."""

    packed: PackedRows
    values: RowValues


def is_resampled(prepared: Prepared) -> bool:
    """Tell whether any of a run's masks puts other documents' values in its units' place."""
    given = (mask.ablation for mask in prepared.masks.values())
    return "resample" in (prepared.options.ablation, *given)


def resampled_rows(
    prepared: Prepared, task: TaskRows, documents: slice, seed: int, *, gold_only: bool = False
) -> ResampledRows:
    """Return the rows of some documents of a task, and by row the document of the same task, shot count and
    split that the seed gives it; raises InputError where there is none.
    """
    packed = prepared.pack(task, documents)
    pool, numbers = _donors(prepared, task, seed)
    chosen = numbers[documents]
    # Of each donor one row, which several rows of a document share.
    givers = sorted(set(chosen))
    of_givers = prepared.pack(replace(pool, documents=tuple(pool.documents[number] for number in givers)))
    paths = {giver: donor_path(of_givers, place) for place, giver in enumerate(givers)}
    alone = rows_alone(packed, gold_only=gold_only)
    donors = {
        each.row: Donor(paths[chosen[each.document]].row, aligned(each, paths[chosen[each.document]]))
        for each in alone
    }
    return ResampledRows(PackedRows(tuple(donors), len(packed.options)), RowValues(donors))


def resampled_outlines(
    prepared: Prepared, task: TaskRows, documents: slice, seed: int, *, gold_only: bool = False
) -> ResampledRows:
    """Return the same in its sizes alone, without content."""
    # A plan asks for the same ones again and again. The task is kept with them, so that its id stays its.
    key = (id(task), documents.start, documents.stop, documents.step, seed, gold_only)
    if key not in prepared.resampled:
        make = _estimated if prepared.sample_note else _outlined
        prepared.resampled[key] = task, make(prepared, task, documents, seed, gold_only)
    found = prepared.resampled[key][1]
    assert isinstance(found, ResampledRows)
    return found


def _outlined(
    prepared: Prepared, task: TaskRows, documents: slice, seed: int, gold_only: bool
) -> ResampledRows:
    exact = resampled_rows(prepared, task, documents, seed, gold_only=gold_only)
    stems: dict[Row, Row] = {}
    givers = {donor.row: outline(donor.row, stems) for donor in exact.values.donors.values()}
    return _without_content(
        {outline(row, stems): givers[donor.row] for row, donor in exact.values.donors.items()},
        exact.packed.option_count,
    )


def _estimated(
    prepared: Prepared, task: TaskRows, documents: slice, seed: int, gold_only: bool
) -> ResampledRows:
    pool, numbers = _donors(prepared, task, seed)
    givers: dict[int, Row] = {}
    rows: dict[Row, Row] = {}
    for document, number in zip(task.documents[documents], numbers[documents], strict=True):
        if number not in givers:
            (path,) = _alone(pool.documents[number], gold_only=True)
            givers[number] = outlined_row(len(path), 0, None)
        rows |= dict.fromkeys(_alone(document, gold_only=gold_only), givers[number])
    return _without_content(rows, len(rows))


def _alone(document: Document, *, gold_only: bool) -> Sequence[Row]:
    """Return the outline of a document of known sizes by itself."""
    return estimated_rows([document], 1, gold_only=gold_only).rows


def _without_content(rows: Mapping[Row, Row], option_count: int) -> ResampledRows:
    donors = {row: Donor(giver, np.broadcast_to(np.int64(0), len(row))) for row, giver in rows.items()}
    return ResampledRows(PackedRows(tuple(donors), option_count), RowValues(donors))


def _donors(prepared: Prepared, task: TaskRows, seed: int) -> tuple[TaskRows, list[int]]:
    """Return the documents that give values, and of every document of a task the number of the one that
    gives it its.

    Those that certify masks take from the training documents: so what they lose are independent of each
    other.
    """
    wanted = [_key(document) for document in task.documents]
    for name in POOLS:
        for pool in getattr(prepared, name):
            if _setting(pool) == _setting(task):
                place = {_key(document): number for number, document in enumerate(pool.documents)}
                if all(key in place for key in wanted):
                    of_pool = donors_among(pool, seed)
                    return pool, [of_pool[place[key]] for key in wanted]
    train = next(pool for pool in prepared.train if _setting(pool) == _setting(task))
    return train, [donor_from(train, seed, document) for document in task.documents]


def _setting(task: TaskRows) -> tuple[str, int, str, str]:
    return task.task, task.shots, task.split, task.labels


def _key(document: Document) -> tuple[int, int]:
    return document.member, document.index
