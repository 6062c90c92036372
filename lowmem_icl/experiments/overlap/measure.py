"""How far rankings of heads agree between tasks, shot counts and methods, and how far they could."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.rankings import RankingKey
from lowmem_icl.statistics.agreement import correlation_of_orders, kendall, spearman, top_overlap
from lowmem_icl.statistics.resampling import DocumentRanking, correlation_interval, split_half
from lowmem_icl.tasks.sources import in_domain

AGGREGATE = "aggregate"
TOP_PERCENTS = (10, 20, 30, 40, 50)

Values = NDArray[np.float64]
Rows = Iterator[dict[str, Any]]


def comparable(one: RankingKey, other: RankingKey) -> bool:
    """Tell whether two rankings differ in one thing only: the task, the shot count or the method."""
    return sum(a != b for a, b in zip(one, other, strict=True)) == 1


def overlap_rows(
    rankings: Mapping[RankingKey, Values],
    documents: Mapping[RankingKey, DocumentRanking] = {},
    seed: int = 0,
) -> Rows:
    """Yield how far every comparable pair of head scores, [L, H] each, agrees; higher scores are more important.

    spearman, kendall: of the scores; top_overlap: the share of the top `k` percent of heads in common, with its expectation
    for unrelated rankings; spearman_of_order, between rankings of one method: what the paper's code computes instead.
    Where `documents` has both rankings of one method, spearman has an interval over documents. split_half: a ranking's
    reliability. cross_shot_spearman (task `aggregate`): the mean over tasks of the spearman between two shot counts, the
    paper's Table 1; its variance over T tasks is T · stderr².
    """
    keys = sorted(rankings)
    for method in sorted({key.method for key in keys}):
        yield from _rows_of_method([key for key in keys if key.method == method], rankings, documents, seed)
    for one, other in combinations(keys, 2):
        if comparable(one, other) and one.method != other.method:
            yield from _agreement_rows(one, other, rankings)


def _rows_of_method(
    keys: list[RankingKey],
    rankings: Mapping[RankingKey, Values],
    documents: Mapping[RankingKey, DocumentRanking],
    seed: int,
) -> Rows:
    """Yield the rows of one method's rankings; no more resampled ranks than these are held at a time."""
    resampled: dict[RankingKey, NDArray[np.float32]] = {}
    for key in keys:
        if key in documents and documents[key].can_be_split:
            resampled[key] = documents[key].resampled(seed)
            reliability = split_half(documents[key], seed)
            if np.isfinite(reliability):
                yield _base(key) | {
                    "metric": "split_half", "value": reliability, "documents": documents[key].documents
                }  # fmt: skip
    across_shots: dict[tuple[int, int], list[float]] = {}
    for one, other in combinations(keys, 2):
        if not comparable(one, other):
            continue
        for row in _agreement_rows(one, other, rankings):
            if row["metric"] == "spearman":
                if one in resampled and other in resampled:
                    interval = correlation_interval(row["value"], resampled[one], resampled[other])
                    row |= {} if interval is None else interval._asdict()
                if one.shots != other.shots and one.task != AGGREGATE and in_domain(one.task):
                    across_shots.setdefault((one.shots, other.shots), []).append(row["value"])
            yield row
        yield _pair(one, other) | {
            "metric": "spearman_of_order",
            "value": correlation_of_orders(rankings[one].ravel(), rankings[other].ravel()),
            "chance": 0.0,
        }
    for (shots, other_shots), values in across_shots.items():
        tasks = len(values)
        pair = _pair(
            RankingKey(AGGREGATE, shots, keys[0].method), RankingKey(AGGREGATE, other_shots, keys[0].method)
        )
        yield pair | {
            "metric": "cross_shot_spearman",
            "value": float(np.mean(values)),
            "stderr": float(np.std(values, ddof=1) / np.sqrt(tasks)) if tasks > 1 else None,
            "chance": 0.0,
        }


def _agreement_rows(one: RankingKey, other: RankingKey, rankings: Mapping[RankingKey, Values]) -> Rows:
    scores, others = rankings[one].ravel(), rankings[other].ravel()
    base = _pair(one, other)
    for metric, correlate in (("spearman", spearman), ("kendall", kendall)):
        correlation = correlate(scores, others)
        if np.isfinite(correlation):
            yield base | {"metric": metric, "value": correlation, "chance": 0.0}
    for percent in TOP_PERCENTS:
        shared = top_overlap(scores, others, percent / 100)
        if np.isfinite(shared.value):
            yield base | {
                "metric": "top_overlap",
                "k": percent,
                "value": float(shared.value),
                "chance": float(shared.chance),
            }


def _base(key: RankingKey) -> dict[str, Any]:
    return {"task": key.task, "shots": key.shots, "method": key.method, "kind": "head", "exact": True}


def _pair(one: RankingKey, other: RankingKey) -> dict[str, Any]:
    return _base(one) | {
        "other_task": other.task,
        "other_shots": other.shots,
        "other_method": other.method,
    }
