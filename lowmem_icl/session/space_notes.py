"""Contexts that end in white space: what follows them then starts without its own, which is said once."""

from lowmem_icl.tasks.catalogue import KNOWN_TASKS
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.unread import UnreadOptions

LOOKED_AT = 1_000
"""Documents of a task, the first ones."""


def space_note(rows: TaskRows) -> str | None:
    """Return a sentence where contexts of a user's own or of lm-eval's task end in white space, else None.

    Context and option are tokenised apart, and tokenizers know most words with their space before them. The
    tasks known by name are as the paper has them.
    """
    documents = [each for each in rows.documents[:LOOKED_AT] if not isinstance(each.options, UnreadOptions)]
    if rows.task in KNOWN_TASKS:
        return None
    count = sum(each.options[0][0][-1:].isspace() for each in documents)
    if not count:
        return None
    return (
        f"task {rows.task}: {count} of {len(documents)} contexts end in white space, so that what follows "
        "starts without a space of its own, as models rarely see it; move the space to the beginning of each "
        "option"
    )
