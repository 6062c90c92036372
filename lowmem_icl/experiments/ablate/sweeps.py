"""What ablations sweep: which units of every task, and its documents in chunks, all tasks side by side."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.ablate import measure
from lowmem_icl.experiments.importance.stage import ImportanceResult
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.session.chunks import joined, masked_chunk, most_documents
from lowmem_icl.session.fills import clean_beside, fill_for
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.work import SweepPart
from lowmem_icl.tasks.documents import Document, TaskRows

LARGEST_CHUNK = 16


@dataclass(frozen=True, eq=False)
class Selection:
    """Which units of one task and shot count are ablated exactly, by their indices, and what is known of all.

    estimates: None where nothing is screened; drawn: the units that chance picked.
    """

    exact: NDArray[np.int64]
    drawn: NDArray[np.int64]
    estimates: measure.Estimates | None = None


def selections(prepared: Prepared, importance: ImportanceResult | None) -> list[Selection]:
    """Return which units of every task are ablated exactly: all, or by screening those that estimates leave
    open.

    Before there are estimates as many stand for them, spread over all layers.
    """
    options, n_units = prepared.options, len(units_of(prepared))
    everything = np.arange(n_units)
    if options.screen is None:
        return [Selection(everything, everything[:0])] * len(prepared.train)
    assert importance is not None, "options check that a screen has its estimates"
    if not importance.attribution:
        spread = np.linspace(0, n_units - 1, min(options.resolved_exact, n_units)).round().astype(np.int64)
        return [Selection(spread, spread[:0])] * len(prepared.train)
    selected = []
    for task in prepared.train:
        by_document = importance.attribution[task.task, task.shots]
        estimates = measure.Estimates.of_documents(by_document, _clusters_of(prepared, task))
        exact, drawn = measure.screened(estimates, options.resolved_exact, options.seed)
        selected.append(Selection(exact, drawn, estimates))
    return selected


def _clusters_of(prepared: Prepared, task: TaskRows) -> list[str]:
    """Return the clusters of the documents that a task's estimates are of."""
    return next(of.clusters for of in prepared.importance if (of.task, of.shots) == (task.task, task.shots))


def units_of(prepared: Prepared) -> list[Unit]:
    """Return all units of the model, in the order in which their indices count."""
    return measure.ablated_units(prepared.skeleton.layers, prepared.skeleton.heads)


def doubling_chunks(n_documents: int, largest: int = LARGEST_CHUNK) -> list[slice]:
    """Return documents in chunks of 1, 1, 2, 4, 8, …: all units are measured early, and then better."""
    chunks: list[slice] = []
    start, size = 0, 1
    while start < n_documents:
        chunks.append(slice(start, min(n_documents, start + size)))
        start, size = start + size, min(largest, max(1, start + size))
    return chunks


def every_set_first(task: TaskRows) -> TaskRows:
    """Return a task with a document of each shared set of demonstrations first, then all others as they
    stand.

    Documents of one set alone say nothing about other demonstrations, and would be all there are where a run
    stops early.
    """
    first: list[Document] = []
    rest: list[Document] = []
    seen: set[tuple[int, int]] = set()
    for document in task.documents:
        if document.set_number is None or (document.member, document.set_number) in seen:
            rest.append(document)
        else:
            seen.add((document.member, document.set_number))
            first.append(document)
    return replace(task, documents=(*first, *rest)) if first else task


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over the documents of tasks: all with right labels, or all with shuffled ones.

    tasks: as they stand; swept: with their documents in the order of the chunks; `is_control`: whether labels
    are shuffled, which another pass with right ones has come before.
    """

    tasks: tuple[TaskRows, ...]
    swept: tuple[TaskRows, ...]
    selected: tuple[Selection, ...]
    parts: tuple[SweepPart, ...]
    is_control: bool

    @classmethod
    def over(
        cls,
        prepared: Prepared,
        tasks: Sequence[TaskRows],
        selected: Sequence[Selection],
        *,
        is_control: bool,
    ) -> "Pass":
        """Return the pass over tasks under every unit selected for each of them alone."""
        swept = tuple(every_set_first(task) for task in tasks)
        units = units_of(prepared)
        # Where nothing is screened all tasks share one selection; of a large model that is many masks.
        made: dict[tuple[int, str | None], tuple[Mask, ...]] = {}
        masks = []
        for task, selection in zip(tasks, selected, strict=True):
            fill = fill_for(prepared.options, task.task, task.shots)
            if (key := (id(selection), fill)) not in made:
                removed = (units[index].as_mask().filled(fill) for index in selection.exact)
                made[key] = (clean_beside(fill), *removed)
            masks.append(made[key])
        name, label = ("ablate-labels", "ablate, labels shuffled") if is_control else ("ablate", "ablate")
        whole = most_documents(prepared.train)
        chunks = doubling_chunks(most_documents(tasks))
        parts = tuple(
            SweepPart(
                f"{name}-{chunk.start:06d}",
                f"{label}, chunk {number} of {len(chunks)}",
                masked_chunk(swept, masks, chunk),
                documents_before=whole if is_control else chunk.start,
                documents=whole if is_control else chunk.stop,
            )
            for number, chunk in enumerate(chunks, start=1)
        )
        return cls(tuple(tasks), swept, tuple(selected), parts, is_control)

    def documents_before(self, part: SweepPart) -> str:
        """Say how many documents per task are done before a part of the pass."""
        reached = part.jobs[0].documents.start
        labels = " with shuffled labels" if self.is_control else ""
        return f"{reached} of {most_documents(self.tasks)} documents per task{labels}"


def passes(prepared: Prepared, importance: ImportanceResult | None) -> list[Pass]:
    """Return the pass with right labels and, where they are asked for, that with shuffled ones after it."""
    selected = selections(prepared, importance)
    found = [Pass.over(prepared, prepared.train, selected, is_control=False)]
    if prepared.train_controls:
        by_setting = {
            (task.task, task.shots): selection
            for task, selection in zip(prepared.train, selected, strict=True)
        }
        of_controls = [by_setting[task.task, task.shots] for task in prepared.train_controls]
        found.append(Pass.over(prepared, prepared.train_controls, of_controls, is_control=True))
    return found


def scored_so_far(task: TaskRows, swept: TaskRows, chunks: Sequence[Scores]) -> tuple[TaskRows, Scores]:
    """Return a task with the documents that are swept, in its own order, and their scores in the same.

    swept: the task with its documents in the order of the chunks, of which there may be only the first.
    """
    scores = joined(chunks)
    ends = list(itertools.accumulate(len(document.options) for document in swept.documents))
    done = swept.documents[: ends.index(scores.logprobs.shape[1]) + 1]
    place = {document.index: number for number, document in enumerate(task.documents)}
    order = sorted(range(len(done)), key=lambda number: place[done[number].index])
    options = np.concatenate(
        [np.arange(ends[number] - len(done[number].options), ends[number]) for number in order]
    )
    in_order = Scores(scores.logprobs[:, options], scores.greedy[:, options], scores.scored[:, options])
    return replace(task, documents=tuple(done[number] for number in order)), in_order
