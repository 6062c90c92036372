"""How far rankings of heads agree between tasks, shot counts and methods."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.rankings import RankingKey
from lowmem_icl.statistics import spearman, top_overlap

TOP_PERCENT = 30


def comparable(one: RankingKey, other: RankingKey) -> bool:
    """Tell whether two rankings differ in one thing only: the task, the shot count or the method."""
    return sum(a != b for a, b in zip(one, other, strict=True)) == 1


def overlap_rows(rankings: Mapping[RankingKey, NDArray[np.float64]]) -> Iterator[dict[str, Any]]:
    """Yield rank correlation and top-30 % overlap of every comparable pair of head scores, [L, H] each.

    Higher scores are more important; `chance` of an overlap is its expectation for unrelated rankings.
    """
    for (one, scores), (other, others) in combinations(sorted(rankings.items(), key=lambda item: item[0]), 2):
        if not comparable(one, other):
            continue
        base = {
            "task": one.task,
            "shots": one.shots,
            "method": one.method,
            "kind": "head",
            "other_task": other.task,
            "other_shots": other.shots,
            "other_method": other.method,
            "exact": True,
        }
        correlation = spearman(scores.ravel(), others.ravel())
        if np.isfinite(correlation):
            yield base | {"metric": "spearman", "value": float(correlation), "chance": 0.0}
        shared = top_overlap(scores.ravel(), others.ravel(), TOP_PERCENT / 100)
        yield base | {
            "metric": "top_overlap",
            "k": TOP_PERCENT,
            "value": float(shared.value),
            "chance": float(shared.chance),
        }
