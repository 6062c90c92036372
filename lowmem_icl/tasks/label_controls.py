"""The same documents after demonstrations with other answers: controls for what right labels give."""

import random
from collections.abc import Sequence
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
    offset = 0
    for member in task.members:
        of_member = [document for document in rows.documents if document.member == member.number]
        draw = _AnswerDraw(member, part, labels, protocol, offset)
        prompts = prompter.prompts([draw.request(document) for document in of_member])
        documents += [
            replace(document, options=prompt.options)
            for document, prompt in zip(of_member, prompts, strict=True)
        ]
        offset += len(member.scored(part))
    return replace(rows, documents=tuple(documents), labels=labels)


def changes_a_prompt(rows: TaskRows, control: TaskRows) -> bool:
    """Tell whether any document of a control has another prompt than with the right labels."""
    return any(
        tuple(left.options) != tuple(right.options)
        for left, right in zip(rows.documents, control.documents, strict=True)
    )


@dataclass(frozen=True)
class _AnswerDraw:
    """Whose answers the demonstrations of one member's documents show; their indices start at `offset`."""

    member: Member
    part: Part
    labels: Labels
    protocol: Protocol
    offset: int

    def request(self, document: Document) -> PromptRequest:
        member = self.member
        if member.task.multiple_input and with_answer_of_another(member.task) is None:
            raise NoLabelControl("its answers stand in the context, and its definition does not say where")
        if not document.demonstrations:
            raise NoLabelControl("there are no demonstrations")
        index = document.index - self.offset
        key = PromptKey(
            member.number,
            from_train=self.part != "evaluate" and member.train is not None,
            index=index,
            demonstrations=document.demonstrations,
            answers=self._answers(document, index),
        )
        split = "evaluate" if self.part == "evaluate" else "train"
        return PromptRequest(key, split, member.task, document.row, member.shown, self.protocol)

    def _answers(self, document: Document, index: int) -> tuple[int, ...]:
        shared = document.set_number is not None
        whose = f"set {document.set_number}" if shared else f"document {index}"
        # A generator of its own, so that an answer depends neither on the limit nor on other documents.
        rng = random.Random(f"{PROTOCOL_SEED} {self.labels} {self.member.number} {whose}")
        if self.labels == "shuffled":
            return shuffled_answers(document.demonstrations, rng)
        # Training documents, and all where there is no training split, are of the rows that are shown.
        scored = index if self.member.scored(self.part) is self.member.shown else None
        return foreign_answers(document.demonstrations, self._pool, scored, rng)

    @cached_property
    def _pool(self) -> Sequence[int]:
        return demonstration_pool(self.member, self.part, self.protocol)
