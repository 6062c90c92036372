"""The same documents after demonstrations with other answers: controls for what right labels give."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lowmem_icl.protocols import Labels, Protocol
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.prompting import Prompter, PromptKey, PromptRequest, with_answer_of_another
from lowmem_icl.tasks.selection import PROTOCOL_SEED, Member, Part, demonstration_pool


class NoLabelControl(Exception):
    """The demonstrations of a task cannot show other answers; the message says why."""


def shuffled_answers(demonstrations: Sequence[int], rng: random.Random) -> tuple[int, ...]:
    """Return demonstrations in an order in which none keeps its place, all such orders being equally likely.

    Raises NoLabelControl for fewer than two.
    """
    if len(demonstrations) < 2:
        raise NoLabelControl("a single demonstration has no other answer to show")
    while True:
        order = rng.sample(demonstrations, len(demonstrations))
        if all(own != other for own, other in zip(demonstrations, order, strict=True)):
            return tuple(order)


def foreign_answers(
    demonstrations: Sequence[int], pool: Sequence[int], scored: int | None, rng: random.Random
) -> tuple[int, ...]:
    """Return as many rows of a pool as there are demonstrations, none of them among these, none twice.

    `scored`: the row that must not be drawn because it is the document, None where it is of another split.
    Raises NoLabelControl where the pool has too few.
    """
    wanted = len(demonstrations)
    drawn = rng.sample(pool, min(len(pool), 2 * wanted + 1))
    others = [index for index in drawn if index != scored and index not in demonstrations]
    if len(others) < wanted:
        raise NoLabelControl("there are too few rows besides the demonstrations to take answers from")
    return tuple(others[:wanted])


def with_other_labels(
    task: OpenTask,
    rows: TaskRows,
    labels: Labels,
    protocol: Protocol,
    prompter: Prompter,
    part: Part = "evaluate",
) -> TaskRows:
    """Return the documents of a part with the answers of their demonstrations exchanged, and nothing else.

    Documents that share a set of demonstrations share its answers too. A prompt that has become longer than
    the context loses tokens on the left. Raises NoLabelControl where that is not defined: without
    demonstrations, with too few rows, and where answers stand in the context and the task's definition does
    not say which part of it they are.
    """
    documents: list[Document] = []
    for member, of_member in documents_by_member(task, rows, part, protocol):
        requests = [
            member.request(document, answers=_answers(member, document, labels)) for document in of_member
        ]
        documents += [
            replace(document, options=prompt.options)
            for document, prompt in zip(of_member, prompter.prompts(requests), strict=True)
        ]
    return replace(rows, documents=tuple(documents), labels=labels)


def changes_a_prompt(rows: TaskRows, control: TaskRows) -> bool:
    """Tell whether any document of a control has another prompt than with the right labels."""
    return any(
        tuple(left.options) != tuple(right.options)
        for left, right in zip(rows.documents, control.documents, strict=True)
    )


def documents_by_member(
    task: OpenTask, rows: TaskRows, part: Part, protocol: Protocol
) -> Iterator[tuple["MemberDraws", list[Document]]]:
    """Yield the members of a task, each with its documents of a part, in the order of the documents."""
    offset = 0
    for member in task.members:
        of_member = [document for document in rows.documents if document.member == member.number]
        yield MemberDraws(member, part, protocol, offset), of_member
        offset += len(member.scored(part))


@dataclass(frozen=True)
class MemberDraws:
    """What is drawn for the documents of one member in a part; their indices start at `offset`."""

    member: Member
    part: Part
    protocol: Protocol
    offset: int

    def request(
        self, document: Document, *, answers: tuple[int, ...] = (), query: int | None = None
    ) -> PromptRequest:
        """Return what prompts a document after the answers of other rows, or with another row asked in its
        place; raises NoLabelControl where that is not defined.
        """
        member = self.member
        if member.task.multiple_input and with_answer_of_another(member.task) is None:
            raise NoLabelControl("its answers stand in the context, and its definition does not say where")
        if not document.demonstrations:
            raise NoLabelControl("there are no demonstrations")
        key = PromptKey(
            member.number,
            from_train=self._is_from_train,
            index=self.index(document),
            demonstrations=document.demonstrations,
            answers=answers,
            query=query,
        )
        asked = None if query is None else member.scored(self.part)(query)
        return PromptRequest(key, self._split, member.task, document.row, member.shown, self.protocol, asked)

    def bare_request(self, index: int) -> PromptRequest:
        """Return what prompts a row that the part scores without demonstrations."""
        member, row = self.member, self.member.scored(self.part)(index)
        key = PromptKey(member.number, self._is_from_train, index, ())
        return PromptRequest(key, self._split, member.task, row, member.shown, self.protocol)

    @property
    def _is_from_train(self) -> bool:
        return self.part != "evaluate" and self.member.train is not None

    @property
    def _split(self) -> str:
        return "evaluate" if self.part == "evaluate" else "train"

    def index(self, document: Document) -> int:
        """Return the index of a document among the member's rows."""
        return document.index - self.offset

    def generator(self, document: Document, purpose: str, *, of_set: bool = True) -> random.Random:
        """Return a document's generator for a purpose, or that of the set that it shares: one of its own, so
        that what is drawn depends neither on the limit nor on other documents.
        """
        shared = of_set and document.set_number is not None
        whose = f"set {document.set_number}" if shared else f"document {self.index(document)}"
        return random.Random(f"{PROTOCOL_SEED} {purpose} {self.member.number} {whose}")

    def index_shown(self, document: Document) -> int | None:
        """Return the index of a document among the rows that are shown, None where it is of another split."""
        # Training documents, and all where there is no training split, are of the rows that are shown.
        is_shown = self.member.scored(self.part) is self.member.shown
        return self.index(document) if is_shown else None

    @cached_property
    def pool(self) -> Sequence[int]:
        """The indices of the rows that demonstrations come from."""
        return demonstration_pool(self.member, self.part, self.protocol)


def _answers(member: MemberDraws, document: Document, labels: Labels) -> tuple[int, ...]:
    """Return the rows whose answers a document's demonstrations show."""
    if not document.demonstrations:
        raise NoLabelControl("there are no demonstrations")
    rng = member.generator(document, labels)
    if labels == "shuffled":
        return shuffled_answers(document.demonstrations, rng)
    return foreign_answers(document.demonstrations, member.pool, member.index_shown(document), rng)
