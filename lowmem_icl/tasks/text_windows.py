"""Windows of plain text, and where in them losses are compared: near the beginning, and far into the context.

Axis letters: W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowmem_icl.rows import Integers

Tokens = tuple[int, ...]

WINDOW_TOKENS = 512
SHORTEST_WINDOW = 128
"""A context that holds less has no two positions worth comparing."""
EARLY, LATE_FROM_END = 50, 12
"""Of a whole window the tokens at 50 and 500, counted from 0, BOS among them."""
REACH = 8
"""A loss at a single token is noisy: as many tokens on either side count with it."""
MOST_WINDOWS = 16
FEWEST_WINDOWS = 4
SHIFTED_WINDOWS = 8
LARGEST_SHARE = 0.75
"""Of a text that is too short for windows beside each other, what one of those that overlap has at most."""


@dataclass(frozen=True, eq=False)
class TextWindows:
    """Windows of a text as tokens, BOS first where there is one, all of one length.

    `early`, `late`: the middles of the tokens whose losses are compared; `overlap`: whether windows share
    tokens, as those of a short text do.
    """

    windows: tuple[Tokens, ...]
    early: int
    late: int
    overlap: bool

    @property
    def predicted(self) -> Integers:
        """The indices of the tokens whose losses are read, the early ones first."""
        around = np.arange(-REACH, REACH + 1)
        return np.concatenate([self.early + around, self.late + around])

    def as_record(self) -> dict[str, Any]:
        """Return plain values for run.json."""
        return {
            "windows": len(self.windows), "tokens": len(self.windows[0]), "overlap": self.overlap,
            "early": self.early, "late": self.late, "reach": REACH,
        }  # fmt: skip


def window_tokens(bos: int | None, context_tokens: int) -> int:
    """Return how many tokens of a text a window has, without BOS."""
    return min(WINDOW_TOKENS, context_tokens) - (bos is not None)


def text_windows(tokens: Sequence[int], bos: int | None, context_tokens: int) -> TextWindows | None:
    """Return the windows of a text, beside each other where there are FEWEST_WINDOWS of them, else
    overlapping at even distances; None where the context or the text is too short for any.
    """
    front = () if bos is None else (bos,)
    size = window_tokens(bos, context_tokens)
    count = min(MOST_WINDOWS, len(tokens) // size)
    overlap = count < FEWEST_WINDOWS
    if overlap:
        size = min(size, int(LARGEST_SHARE * len(tokens)))
        starts = np.linspace(0, len(tokens) - size, SHIFTED_WINDOWS).astype(int).tolist()
    else:
        starts = [size * number for number in range(count)]
    if size + len(front) < SHORTEST_WINDOW:
        return None
    windows = tuple((*front, *tokens[start : start + size]) for start in starts)
    return TextWindows(windows, EARLY, len(windows[0]) - LATE_FROM_END, overlap)
