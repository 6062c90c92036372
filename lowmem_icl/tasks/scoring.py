"""Option log-probabilities to a document's scores and to lm-eval's metrics."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.metrics import mean
from numpy.typing import NDArray

from lowmem_icl.statistics.intervals import (
    MEAN,
    PROPORTION,
    SHARE,
    Interval,
    Kind,
    mean_interval,
    statistic_interval,
)
from lowmem_icl.tasks.loading import TaskRows

LARGEST_GROUP_COUNT = 200

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]


class MetricValue(NamedTuple):
    """One of a task's metrics with its standard error and the bounds of its 95 % interval."""

    metric: str
    value: float
    stderr: float
    low: float
    high: float


def document_scores(task: TaskRows, logprobs: Values, greedy: Flags) -> dict[str, Values]:
    """Return scores by document, [..., N] each, from summed log-probabilities of all options, [..., O].

    gold_logprob: the best gold option's; gold_prob: the softmax over the options, at the gold ones, NaN where
    there is one option, of which it says nothing; margin: best gold minus best other, NaN where there is no
    other; acc: 1 where the first best option is a gold one, or, with one option, where it is what the model
    would say (`greedy`, [..., O]).
    """
    counts = np.array([len(document.gold) for document in task.documents])
    starts = np.cumsum(counts) - counts
    gold = np.concatenate([document.gold for document in task.documents])

    def largest(values: Values) -> Values:
        return np.maximum.reduceat(values, starts, axis=-1)

    best = largest(logprobs)
    weights = np.exp(logprobs - np.repeat(best, counts, axis=-1))
    best_gold = largest(np.where(gold, logprobs, -np.inf))
    best_other = largest(np.where(gold, -np.inf, logprobs))
    is_best = logprobs == np.repeat(best, counts, axis=-1)
    first_best = np.minimum.reduceat(np.where(is_best, np.arange(len(gold)), len(gold)), starts, axis=-1)
    share = np.add.reduceat(weights * gold, starts, axis=-1) / np.add.reduceat(weights, starts, axis=-1)
    return {
        "gold_logprob": best_gold,
        "gold_prob": np.where(counts == 1, np.nan, share),
        "margin": np.where(np.isneginf(best_other), np.nan, best_gold - best_other),
        "acc": np.where(counts == 1, greedy[..., starts], gold[first_best]).astype(np.float64),
    }


def task_metrics(task: TaskRows, logprobs: Values, greedy: Flags) -> list[MetricValue]:
    """Return lm-eval's metrics of the task over all documents, from the scores of all options, [O].

    A mean over documents has the standard error of a mean, clustered by passage or by shared demonstrations;
    other metrics (MultiRC's, F1, perplexity) a jackknife over clusters.
    """
    ends = np.cumsum([len(document.gold) for document in task.documents])[:-1]
    values: dict[str, list[Any]] = defaultdict(list)
    for document, document_logprobs, flags in zip(
        task.documents, np.split(logprobs, ends), np.split(greedy, ends), strict=True
    ):
        member = task.members[document.member]
        pairs = [(float(value), bool(flag)) for value, flag in zip(document_logprobs, flags, strict=True)]
        # By length an empty option is infinitely unlikely, of which numpy would warn on the terminal.
        with np.errstate(divide="ignore", invalid="ignore"):
            found = member.process_results(document.row, pairs)
        for name, value in found.items():
            values[name].append(value)
    aggregation = task.members[0].aggregation()
    clusters = task.clusters
    result = []
    for name, items in values.items():
        if name in aggregation:
            result.append(MetricValue(name, *_interval(items, clusters, aggregation[name])))
    return result


def _interval(items: list[Any], clusters: Sequence[str], aggregate: Callable[[list[Any]], float]) -> Interval:
    """Return a metric of the documents' items: what the harness makes of them, with an interval."""
    value = float(aggregate(items))
    # What is no mean of numbers (F1, a perplexity) has no error of a mean.
    if aggregate is not mean or not all(isinstance(item, (int, float, np.number)) for item in items):
        return statistic_interval(value, _jackknife_stderr(items, clusters, aggregate), clusters)
    values = np.array(items, dtype=np.float64)
    return mean_interval(values, clusters, _kind_of(values))._replace(value=value)


def _kind_of(values: Values) -> Kind:
    if np.isin(values, (0, 1)).all():
        return PROPORTION
    return SHARE if (values >= 0).all() and (values <= 1).all() else MEAN


def _jackknife_stderr(
    items: list[Any], clusters: Sequence[str], aggregate: Callable[[list[Any]], float]
) -> float:
    items_by_cluster: dict[str, list[Any]] = defaultdict(list)
    for item, cluster in zip(items, clusters, strict=True):
        items_by_cluster[cluster].append(item)
    groups = list(items_by_cluster.values())
    if len(groups) < 2:
        return float("nan")
    # Leave one group out, rather than draw groups again: a MultiRC question drawn twice would count once.
    count = min(len(groups), LARGEST_GROUP_COUNT)
    without = [
        aggregate(
            [item for number, group in enumerate(groups) if number % count != left_out for item in group]
        )
        for left_out in range(count)
    ]
    return float(np.sqrt((count - 1) * np.var(without)))


def unit_accuracy(task: TaskRows, accuracy: Values) -> tuple[Values, list[str]]:
    """Return accuracy by scored unit, [..., U], and the units' clusters, from that by document, [..., N].

    Documents that are right only together count once.
    """
    units: dict[str, list[int]] = {}
    for index, document in enumerate(task.documents):
        units.setdefault(document.unit, []).append(index)
    by_unit = np.stack([accuracy[..., indices].min(-1) for indices in units.values()], axis=-1)
    return by_unit, [task.clusters[indices[0]] for indices in units.values()]
