"""The prompts of one task at one shot count with their tokens, as flat arrays: made once, then looked up.

Python lists of the tokens of ten thousand prompts would take gigabytes. Here every different text stands
once, as UTF-8 and as tokens, end to end, and the arrays may lie in a mapped file.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.tasks.documents import OptionTexts, TaskRows
from lowmem_icl.tasks.packing import (
    Integers,
    PackingLimits,
    TaskOptions,
    Tokenise,
    TokenTable,
    lengths_fit,
    task_options,
)
from lowmem_icl.tasks.prompting import Prompt, PromptKey, PromptRequest, all_forms

PROMPTS_TOGETHER = 256

Arrays = Mapping[str, NDArray[Any]]


class MissingPrompt(LookupError):
    """A table lacks a prompt that it was made for: it is not what its name says."""


@dataclass(frozen=True, eq=False)
class KeptOptions(Sequence[tuple[str, str]]):
    """The (context, continuation) texts of one prompt, read from its table when they are asked for."""

    table: "PromptTable" = field(repr=False)
    first: int
    options: int

    def __len__(self) -> int:
        return self.options

    @overload
    def __getitem__(self, option: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, option: slice) -> tuple[tuple[str, str], ...]: ...
    def __getitem__(self, option: int | slice) -> tuple[str, str] | tuple[tuple[str, str], ...]:
        if isinstance(option, slice):
            return tuple(self[index] for index in range(*option.indices(self.options)))
        number = self.first + range(self.options)[option]
        return self.table.text(self.table.contexts[number]), self.table.text(self.table.continuations[number])


@dataclass(frozen=True, eq=False)
class PromptTable:
    """Prompts by key, from arrays as `TableWriter.arrays` gives them.

    Option o of prompt p is number `first_option[p]` + o; contexts, continuations: [O], numbers of texts;
    gold: [O]. Text x is `characters[text_starts[x]:text_starts[x + 1]]`, in UTF-8, and as tokens
    `tokens[token_starts[x]:token_starts[x + 1]]`. Raises ValueError for arrays that do not belong together.
    """

    arrays: Arrays = field(repr=False)

    def __post_init__(self) -> None:
        given = self.arrays
        options, texts = int(given["first_option"][-1]), len(given["token_starts"]) - 1
        agree = (
            len(given["keys"]) == int(given["key_starts"][-1])
            and len(given["key_starts"]) == len(given["first_option"])
            and all(len(given[name]) == options for name in ("contexts", "continuations", "gold"))
            and len(given["text_starts"]) == texts + 1
            and len(given["tokens"]) == int(given["token_starts"][-1])
            and len(given["characters"]) == int(given["text_starts"][-1])
        )
        if not agree:
            raise ValueError("the arrays of a table of prompts do not belong together")

    @cached_property
    def contexts(self) -> Integers:
        """Numbers of the options' contexts, [O]."""
        return self.arrays["contexts"].astype(np.int64)

    @cached_property
    def continuations(self) -> Integers:
        """Numbers of the options' continuations, [O]."""
        return self.arrays["continuations"].astype(np.int64)

    @cached_property
    def tokens(self) -> TokenTable:
        """All texts as tokens."""
        return TokenTable(self.arrays["token_starts"], self.arrays["tokens"])

    @cached_property
    def _numbers(self) -> dict[tuple[int, ...], int]:
        values, starts = self.arrays["keys"].tolist(), self.arrays["key_starts"].tolist()
        return {
            tuple(values[start:end]): number for number, (start, end) in enumerate(itertools.pairwise(starts))
        }

    def text(self, number: int) -> str:
        """Return a text by its number."""
        starts = self.arrays["text_starts"]
        return bytes(self.arrays["characters"][int(starts[number]) : int(starts[number + 1])]).decode()

    def prompt(self, key: PromptKey) -> Prompt:
        """Return the prompt of a key; raise MissingPrompt where there is none."""
        number = self._numbers.get(_flat(key))
        if number is None:
            raise MissingPrompt(str(key))
        first, end = (int(option) for option in self.arrays["first_option"][number : number + 2])
        gold = tuple(self.arrays["gold"][first:end].tolist())
        return Prompt(KeptOptions(self, first, end - first), gold)

    def option_numbers(self, task: TaskRows) -> Integers:
        """Return the numbers of the options of a task's documents, [O]; all of them must be of this table."""
        return np.concatenate([_numbers_of(document.options) for document in task.documents])

    def options(self, task: TaskRows, limits: PackingLimits) -> TaskOptions:
        """Return the options of documents as tokens; raise InputError for one that is empty or too long."""
        numbers = self.option_numbers(task)
        return task_options(task, self.tokens, self.contexts[numbers], self.continuations[numbers], limits)


