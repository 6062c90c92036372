"""Function-vector scores: how much a head's mean output over prompts that show a task brings its answers back
where the demonstrations' answers are corrupted (Todd et al. 2024, section 2.3).

Axis letters: N prompts, H all heads.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.experiments.patch.prompts import VectorPrompts
from lowmem_icl.masks.mask import Unit
from lowmem_icl.statistics.intervals import MEAN, mean_intervals
from lowmem_icl.tables.blocks import Block, unit_blocks

Values = NDArray[np.float64]

METRIC = "function_vector"


def head_effects(scores: Sequence[Scores]) -> tuple[Values, Values]:
    """Return by prompt what every head's mean changes, [H, N] each: the probability of the target's first
    token, and the log-probability of all of the target; `scores` [1 + H, options] of each, the first clean.
    """
    first = np.exp(np.stack([score.logprobs[:, 0] for score in scores], 1))
    whole = np.stack([score.logprobs[:, -1] for score in scores], 1)
    return first[1:] - first[:1], whole[1:] - whole[:1]


def score_blocks(
    prompts: VectorPrompts, heads: Sequence[Unit], effects: tuple[Values, Values]
) -> Iterator[Block]:
    """Yield the scores of all heads of a task, signed, with intervals over prompts."""
    same = prompts.fields | {
        "procedure": "last", "method": "mean", "exact": True, "heads_removed": None, "ffns_removed": None,
    }  # fmt: skip
    for metric, values in zip((METRIC, f"{METRIC}_logprob"), effects, strict=True):
        intervals = mean_intervals(values, prompts.clusters, MEAN)
        yield from unit_blocks(heads, intervals._asdict(), **same, metric=metric)
