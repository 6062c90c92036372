"""Prompts that users give in files of JSON lines, as tokens.

Pairs: `context`, `corrupted`: texts; `options`: a list of texts; `gold`: the index of the right option, or a
list of indices. Prompts by themselves: `context`, a text, or `tokens`, a list of ids that are taken as they
are; `target`, a text or a list of ids.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lowmem_icl.errors import InputError
from lowmem_icl.tasks.packing import PackingLimits, Tokenise
from lowmem_icl.tasks.prompt_pairs.json_lines import JsonLine, read_json_lines
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair, Tokens, describe_parting

GOLD = "the index of the right option, or a list of indices"


@dataclass(frozen=True, eq=False)
class GivenPrompt:
    """A prompt of a file: the index of its line, its tokens, BOS first where there is one, and the target
    that follows, as tokens.
    """

    document: int
    tokens: Tokens
    target: Tokens


@dataclass(frozen=True, eq=False)
class GivenPrompts:
    """Prompts of two files: `clean` ones, which means are taken of, and `corrupted` ones, which effects are
    measured on. They need not belong together.
    """

    clean: tuple[GivenPrompt, ...]
    corrupted: tuple[GivenPrompt, ...]


@dataclass(frozen=True)
class PromptReader:
    """Reads files of prompts for a model: how texts become tokens and tokens texts, what fits its context,
    and how many tokens it knows.
    """

    tokenise: Tokenise
    token_text: Callable[[int], str]
    limits: PackingLimits
    vocabulary: int

    def pairs(self, path: Path) -> tuple[PromptPair, ...]:
        """Return the pairs of a file, clustered by their clean prompts.

        Raises InputError naming file, line and field of what is wrong: also for prompts of a pair that have
        not equally many tokens, that are the same, or do not fit the model's context with their options.
        """
        first_line: dict[Tokens, int] = {}
        return tuple(self._pair(line, first_line) for line in read_json_lines(path))

    def prompts(self, path: Path) -> tuple[GivenPrompt, ...]:
        """Return the prompts of a file; raises InputError naming file, line and field of what is wrong."""
        return tuple(self._prompt(line) for line in read_json_lines(path))

    def _pair(self, line: JsonLine, first_line: dict[Tokens, int]) -> PromptPair:
        clean = self._context(line, "context")
        corrupted = self._context(line, "corrupted")
        options = self._options(line)
        if clean == corrupted:
            line.refuse("corrupted", "another prompt than context", line.fields["corrupted"])
        if len(clean) != len(corrupted):
            raise InputError(
                f"{line.path}, line {line.number}: expected 'context' and 'corrupted' of equally many "
                f"tokens, got {describe_parting(clean, corrupted, self.token_text)}; "
                "choose words that have as many tokens in both"
            )
        for option in options:
            self._check_length(line, "options", clean, option)
        return PromptPair(
            document=line.number - 1,
            clean=clean,
            corrupted=corrupted,
            options=options,
            gold=self._gold(line, len(options)),
            cluster=f"line {first_line.setdefault(clean, line.number)}",
        )

    def _prompt(self, line: JsonLine) -> GivenPrompt:
        if ("context" in line.fields) == ("tokens" in line.fields):
            raise InputError(
                f"{line.path}, line {line.number}: expected either 'context', a text, or 'tokens', a list of "
                f"token ids, got {'both' if 'tokens' in line.fields else 'neither'}; give one of them"
            )
        if "tokens" in line.fields:
            tokens = line.token_ids("tokens", self.vocabulary)
        else:
            tokens = self._context(line, "context")
        if isinstance(line.value("target", "a text or a list of token ids"), list):
            target = line.token_ids("target", self.vocabulary)
        else:
            target = self._continuation(line, "target", line.text("target"))
        self._check_length(line, "target", tokens, target)
        return GivenPrompt(line.number - 1, tokens, target)

    def _context(self, line: JsonLine, field: str) -> Tokens:
        """Return a context as prompts of tasks begin: BOS, where there is one, and the text's tokens."""
        text = line.text(field, may_be_empty=True)
        ids = self._tokens(line, field, text)
        bos = self.limits.bos
        if bos is not None and ids[:1] == (bos,):
            line.refuse(
                field,
                "a text without the beginning-of-sequence token, which is put before it",
                text,
                "leave it out",
            )
        return (() if bos is None else (bos,)) + ids or (self.limits.empty_context,)

    def _options(self, line: JsonLine) -> tuple[Tokens, ...]:
        expected = "a list of texts that are not empty, none twice"
        texts = [line.checked_text("options", text, expected) for text in line.items("options", expected)]
        options = tuple(self._continuation(line, "options", text) for text in texts)
        if len(set(options)) < len(options):
            line.refuse("options", expected, texts)
        return options

    def _continuation(self, line: JsonLine, field: str, text: str) -> Tokens:
        ids = self._tokens(line, field, text)
        if not ids:
            line.refuse(field, "a text of at least one token", text)
        return ids

    def _tokens(self, line: JsonLine, field: str, text: str) -> Tokens:
        (ids,) = self.tokenise([text])
        if max(ids, default=0) >= self.vocabulary:
            line.refuse(field, f"tokens below {self.vocabulary}, the model's vocabulary", max(ids))
        return tuple(ids)

    def _gold(self, line: JsonLine, options: int) -> tuple[bool, ...]:
        value = line.value("gold", GOLD)
        indices = value if isinstance(value, list) else [value]
        is_index = [type(index) is int and 0 <= index < options for index in indices]
        if not indices or not all(is_index) or len(set(indices)) < len(indices):
            line.refuse("gold", f"{GOLD}, from 0 to {options - 1}, none twice", value)
        return tuple(index in indices for index in range(options))

    def _check_length(self, line: JsonLine, field: str, context: Tokens, continuation: Tokens) -> None:
        # The last token of a continuation is only predicted.
        tokens, most = len(context) + len(continuation) - 1, self.limits.context_tokens
        if tokens > most:
            raise InputError(
                f"{line.path}, line {line.number}: '{field}': the prompt and what follows have {tokens} "
                f"tokens, the model's context holds {most}; shorten the prompt"
            )


def given_digest(pairs: Iterable[PromptPair], prompts: GivenPrompts | None) -> str:
    """Return SHA-256 over all tokens of given pairs and prompts, and over which options are right."""
    summed = hashlib.sha256()
    for pair in pairs:
        fields = (pair.document, pair.clean, pair.corrupted, pair.options, pair.gold, pair.cluster)
        summed.update(repr(fields).encode())
    for side in () if prompts is None else (prompts.clean, prompts.corrupted):
        summed.update(repr([(prompt.document, prompt.tokens, prompt.target) for prompt in side]).encode())
    return summed.hexdigest()