def _numbers_of(options: OptionTexts) -> Integers:
    assert isinstance(options, KeptOptions), "documents come from a table"
    return np.arange(options.first, options.first + len(options))


def _flat(key: PromptKey) -> tuple[int, ...]:
    query = -1 if key.query is None else key.query
    whose = (key.member, int(key.from_train), key.index, int(key.for_gradients), query, len(key.answers))
    return (*whose, *key.answers, *key.demonstrations)


@dataclass(frozen=True)
class TablePrompter:
    """Finds prompts in a table; nothing is prompted or tokenised."""

    table: PromptTable
    limits: PackingLimits

    def prompts(self, requests: Sequence[PromptRequest]) -> list[Prompt]:
        """Return the prompt of every request; raise MissingPrompt where the table lacks one."""
        return [self.table.prompt(request.key) for request in requests]

    def fits(self, prompt: Prompt) -> bool:
        """Tell whether all options fit the model's context whole."""
        numbers, lengths = _numbers_of(prompt.options), self.table.tokens.lengths
        return lengths_fit(
            lengths[self.table.contexts[numbers]], lengths[self.table.continuations[numbers]], self.limits
        )

    def context_tokens(self, prompt: Prompt) -> int:
        """Return the tokens of the first option's context, without BOS and before anything is cut."""
        number = self.table.contexts[_numbers_of(prompt.options)[0]]
        return int(self.table.tokens.lengths[number])


class TableWriter:
    """A prompter that makes every prompt once, tokenises every text once, and keeps both."""

    def __init__(self, tokenise: Tokenise, limits: PackingLimits) -> None:
        self._tokenise, self._limits = tokenise, limits
        self._prompts: dict[PromptKey, Prompt] = {}
        self._texts: dict[str, int] = {}
        self._tokens: list[NDArray[np.int32]] = []

    def prompts(self, requests: Sequence[PromptRequest]) -> list[Prompt]:
        """Return the prompt of every request."""
        missing = {request.key: request for request in requests if request.key not in self._prompts}
        for some in _batches(list(missing.values()), PROMPTS_TOGETHER):
            made = {key: prompt for request in some for key, prompt in all_forms(request).items()}
            self._tokenise_new(
                text for prompt in made.values() for option in prompt.options for text in option
            )
            self._prompts |= made
        return [self._prompts[request.key] for request in requests]

    def fits(self, prompt: Prompt) -> bool:
        """Tell whether all options fit the model's context whole."""
        lengths = np.array(
            [[len(self._tokens[self._texts[text]]) for text in option] for option in prompt.options]
        )
        return lengths_fit(lengths[:, 0], lengths[:, 1], self._limits)

    def context_tokens(self, prompt: Prompt) -> int:
        """Return the tokens of the first option's context, without BOS and before anything is cut."""
        return len(self._tokens[self._texts[prompt.options[0][0]]])

    def _tokenise_new(self, texts: Iterator[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for text, ids in zip(new, self._tokenise(new), strict=True):
            self._texts[text] = len(self._texts)
            self._tokens.append(np.array(ids, dtype=np.int32))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all that was made as flat arrays, which a PromptTable reads."""
        keys = [_flat(key) for key in self._prompts]
        options = [option for prompt in self._prompts.values() for option in prompt.options]
        encoded = [text.encode() for text in self._texts]
        return {
            "keys": np.array(list(itertools.chain.from_iterable(keys)), dtype=np.int32),
            "key_starts": _starts([len(key) for key in keys]),
            "first_option": _starts([len(prompt.options) for prompt in self._prompts.values()]),
            "gold": np.array([flag for prompt in self._prompts.values() for flag in prompt.gold], dtype=bool),
            "contexts": np.array([self._texts[context] for context, _ in options], dtype=np.int32),
            "continuations": np.array([self._texts[text] for _, text in options], dtype=np.int32),
            "text_starts": _starts([len(text) for text in encoded]),
            "token_starts": _starts([len(ids) for ids in self._tokens]),
            "characters": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "tokens": np.concatenate([*self._tokens, np.zeros(0, dtype=np.int32)]),
        }


def _starts(lengths: Sequence[int]) -> Integers:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _batches(requests: Sequence[PromptRequest], size: int) -> Iterator[Sequence[PromptRequest]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]
