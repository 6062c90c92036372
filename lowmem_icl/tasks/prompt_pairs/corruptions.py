"""The same documents after corrupted prompts: what patching restores, or breaks.

`shuffled` is the control of that name. In `wrong`, every demonstration shows an answer whose text is not its
own: another demonstration's where an order without any in its place exists, else another row's. In
`queries`, the demonstrations stay and another row is asked, one whose text has about as many tokens, with the
options staying. Of several draws the first is taken whose prompt has as many tokens as the clean one, so that
each token has its counterpart.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from lowmem_icl.protocols import Corruption, Protocol
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.label_controls import (
    MemberDraws,
    NoLabelControl,
    documents_by_member,
    with_other_labels,
)
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.prompting import MeasuringPrompter, Prompt, PromptRequest, Row, answer_as_shown
from lowmem_icl.tasks.selection import Part, answer_pool, scored_order

DRAWS = 20
"""Prompts of a document that are looked at for one as long as the clean one."""
ROWS_TRIED = 2000
"""Rows that are looked at for one with another answer."""
QUERY_ROWS = 512
"""Rows of a task that may be asked in a document's place: the first that a part scores under no limit."""


def corrupted(
    task: OpenTask,
    rows: TaskRows,
    corruption: Corruption,
    protocol: Protocol,
    prompter: MeasuringPrompter,
    part: Part,
) -> TaskRows:
    """Return the documents of a part after corrupted prompts; their options' continuations stay.

    What is drawn for a document depends on no other one. One for which there is nothing else to show or to
    ask keeps its clean prompt. Raises NoLabelControl where that holds for all, where answers stand in the
    context, and without demonstrations.
    """
    check_one_prompt(task)
    if corruption == "shuffled":
        return with_other_labels(task, rows, "shuffled", protocol, prompter, part)
    documents: list[Document] = []
    failures: list[NoLabelControl] = []
    for member, of_member in documents_by_member(task, rows, part, protocol):
        requests = _wrong_answers(member) if corruption == "wrong" else _other_queries(member, prompter)
        clean = prompter.prompts([member.request(document) for document in of_member])
        for document, prompt in zip(of_member, clean, strict=True):
            try:
                changed = _drawn_prompt(requests(document), prompt, prompter)
            except NoLabelControl as failure:
                changed = prompt
                failures.append(failure)
            documents.append(replace(document, options=changed.options))
    if failures and len(failures) == len(documents):
        raise failures[0]
    return replace(rows, documents=tuple(documents), labels=corruption)


def check_one_prompt(task: OpenTask) -> None:
    """Raise NoLabelControl where a task's documents have a prompt per option and not one to patch."""
    if any(member.task.multiple_input for member in task.members):
        raise NoLabelControl("its answers stand in the context, so a document has a prompt per option")


def _drawn_prompt(requests: Iterator[PromptRequest], clean: Prompt, prompter: MeasuringPrompter) -> Prompt:
    """Return the first prompt as long as the clean one, else the first; none is the clean one's text.

    Raises NoLabelControl where there is none.
    """
    first = None
    wanted = prompter.context_tokens(clean)
    try:
        for request in islice(requests, DRAWS):
            (prompt,) = prompter.prompts([request])
            if prompt.options[0][0] == clean.options[0][0]:
                continue
            if prompter.context_tokens(prompt) == wanted:
                return prompt
            first = first or prompt
    except NoLabelControl:
        # A later draw that finds nothing takes nothing from an earlier one.
        if first is None:
            raise
    if first is None:
        raise NoLabelControl("no row of other text was found for the corrupted prompt")
    return first


