"""How far rankings of heads agree between tasks, shot counts and methods, and how far they could."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.rankings import RankingKey
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.statistics.agreement import correlation_of_orders, kendall, spearman, top_overlap
from lowmem_icl.statistics.intervals import MEAN, Interval, mean_interval
from lowmem_icl.statistics.resampling import (
    DocumentRanking,
    ResampledRanking,
    correlation_interval,
    kendall_interval,
    overlap_interval,
    split_half,
)

TOP_PERCENTS = (10, 20, 30, 40, 50)

Values = NDArray[np.float64]
Records = Iterator[dict[str, Any]]


def comparable(left: RankingKey, right: RankingKey) -> bool:
    """Tell whether two rankings differ in one thing only: the task, the shot count or the method."""
    return sum(a != b for a, b in zip(left, right, strict=True)) == 1


def overlap_records(
    rankings: Mapping[RankingKey, Values],
    documents: Mapping[RankingKey, DocumentRanking] = {},
    seed: int = 0,
) -> Records:
    """Yield how far every comparable pair of head scores, [L, H] each, agrees; higher scores are more
    important.

    spearman, kendall: of the scores; top_overlap: the share of the top `percent` of heads (`count` of them)
    in common, with its expectation for unrelated rankings; spearman_of_order, between rankings of one method:
    what the paper's code computes instead. Where `documents` has both rankings of one method, all but the
    last have an interval over documents. split_half: a ranking's reliability. cross_shot_spearman (task
    `aggregate`): the mean over tasks of the spearman between two shot counts, the paper's Table 1, with its
    interval over tasks; its variance over T tasks is T · stderr².
    """
    keys = sorted(rankings)
    for method in sorted({key.method for key in keys}):
        yield from _method_records([key for key in keys if key.method == method], rankings, documents, seed)
    for left, right in combinations(keys, 2):
        if comparable(left, right) and left.method != right.method:
            yield from _agreement_records(left, right, rankings)


def _method_records(
    keys: list[RankingKey],
    rankings: Mapping[RankingKey, Values],
    documents: Mapping[RankingKey, DocumentRanking],
    seed: int,
) -> Records:
    """Yield the records of one method's rankings; no more resampled ranks than these are held at a time."""
    resampled: dict[RankingKey, ResampledRanking] = {}
    for key in keys:
        if key in documents and documents[key].can_be_split:
            resampled[key] = documents[key].resampled(seed)
            reliability = split_half(documents[key], seed)
            if np.isfinite(reliability):
                yield _base(key, "reliability") | {
                    "metric": "split_half",
                    "value": reliability,
                    "documents": documents[key].documents,
                }
    across_shots: dict[tuple[int, int], list[float]] = {}
    for left, right in combinations(keys, 2):
        if not comparable(left, right):
            continue
        for record in _agreement_records(left, right, rankings):
            if left in resampled and right in resampled:
                interval = _interval(record, resampled[left], resampled[right])
                record |= {} if interval is None else interval._asdict()
            is_across = left.shots != right.shots and left.task != AGGREGATE and in_domain(left.task)
            if record["metric"] == "spearman" and is_across:
                across_shots.setdefault((left.shots, right.shots), []).append(record["value"])
            yield record
        yield _pair(left, right) | {
            "metric": "spearman_of_order",
            "value": correlation_of_orders(rankings[left].ravel(), rankings[right].ravel()),
            "chance": 0.0,
        }
    for (shots, other_shots), values in across_shots.items():
        yield _cross_shot_record(keys[0].method, shots, other_shots, values)


def _interval(record: dict[str, Any], left: ResampledRanking, right: ResampledRanking) -> Interval | None:
    """Return the interval over documents of one measure of agreement."""
    if record["metric"] == "spearman":
        return correlation_interval(record["value"], left, right)
    if record["metric"] == "kendall":
        return kendall_interval(record["value"], left, right)
    return overlap_interval(record["value"], record["count"], left, right)


def _cross_shot_record(method: str, shots: int, other_shots: int, values: list[float]) -> dict[str, Any]:
    left, right = RankingKey(AGGREGATE, shots, method), RankingKey(AGGREGATE, other_shots, method)
    tasks = [str(number) for number in range(len(values))]
    found = mean_interval(np.array(values), tasks, MEAN)
    low, high = np.clip([found.low, found.high], -1, 1)
    return (
        _pair(left, right, "cross-shot")
        | {"metric": "cross_shot_spearman", "chance": 0.0}
        | found._replace(low=float(low), high=float(high))._asdict()
    )


def _agreement_records(left: RankingKey, right: RankingKey, rankings: Mapping[RankingKey, Values]) -> Records:
    scores, others = rankings[left].ravel(), rankings[right].ravel()
    base = _pair(left, right)
    for metric, correlate in (("spearman", spearman), ("kendall", kendall)):
        correlation = correlate(scores, others)
        if np.isfinite(correlation):
            yield base | {"metric": metric, "value": correlation, "chance": 0.0}
    for percent in TOP_PERCENTS:
        shared = top_overlap(scores, others, percent / 100)
        if np.isfinite(shared.value):
            yield base | {
                "metric": "top_overlap",
                "percent": percent,
                "count": int(percent / 100 * len(scores)),
                "value": float(shared.value),
                "chance": float(shared.chance),
            }


def _base(key: RankingKey, procedure: str) -> dict[str, Any]:
    return {
        "procedure": procedure,
        "task": key.task,
        "shots": key.shots,
        "method": key.method,
        "kind": "head",
        "exact": True,
    }


def _pair(left: RankingKey, right: RankingKey, procedure: str = "pair") -> dict[str, Any]:
    return _base(left, procedure) | {
        "other_task": right.task,
        "other_shots": right.shots,
        "other_method": right.method,
    }
