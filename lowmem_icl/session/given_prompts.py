"""The prompts and the text that a user gives in files, read for a run's model."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lowmem_icl.conversion.calibration import fixed_text
from lowmem_icl.errors import InputError
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.tasks.packing import PackingLimits, Tokenise
from lowmem_icl.tasks.prompt_pairs.files import GivenPrompts, PromptReader, given_digest
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair
from lowmem_icl.tasks.row_files import read_text
from lowmem_icl.tasks.text_windows import (
    FEWEST_WINDOWS,
    MOST_WINDOWS,
    SHORTEST_WINDOW,
    WINDOW_TOKENS,
    TextWindows,
    text_windows,
    window_tokens,
)

MOST_CHARACTERS = 32 * MOST_WINDOWS * WINDOW_TOKENS
"""Of a text, more than windows are cut of: no tokenizer needs as many characters a token."""


@dataclass(frozen=True)
class PromptFiles:
    """What the files of --pairs, --clean and --corrupted hold: () and None where they are not given.

    text: the windows of --text, or of the tool's own page where icl-heads has no other; None without it, and
    where the model's context is too short.
    """

    pairs: tuple[PromptPair, ...] = field(default=(), repr=False)
    prompts: GivenPrompts | None = field(default=None, repr=False)
    text: TextWindows | None = field(default=None, repr=False)
    is_own_text: bool = True

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that is given, as tokens; empty where nothing is."""
        prompts = given_digest(self.pairs, self.prompts) if self.pairs or self.prompts else ""
        if self.text is None or self.is_own_text:
            return prompts
        return hashlib.sha256((prompts + repr(self.text.windows)).encode()).hexdigest()


def prompt_files(
    options: RunOptions, tokenizer: Any, tokenise: Tokenise, limits: PackingLimits, vocabulary: int
) -> PromptFiles:
    """Read the files of prompts and of text that options name; raises InputError naming what is wrong in
    them.
    """
    for path in (options.pairs, options.clean):
        if path is not None and path.stem == AGGREGATE:
            raise InputError(f"{path}: '{AGGREGATE}' names the mean over tasks; give the file another name")
    reader = PromptReader(tokenise, lambda token: str(tokenizer.decode([token])), limits, vocabulary)
    pairs = () if options.pairs is None else reader.pairs(options.pairs)
    prompts = None
    if options.clean is not None and options.corrupted is not None:
        prompts = GivenPrompts(reader.prompts(options.clean), reader.prompts(options.corrupted))
    text = _text(options.text, reader) if "icl-heads" in options.experiments else None
    return PromptFiles(pairs, prompts, text, options.text is None)


def _text(path: Path | None, reader: PromptReader) -> TextWindows | None:
    """Return the windows of a file's text, or of the tool's own page; raises InputError where the file
    cannot be read or is too short.
    """
    text = fixed_text() if path is None else read_text(path)
    (tokens,) = reader.tokenise([text[:MOST_CHARACTERS]])
    limits, largest = reader.limits, max(tokens, default=0)
    if largest >= reader.vocabulary:
        raise InputError(
            f"{path or 'the page of icl-heads'}: the tokenizer gives token {largest}, the model knows only "
            f"{reader.vocabulary}; give another text by --text"
        )
    if limits.context_tokens < SHORTEST_WINDOW:
        return None
    wanted = FEWEST_WINDOWS * window_tokens(limits.bos, limits.context_tokens)
    if path is not None and len(tokens) < wanted:
        raise InputError(
            f"--text {path}: expected at least {wanted} tokens, which make {FEWEST_WINDOWS} windows, got "
            f"{len(tokens)}; give a longer text"
        )
    return text_windows(tokens, limits.bos, limits.context_tokens)
