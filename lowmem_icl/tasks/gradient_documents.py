"""Training documents as their gradients are taken: as they are scored, or as the paper's code has them."""

from dataclasses import replace

from lowmem_icl.protocols import BARE_TASKS, Protocol
from lowmem_icl.tasks.loading import Document, TaskRows


def gradient_documents(task: TaskRows, protocol: Protocol) -> TaskRows:
    """Return a task's training documents in the form whose gold option is differentiated under a protocol."""
    documents = task.documents
    if protocol.first_answer_only:
        documents = tuple(_with_first_answer(task, document) for document in documents)
    if protocol.bare_continuations and task.task in BARE_TASKS:
        documents = tuple(_without_space(document) for document in documents)
    return task if documents is task.documents else replace(task, documents=documents)


def _without_space(document: Document) -> Document:
    options = tuple((context, text.removeprefix(" ")) for context, text in document.options)
    return replace(document, options=options)


def _with_first_answer(task: TaskRows, document: Document) -> Document:
    """Return the document with one gold option, that which it would show as a demonstration."""
    if sum(document.gold) < 2:
        return document
    member = task.members[document.member]
    target = member.doc_to_target(document.row, member.fewshot_cfg.doc_to_target)
    shown = f"{member.config.target_delimiter}{target}"
    first = tuple(
        gold and text == shown for gold, (_, text) in zip(document.gold, document.options, strict=True)
    )
    # Where a definition shows something else, every accepted option stays.
    return replace(document, gold=first) if any(first) else document
