"""Documents that nobody has read yet: what their texts would be made from, and how long these are about."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, overload

from lowmem_icl.tasks.documents import Document, OptionTexts
from lowmem_icl.tasks.prompting import DIRECT_PROMPTER, Prompt, PromptRequest

Pair = tuple[str, str]


@dataclass(frozen=True)
class DocumentSize:
    """Tokens of one document: of its options packed together, and those that answers are read after; the same
    of its gold options, each a path of its own; what the documents of its group begin with; what it shares
    with the document before it in its row.
    """

    tokens: int
    reads: int
    gold_tokens: int
    gold_reads: int
    stem: int = 0
    merged: int = 0


@dataclass(frozen=True)
class UnreadOptions(Sequence[Pair]):
    """The options of a document whose texts nobody asked for. As a sequence: what tells its prompt from
    others, in place of the texts.

    length: characters of the rows in its prompt; request: what its texts are made from; `size`, where it is
    known, is all that a plan asks for.
    """

    identity: str
    length: int = field(default=0, compare=False)
    request: PromptRequest | None = field(default=None, repr=False, compare=False)
    size: DocumentSize | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Pair]:
        yield self.identity, ""

    @overload
    def __getitem__(self, option: int) -> Pair: ...
    @overload
    def __getitem__(self, option: slice) -> tuple[Pair, ...]: ...
    def __getitem__(self, option: int | slice) -> Pair | tuple[Pair, ...]:
        return ((self.identity, ""),)[option]


def unread(document: Document) -> UnreadOptions:
    """Return the options of a document, which must not have been read."""
    assert isinstance(document.options, UnreadOptions), "this document was read"
    return document.options


def size_of(document: Document) -> DocumentSize:
    """Return the size of an unread document, which must be known."""
    size = unread(document).size
    assert size is not None, "sizes are filled in before documents are given out"
    return size


def read_document(document: Document) -> Document:
    """Return a document with its texts, prompted now."""
    request = unread(document).request
    assert request is not None, "only its size was kept"
    (prompt,) = DIRECT_PROMPTER.prompts([request])
    return with_options(document, prompt.options, prompt.gold)


def with_options(document: Document, options: OptionTexts, gold: tuple[bool, ...]) -> Document:
    """Return a document with other options."""
    # dataclasses.replace takes three times as long, and there may be a hundred thousand.
    values = {each.name: getattr(document, each.name) for each in fields(Document)}
    return Document(**values | {"options": options, "gold": gold})


def characters(value: Any) -> int:
    """Return the characters of all texts in a row, or in a field of it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, Sequence) else 0


class UnreadPrompter:
    """A prompter that makes no prompts: documents stay unread. `fits_context` tells whether options fit the
    model's context.
    """

    def __init__(self, fits_context: Callable[[OptionTexts], bool]) -> None:
        self._fits_context = fits_context
        self._longest_that_fits = 0
        # Rows stay where they are as long as their task is open.
        self._of_rows: dict[int, tuple[str, int]] = {}

    def prompts(self, requests: Sequence[PromptRequest]) -> list[Prompt]:
        """Return stand-ins for the prompts."""
        return [Prompt(self._options(request), (True,)) for request in requests]

    def fits(self, prompt: Prompt) -> bool:
        """Tell whether all options fit the model's context whole, which those do that are shorter than others
        that were read and fit.
        """
        options = prompt.options
        assert isinstance(options, UnreadOptions)
        assert options.request is not None
        if options.length > self._longest_that_fits:
            (read,) = DIRECT_PROMPTER.prompts([options.request])
            if not self._fits_context(read.options):
                return False
            self._longest_that_fits = options.length
        return True

    def context_tokens(self, prompt: Prompt) -> int:
        """Return 0, since nobody knows yet: all prompts are taken to be equally long."""
        return 0

    def _options(self, request: PromptRequest) -> UnreadOptions:
        key = request.key
        digest, length = self._of_row(request.row)
        if request.query is not None:
            asked, length = self._of_row(request.query)
            digest = f"{digest} {asked}"
        shown = sum(self._of_row(request.shown(index))[1] for index in key.demonstrations)
        identity = f"{key.member} {digest} {key.demonstrations} {key.answers}"
        return UnreadOptions(identity, length + shown, request)

    def _of_row(self, row: dict[str, Any]) -> tuple[str, int]:
        """Return a digest and the characters of a row."""
        if id(row) not in self._of_rows:
            digest = hashlib.sha256(repr(row).encode()).hexdigest()[:16]
            self._of_rows[id(row)] = digest, characters(row)
        return self._of_rows[id(row)]
