"""Documents of a task in the paper's protocol: rows selected, demonstrations drawn, all of it prompted."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from lm_eval.api.task import ConfigurableTask

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import CORRECTED, Protocol
from lowmem_icl.tasks.catalogue import main_metric
from lowmem_icl.tasks.demonstrations import PER_DOCUMENT, Demonstrations
from lowmem_icl.tasks.document_counts import DocumentLimit, Limit, document_count
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.prompting import DIRECT_PROMPTER, Prompt, Prompter, PromptKey, PromptRequest
from lowmem_icl.tasks.selection import Member, Part, RowRequest, SelectedRow, SplitRows, selected_rows
from lowmem_icl.tasks.sources import load_members, rows_digest

__all__ = ["Document", "OpenTask", "Part", "TaskRows", "open_task"]


@dataclass
class OpenTask:
    """A task whose rows are loaded; `rows` gives documents for a shot count and a part of the protocol.

    files_digest: of the files that its rows were read from, None where they came from the hub.
    """

    name: str
    tasks: list[ConfigurableTask]
    files_digest: str | None = None

    @cached_property
    def members(self) -> list[Member]:
        """The lm-eval tasks that make up the task, with their rows."""
        return [
            Member(
                number,
                task,
                SplitRows(task.eval_docs),
                SplitRows(task.training_docs()) if self.has_train else None,
            )
            for number, task in enumerate(self.tasks)
        ]

    @cached_property
    def rows_digest(self) -> str:
        """SHA-256 of all rows that documents and demonstrations come from, or of their files."""
        if self.files_digest is not None:
            return self.files_digest
        digests = [
            (member.evaluation.digest, None if member.train is None else member.train.digest)
            for member in self.members
        ]
        return hashlib.sha256(repr(digests).encode()).hexdigest()

    @property
    def metric(self) -> str:
        """The task's main metric."""
        return main_metric(list(self.tasks[0].aggregation()))

    @cached_property
    def has_train(self) -> bool:
        """Whether demonstrations and training documents come from a split of their own."""
        return all(task.has_training_docs() for task in self.tasks)

    @property
    def has_alternatives(self) -> bool:
        """Whether documents have options to choose among, and not one continuation each."""
        return all(task.OUTPUT_TYPE != "loglikelihood" for task in self.tasks)

    @property
    def evaluation_split(self) -> str:
        """The file's name of the split that is evaluated on: test if the task has one, else validation."""
        first = self.tasks[0]
        return str(first.config.test_split if first.has_test_docs() else first.config.validation_split)

    def rows(
        self,
        *,
        shots: int,
        part: Part,
        limit: Limit | DocumentLimit,
        demonstrations: Demonstrations = PER_DOCUMENT,
        protocol: Protocol = CORRECTED,
        prompter: Prompter = DIRECT_PROMPTER,
    ) -> TaskRows:
        """Return the documents of a part; `limit` counts documents (MultiRC: questions), below 1 it is a
        fraction of them, None takes all.

        Part `importance` is that of `train` with the texts whose gradients are taken. Documents that share a
        set of demonstrations stand together; where those of a set do not fit the model's context, its first
        demonstrations are left out. Raises InputError for a limit that takes none, for more demonstrations
        than there are rows to draw from, and for a row that lacks a field.
        """
        limit = limit if isinstance(limit, DocumentLimit) else DocumentLimit(limit)
        if limit.wanted is not None and limit.wanted <= 0:
            raise InputError(f"--limit: expected at least 1, or a fraction, got {limit.wanted}")
        request = RowRequest(self.name, shots, part, demonstrations, protocol)
        counts = [partial(document_count, member, part, protocol) for member in self.members]
        documents: list[Document] = []
        offset = 0
        for member, share in zip(self.members, limit.shares(counts), strict=True):
            if share != 0:
                rows = selected_rows(member, request, share)
                documents += _PartOfMember(member, request, offset, prompter).documents(rows)
            offset += len(member.scored(part))
        if not documents:
            raise InputError(
                f"task {self.name}: no row is left for its {part} part; "
                "without a train split it needs at least 2 rows"
            )
        documents.sort(key=lambda document: (document.member, document.set_number or 0))
        split = "train" if part != "evaluate" and self.has_train else self.evaluation_split
        return TaskRows(self.name, shots, split, tuple(documents), self.metric, tuple(self.tasks))


@dataclass(frozen=True)
class _PartOfMember:
    """The documents of one member in a part; their indices run on from `offset`."""

    member: Member
    request: RowRequest
    offset: int
    prompter: Prompter

    def documents(self, rows: Iterable[SelectedRow]) -> Iterator[Document]:
        """Yield the documents of rows; a set of demonstrations loses its first ones until all of them fit."""
        alone: list[SelectedRow] = []
        sharing: dict[int, list[SelectedRow]] = {}
        for row in rows:
            number = row.draw.set_number
            (alone if number is None else sharing.setdefault(number, [])).append(row)
        yield from self._prompted(alone, 0)
        for together in sharing.values():
            yield from self._fitted(together)

    def _fitted(self, rows: list[SelectedRow]) -> Iterator[Document]:
        """Yield the documents of rows that share a set, with as many demonstrations as all have room for."""
        for dropped in range(self.request.shots + 1):
            prompts = self._prompts(rows, dropped)
            if dropped == self.request.shots or all(self.prompter.fits(prompt) for prompt in prompts):
                yield from self._documents(rows, prompts, dropped)
                return

    def _prompted(self, rows: list[SelectedRow], dropped: int) -> Iterator[Document]:
        yield from self._documents(rows, self._prompts(rows, dropped), dropped)

    def _prompts(self, rows: list[SelectedRow], dropped: int) -> list[Prompt]:
        """Return the prompts of rows without the first `dropped` of their demonstrations."""
        return self.prompter.prompts([self._request(row, dropped) for row in rows])

    def _request(self, row: SelectedRow, dropped: int) -> PromptRequest:
        member, part, protocol = self.member, self.request.part, self.request.protocol
        from_train = part != "evaluate" and member.train is not None
        key = PromptKey(member.number, from_train, row.index, row.draw.indices[dropped:])
        split = "evaluate" if part == "evaluate" else "train"
        scored = PromptRequest(key, split, member.task, row.row, member.shown, protocol)
        if part == "importance" and scored.has_gradient_form:
            return replace(scored, key=replace(key, for_gradients=True))
        return scored

    def _documents(
        self, rows: Iterable[SelectedRow], prompts: Iterable[Prompt], dropped: int
    ) -> Iterator[Document]:
        for row, prompt in zip(rows, prompts, strict=True):
            yield Document(
                index=self.offset + row.index,
                options=prompt.options,
                gold=prompt.gold,
                cluster=row.cluster,
                demonstrations=row.draw.indices[dropped:],
                unit=row.unit,
                member=self.member.number,
                row=row.row,
                set_number=row.draw.set_number,
                dropped=dropped,
            )


def open_task(name: str, data_dir: Path | None) -> OpenTask:
    """Load a task's definition and rows: a plain name, `lm-eval:NAME` or a path to JSON lines or pairs.

    Raises InputError naming what is not known, missing or malformed.
    """
    members = load_members(name, data_dir)
    return OpenTask(name, members, rows_digest(name, data_dir))
