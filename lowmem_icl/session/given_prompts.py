"""The prompts that a user gives in files, read for a run's model."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lowmem_icl.options import RunOptions
from lowmem_icl.tasks.packing import PackingLimits, Tokenise
from lowmem_icl.tasks.prompt_pairs.files import GivenPrompts, PromptReader, given_digest
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair


@dataclass(frozen=True)
class PromptFiles:
    """What the files of --pairs, --clean and --corrupted hold: () and None where they are not given."""

    pairs: tuple[PromptPair, ...] = field(default=(), repr=False)
    prompts: GivenPrompts | None = field(default=None, repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all of them as tokens; empty where none are given."""
        return given_digest(self.pairs, self.prompts) if self.pairs or self.prompts else ""


def prompt_files(
    options: RunOptions, tokenizer: Any, tokenise: Tokenise, limits: PackingLimits, vocabulary: int
) -> PromptFiles:
    """Read the files of prompts that options name; raises InputError naming what is wrong in them."""
    reader = PromptReader(tokenise, lambda token: str(tokenizer.decode([token])), limits, vocabulary)
    pairs = () if options.pairs is None else reader.pairs(options.pairs)
    if options.clean is None or options.corrupted is None:
        return PromptFiles(pairs)
    return PromptFiles(pairs, GivenPrompts(reader.prompts(options.clean), reader.prompts(options.corrupted)))
