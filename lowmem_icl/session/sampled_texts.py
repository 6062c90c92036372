"""The documents of a run by their sizes, for a plan that nobody has tokenised the texts for; kept beside
stores.

    <store dir>/texts/sizes-<key>.npz    sizes of all documents of some options, from those of a few

The key is a digest of all that sizes depend on. A file that is damaged is made again; where the folder cannot
be written to, nothing is kept.
"""

import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import CORRUPTIONS, LABELS, PromptForm
from lowmem_icl.session.document_limits import part_limits
from lowmem_icl.session.task_texts import TaskDocuments, changed_only, part_rows, with_others
from lowmem_icl.system.files import atomic_path
from lowmem_icl.tasks.document_sizes import LONGEST, TOKENISED, SizeModel, fitted, with_sizes
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.packing import PackingLimits, Tokenise, fit_context
from lowmem_icl.tasks.unread import (
    DocumentSize,
    UnreadOptions,
    UnreadPrompter,
    read_document,
    size_of,
    unread,
)

logger = logging.getLogger(__name__)

COMPARED = 16
"""Documents of which a control must change one, else it is left out."""
_DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class SampledDocuments(TaskDocuments):
    """The documents of a run without texts; `note`: what their sizes rest on, in a sentence."""

    @property
    def note(self) -> str:
        """What a plan says of the lengths it counts."""
        # Of a task at a shot count the same documents stand in several fields.
        most: dict[tuple[str, int], int] = {}
        for rows in chain(*(self.by_field.get(name, ()) for name in ("evaluate", "train", "certify"))):
            setting = rows.task, rows.shots
            most[setting] = most.get(setting, 0) + len(rows.documents)
        read = sum(min(TOKENISED + LONGEST, count) for count in most.values())
        return (
            f"lengths: about {read:,} of {sum(most.values()):,} prompts are tokenised, the longest of every "
            "task among them, and all others estimated by their characters; `run` counts exactly"
        )


@dataclass(frozen=True)
class SampledTexts:
    """A maker of documents that tokenises a few of every task and shot count."""

    options: RunOptions
    limits: PackingLimits
    tokenise: Tokenise
    _models: dict[tuple[str, int], SizeModel] = field(default_factory=dict)

    def documents(self, task: OpenTask, shots: int) -> dict[str, TaskRows]:
        """Return a task's documents at a shot count, by field of Prepared."""
        prompter = self._prompter()
        rows = {
            name: part_rows(self.options, task, shots, part, prompter)
            for name, part in part_limits(self.options).items()
        }
        every = tuple(chain.from_iterable(of_part.documents for of_part in rows.values()))
        model = fitted(replace(rows["evaluate"], documents=every), self.tokenise, self.limits)
        self._models[task.name, shots] = model
        return {name: with_sizes(of_part, model) for name, of_part in rows.items()}

    def label_controls(
        self, task: OpenTask, rows: Mapping[str, TaskRows], labels: PromptForm
    ) -> dict[str, TaskRows]:
        """Return documents, by field of Prepared, with other answers shown or corrupted; whether these change
        anything is seen by the first few.
        """
        controls = with_others(self.options, task, rows, labels, self._prompter())
        few = {name: _first_read(rows[name]) for name in controls}
        changed = changed_only(few, {name: _first_read(control) for name, control in controls.items()})
        (shots,) = {of_part.shots for of_part in rows.values()}
        model = self._models[task.name, shots]
        return {name: only_sizes(with_sizes(controls[name], model)) for name in changed}

    def _prompter(self) -> UnreadPrompter:
        return UnreadPrompter(partial(fit_context, tokenise=self.tokenise, limits=self.limits))


def only_sizes(rows: TaskRows) -> TaskRows:
    """Return documents of known sizes as they are kept, without the rows that they are made of, which take
    more memory than all else of a plan.
    """
    documents = tuple(
        Document(
            index=document.index,
            options=UnreadOptions(unread(document).identity, size=size_of(document)),
            gold=(True,),
            cluster=document.cluster,
            demonstrations=document.demonstrations,
            unit="",
            member=document.member,
            row={},
            set_number=document.set_number,
            dropped=document.dropped,
        )
        for document in rows.documents
    )
    return replace(rows, documents=documents, members=())


def _first_read(rows: TaskRows) -> TaskRows:
    return replace(rows, documents=tuple(map(read_document, rows.documents[:COMPARED])))


def has_sample(folder: Path, key: str) -> bool:
    """Tell whether documents are kept under a key."""
    return _path(folder, key).is_file()


