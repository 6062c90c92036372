"""A pair of prompts as tokens, and where two prompts part."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PromptPair:
    """A clean and a corrupted prompt with the same options to go on with.

    document: the index of the document, or of the line of its file; clean, corrupted: the tokens of both
    prompts, whole, BOS first where there is one, up to and with the last; options: continuations as tokens,
    at least one; gold: a flag per option; cluster: what intervals cluster by.
    """

    document: int
    clean: Tokens
    corrupted: Tokens
    options: tuple[Tokens, ...]
    gold: tuple[bool, ...]
    cluster: str

    @property
    def is_aligned(self) -> bool:
        """Whether the prompts have equally many tokens, so that each has its counterpart."""
        return len(self.clean) == len(self.corrupted)


def parting_index(clean: Tokens, corrupted: Tokens) -> int | None:
    """Return the index of the first token in which prompts differ, None where they are the same.

    It is the length of the shorter one where the other goes on.
    """
    differ = (left != right for left, right in zip_longest(clean, corrupted))
    return next((index for index, differs in enumerate(differ) if differs), None)


def describe_parting(clean: Tokens, corrupted: Tokens, token_text: Callable[[int], str]) -> str:
    """Return a clause that says how long two different prompts are and where they part."""
    index = parting_index(clean, corrupted)
    assert index is not None, "prompts of different lengths differ"
    left, right = (
        repr(token_text(prompt[index])) if index < len(prompt) else "the end" for prompt in (clean, corrupted)
    )
    return f"{len(clean)} and {len(corrupted)} tokens, which part at token {index + 1}: {left} and {right}"
