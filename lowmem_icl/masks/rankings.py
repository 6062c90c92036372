"""From scores to orders and from orders to masks."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask

Values = NDArray[np.float64]


class RankingKey(NamedTuple):
    """Which ranking: its task, shot count and method."""

    task: str
    shots: int
    method: str


def ascending(scores: Values) -> list[int]:
    """Return flat indices of scores, least important first; of equals the lower layer and head first."""
    order: list[int] = np.argsort(scores.ravel(), kind="stable").tolist()
    return order


@cache
def _every_head(layers: int, heads: int) -> tuple[tuple[int, int], ...]:
    """Return all heads as (layer, head), made once: thousands of masks name them."""
    return tuple((layer, head) for layer in range(layers) for head in range(heads))


def removed_count(percent: int, units: int) -> int:
    """Return how many of so many units a percentage is: ⌊p·n/100⌋, as the paper's code counts."""
    return percent * units // 100


def lowest_heads(scores: Values, count: int) -> Mask:
    """Return the mask of the `count` heads with the lowest scores, [L, H]."""
    every = _every_head(*scores.shape)
    return Mask(heads=frozenset(every[index] for index in ascending(scores)[:count]))


def highest_heads(scores: Values, count: int) -> Mask:
    """Return the mask of the `count` heads with the highest scores, [L, H]."""
    every, order = _every_head(*scores.shape), ascending(scores)
    return Mask(heads=frozenset(every[index] for index in order[len(order) - count :]))


def lowest_ffns(scores: Values, count: int) -> Mask:
    """Return the mask of the `count` FFNs with the lowest scores, [L]."""
    return Mask(ffns=frozenset(ascending(scores)[:count]))


def random_mask(layers: int, heads: int, head_count: int, ffn_count: int, seed: int) -> Mask:
    """Return a mask of that many heads and FFNs, drawn uniformly; those of one seed are nested."""
    rng = np.random.default_rng(seed)
    drawn, ffns = rng.permutation(layers * heads)[:head_count], rng.permutation(layers)[:ffn_count]
    return Mask(
        frozenset(divmod(int(index), heads) for index in drawn), frozenset(int(layer) for layer in ffns)
    )


def mean_of_ranks(scores: Sequence[Values]) -> Values:
    """Return the mean over rankings of every unit's rank, scaled to 0 (least) to 1 (most important)."""
    ranks = [_ranks(task.ravel()).reshape(task.shape) for task in scores]
    return np.asarray((np.mean(ranks, axis=0) - 1) / max(1, scores[0].size - 1))


def _ranks(scores: Values) -> Values:
    """Return the ranks of scores [N], from 1; equal ones share the mean of theirs."""
    # What scipy.stats.rankdata gives; a plan ranks too, and importing that takes it a second.
    _, numbers, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[numbers])


def mean_of_scores(scores: Sequence[Values]) -> Values:
    """Return the plain mean of raw scores, the paper's aggregate (eq. 10)."""
    return np.asarray(np.mean(scores, axis=0))


def mean_of_normalised(scores: Sequence[Values]) -> Values:
    """Return the mean over tasks of scores that sum to 1 in each: how large tasks' scores are does not weigh.

    Raw gradient scores shrink with the prompt's length (paper.md §1.4), so that their mean belongs to the
    short prompts. A task whose scores are all 0 counts as 0.
    """
    sums = [float(task.sum()) for task in scores]
    shares = [task / total if total else task for task, total in zip(scores, sums, strict=True)]
    return np.asarray(np.mean(shares, axis=0))


def with_ties_broken(scores: Values, by: Values) -> Values:
    """Return the ranks of scores [N], ascending from 0, equal ones told apart by a second score [N]."""
    ranks = np.empty(len(scores))
    ranks[np.lexsort((np.arange(len(scores)), by, scores))] = np.arange(len(scores))
    return ranks