def kept_sample(folder: Path, key: str) -> SampledDocuments | None:
    """Return the documents kept under a key; None where there are none, or they are damaged."""
    path = _path(folder, key)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return _of_arrays({name: arrays[name] for name in arrays.files})
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        logger.warning("%s is damaged (%s) and is made again", path, error)
        return None


def keep_sample(folder: Path, key: str, sample: SampledDocuments) -> None:
    """Keep documents under a key, if the folder can be written to."""
    path = _path(folder, key)
    try:
        with atomic_path(path, sync=False) as part, part.open("wb") as opened:
            np.savez_compressed(opened, allow_pickle=False, **_arrays_of(sample))
    except OSError as error:
        logger.info("%s cannot be kept (%s)", path, error)


def _path(folder: Path, key: str) -> Path:
    return folder / f"sizes-{key}.npz"


def _arrays_of(sample: SampledDocuments) -> dict[str, NDArray[Any]]:
    """Return documents as columns, those of all fields, tasks and shot counts end to end."""
    rows = [(name, of_task) for name, tasks in sample.by_field.items() for of_task in tasks]
    documents = list(chain.from_iterable(of_task.documents for _, of_task in rows))
    shown = [len(document.demonstrations) for document in documents]
    identities: dict[str, int] = {}
    clusters: dict[str, int] = {}
    numbers = [
        (
            document.index,
            document.member,
            -1 if document.set_number is None else document.set_number,
            document.dropped,
            clusters.setdefault(document.cluster, len(clusters)),
            identities.setdefault(unread(document).identity, len(identities)),
            *_columns(unread(document).size),
        )
        for document in documents
    ]
    described = {
        "fields": list(sample.by_field),
        "notes": sample.notes,
        "pair_notes": sample.pair_notes,
        "rows": [
            [name, of_task.task, of_task.shots, of_task.split, of_task.metric, of_task.labels]
            for name, of_task in rows
        ],
    }
    return {
        "described": np.frombuffer(json.dumps(described).encode(), dtype=np.uint8),
        "counts": np.array([len(of_task.documents) for _, of_task in rows], dtype=np.int64),
        "numbers": np.array(numbers, dtype=np.int64).reshape(len(documents), -1),
        "shown": np.array(shown, dtype=np.int64),
        "demonstrations": np.array(
            list(chain.from_iterable(document.demonstrations for document in documents)), dtype=np.int64
        ),
    }


def _columns(size: DocumentSize | None) -> tuple[int, ...]:
    assert size is not None, "sizes are filled in before documents are kept"
    return size.tokens, size.reads, size.gold_tokens, size.gold_reads, size.stem, size.merged


def _of_arrays(arrays: Mapping[str, NDArray[Any]]) -> SampledDocuments:
    """Return documents from `_arrays_of`; raise ValueError for arrays that do not belong together."""
    described = json.loads(bytes(arrays["described"]))
    counts, numbers = arrays["counts"].tolist(), arrays["numbers"].tolist()
    if sum(counts) != len(numbers) or len(counts) != len(described["rows"]):
        raise ValueError("its columns do not belong together")
    ends = np.cumsum(arrays["shown"])
    if len(ends) != len(numbers) or (len(ends) and ends[-1] != len(arrays["demonstrations"])):
        raise ValueError("its demonstrations do not belong together")
    shown: Sequence[int] = arrays["demonstrations"].tolist()
    starts = [0, *ends.tolist()]
    documents = [
        _document(values, tuple(shown[start:end]))
        for values, start, end in zip(numbers, starts[:-1], starts[1:], strict=True)
    ]
    by_field: dict[str, list[TaskRows]] = {name: [] for name in described["fields"]}
    start = 0
    for count, (name, task, shots, split, metric, labels) in zip(counts, described["rows"], strict=True):
        if labels not in (*LABELS, *CORRUPTIONS):
            raise ValueError(f"labels {labels!r}")
        some = tuple(documents[start : start + count])
        by_field[name].append(TaskRows(task, shots, split, some, metric, (), labels))
        start += count
    return SampledDocuments(
        {name: tuple(rows) for name, rows in by_field.items()},
        tuple(described["notes"]),
        tuple(described["pair_notes"]),
    )


def _document(values: Sequence[int], demonstrations: tuple[int, ...]) -> Document:
    index, member, set_number, dropped, cluster, identity, *size = values
    return Document(
        index=index,
        options=UnreadOptions(str(identity), size=DocumentSize(*size)),
        gold=(True,),
        cluster=str(cluster),
        demonstrations=demonstrations,
        unit="",
        member=member,
        row={},
        set_number=None if set_number < 0 else set_number,
        dropped=dropped,
    )
