"""From scores to orders and from orders to masks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from lowmem_icl.masks import Mask

Values = NDArray[np.float64]


def ascending(scores: Values) -> list[int]:
    """Return flat places of scores, least important first; of equals the lower layer and head comes first."""
    return [int(place) for place in np.argsort(scores.ravel(), kind="stable")]


def lowest_heads(scores: Values, count: int) -> Mask:
    """Return the mask of the `count` heads with the lowest scores, [L, H]."""
    heads = scores.shape[1]
    return Mask(heads=frozenset(divmod(place, heads) for place in ascending(scores)[:count]))


def highest_heads(scores: Values, count: int) -> Mask:
    """Return the mask of the `count` heads with the highest scores, [L, H]."""
    heads = scores.shape[1]
    order = ascending(scores)
    return Mask(heads=frozenset(divmod(place, heads) for place in order[len(order) - count :]))


def lowest_ffns(scores: Values, count: int) -> Mask:
    """Return the mask of the `count` FFNs with the lowest scores, [L]."""
    return Mask(ffns=frozenset(ascending(scores)[:count]))


def random_mask(layers: int, heads: int, head_count: int, ffn_count: int, seed: int) -> Mask:
    """Return a mask of that many heads and FFNs, drawn uniformly."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(layers * heads, head_count, replace=False)
    ffns = rng.choice(layers, ffn_count, replace=False)
    return Mask(
        frozenset(divmod(int(place), heads) for place in drawn), frozenset(int(layer) for layer in ffns)
    )


def mean_of_ranks(scores: Sequence[Values]) -> Values:
    """Return the mean over rankings of every unit's rank, scaled to 0 (least) to 1 (most important)."""
    ranks = [rankdata(one.ravel()).reshape(one.shape) for one in scores]
    return (np.mean(ranks, axis=0) - 1) / max(1, scores[0].size - 1)


def mean_of_scores(scores: Sequence[Values]) -> Values:
    """Return the plain mean of raw scores, the paper's aggregate (eq. 10)."""
    return np.mean(scores, axis=0)
