"""Rows of single prompts: whole, or their last token alone, from which the options go on, after a stem."""

from collections.abc import Sequence

from lowmem_icl.rows import Row, stem_of
from lowmem_icl.tasks.row_layout import OptionPath, RowLayout


def prompt_row(prompt: Sequence[int], continuations: Sequence[Sequence[int]], *, whole: bool) -> Row:
    """Return the row of a prompt and what may follow it, options 0, 1, … in this order.

    Its first tokens are the prompt's if it is `whole`; else its first is the prompt's last, and all before it
    is its stem. A prompt of a single token has no stem.
    """
    stem = None if whole or len(prompt) < 2 else stem_of(prompt[:-1])
    paths = [
        OptionPath(number, 0, (*prompt, *continuation)[:-1], tuple(continuation))
        for number, continuation in enumerate(continuations)
    ]
    layout = RowLayout()
    layout.grow(paths, 0 if stem is None else len(stem))
    return layout.row(stem)