def _wrong_answers(member: MemberDraws) -> Callable[[Document], Iterator[PromptRequest]]:
    """Return what draws a document's requests with wrong answers."""
    texts: dict[tuple[int, int], str] = {}
    pool = answer_pool(member.member, member.part, member.protocol)

    def text_of(before: int, index: int) -> str:
        if (before, index) not in texts:
            shown = member.member.shown
            texts[before, index] = answer_as_shown(member.member.task, shown(index), shown(before))
        return texts[before, index]

    def requests(document: Document) -> Iterator[PromptRequest]:
        shown, scored = document.demonstrations, member.index_shown(document)
        rng = member.generator(document, "wrong")
        # All answers are compared as answers to one row: some definitions put them into a row's text.
        answer_text = partial(text_of, shown[0])
        while True:
            # Drawn again and again from all rows, so that documents of a set draw the same.
            others = (index for index in _choices(pool, rng) if index != scored)
            yield member.request(document, answers=wrong_answers(shown, others, answer_text, rng))

    return requests


def _choices(pool: Sequence[int], rng: random.Random) -> Iterator[int]:
    while pool:
        yield rng.choice(pool)


def wrong_answers(
    demonstrations: Sequence[int], others: Iterator[int], text_of: Callable[[int], str], rng: random.Random
) -> tuple[int, ...]:
    """Return a row per demonstration whose answer is shown, none with the text of that demonstration's own.

    They are the demonstrations themselves in another order where such an order exists, which is where no
    text is the answer of more than half of them; else the next of other rows that does. Raises NoLabelControl
    where none of these has another text.
    """
    own = [text_of(index) for index in demonstrations]
    most = max(Counter(own).values())
    if 2 * most <= len(own):
        return _displaced(demonstrations, own, most, rng)
    return tuple(_row_of_other_text(text, others, text_of) for text in own)


def _displaced(
    demonstrations: Sequence[int], own: Sequence[str], most: int, rng: random.Random
) -> tuple[int, ...]:
    """Return the demonstrations in an order in which none has its own text in its place."""
    groups: dict[str, list[int]] = {}
    for place in rng.sample(range(len(own)), len(own)):
        groups.setdefault(own[place], []).append(place)
    # Equal texts side by side, and no more than `most` of any: shifted by as many, none meets its own.
    places = [place for group in groups.values() for place in group]
    shift = rng.randint(most, len(places) - most)
    answers = dict(zip(places, places[shift:] + places[:shift], strict=True))
    return tuple(demonstrations[answers[place]] for place in range(len(own)))


def _row_of_other_text(text: str, others: Iterator[int], text_of: Callable[[int], str]) -> int:
    found = next((index for index in islice(others, ROWS_TRIED) if text_of(index) != text), None)
    if found is None:
        raise NoLabelControl(f"no other row was found with another answer than {text.strip()[:60]!r}")
    return found


def _other_queries(
    member: MemberDraws, prompter: MeasuringPrompter
) -> Callable[[Document], Iterator[PromptRequest]]:
    """Return what draws a document's requests with other rows asked, those of like length first."""
    candidates = scored_order(member.member, member.part, member.protocol)[:QUERY_ROWS]
    lengths = dict(zip(candidates, _query_tokens(member, candidates, prompter), strict=True))
    metadata = member.member.task.config.metadata or {}
    cluster_of: Callable[[Row], str] | None = metadata.get("cluster")
    row_of = member.member.scored(member.part)

    def requests(document: Document) -> Iterator[PromptRequest]:
        own = member.index(document)
        taken = {own}
        if member.index_shown(document) is not None:
            taken |= {*document.demonstrations}
        (length,) = _query_tokens(member, [own], prompter)
        rng = member.generator(document, "queries", of_set=False)
        drawn = rng.sample(candidates, len(candidates))
        for index in sorted(drawn, key=lambda index: abs(lengths[index] - length)):
            is_related = cluster_of is not None and cluster_of(row_of(index)) == document.cluster
            if index not in taken and not is_related:
                yield member.request(document, query=index)

    return requests


def _query_tokens(member: MemberDraws, indices: Sequence[int], prompter: MeasuringPrompter) -> list[int]:
    """Return how many tokens the queries of rows have without demonstrations."""
    prompts = prompter.prompts([member.bare_request(index) for index in indices])
    return [prompter.context_tokens(prompt) for prompt in prompts]
