"""Option log-probabilities to a document's scores and to lm-eval's metrics."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.tasks.loading import TaskRows

LARGEST_GROUP_COUNT = 200

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]


class MetricValue(NamedTuple):
    """One of a task's metrics with its standard error."""

    metric: str
    value: float
    stderr: float


def document_scores(task: TaskRows, logprobs: Sequence[Values], greedy: Sequence[Flags]) -> dict[str, Values]:
    """Return scores a document, [N] each, from the summed log-probabilities of its options (nats).

    gold_logprob: the best gold option's; gold_prob: the softmax over the options, at the gold ones; margin: best
    gold minus best other, NaN where there is no other; acc: 1 where the first best option is a gold one, or, with
    one option, where it is what the model would say.
    """
    count = len(task.documents)
    scores = {name: np.empty(count) for name in ("gold_logprob", "gold_prob", "margin", "acc")}
    for place, (document, values, flags) in enumerate(zip(task.documents, logprobs, greedy, strict=True)):
        gold = np.array(document.gold)
        weights = np.exp(values - values.max())
        best_gold = values[gold].max()
        scores["gold_logprob"][place] = best_gold
        scores["gold_prob"][place] = weights[gold].sum() / weights.sum()
        scores["margin"][place] = best_gold - values[~gold].max() if not gold.all() else np.nan
        scores["acc"][place] = flags[0] if len(values) == 1 else gold[int(np.argmax(values))]
    return scores


def task_metrics(task: TaskRows, logprobs: Sequence[Values], greedy: Sequence[Flags]) -> list[MetricValue]:
    """Return lm-eval's metrics of the task over all documents.

    A mean over documents has the standard error of a mean; other metrics (MultiRC's, F1) a jackknife over clusters.
    """
    values: dict[str, list[Any]] = defaultdict(list)
    for document, of_document, flags in zip(task.documents, logprobs, greedy, strict=True):
        member = task.members[document.member]
        pairs = [(float(value), bool(flag)) for value, flag in zip(of_document, flags, strict=True)]
        for name, value in member.process_results(document.row, pairs).items():
            values[name].append(value)
    aggregation = task.members[0].aggregation()
    clusters = task.clusters
    result = []
    for name, items in values.items():
        if name in aggregation:
            result.append(
                MetricValue(
                    name, float(aggregation[name](items)), _stderr(items, clusters, aggregation[name])
                )
            )
    return result


def _stderr(items: list[Any], clusters: Sequence[str], aggregate: Callable[[list[Any]], float]) -> float:
    if len(items) < 2:
        return float("nan")
    if all(isinstance(item, (int, float, np.number)) for item in items):
        return float(np.std(items, ddof=1) / np.sqrt(len(items)))
    of_cluster: dict[str, list[Any]] = defaultdict(list)
    for item, cluster in zip(items, clusters, strict=True):
        of_cluster[cluster].append(item)
    groups = list(of_cluster.values())
    if len(groups) < 2:
        return float("nan")
    # Leave one group out, rather than draw groups again: a MultiRC question drawn twice would count once.
    count = min(len(groups), LARGEST_GROUP_COUNT)
    without = [
        aggregate([item for place, group in enumerate(groups) if place % count != left_out for item in group])
        for left_out in range(count)
    ]
    return float(np.sqrt((count - 1) * np.var(without)))


def unit_accuracy(task: TaskRows, accuracy: Values) -> tuple[Values, list[str]]:
    """Return accuracy by scored unit and the units' clusters: documents that are right only together count once.

    accuracy: by document, [..., N]; returned [..., U].
    """
    units: dict[str, list[int]] = {}
    for place, document in enumerate(task.documents):
        units.setdefault(document.unit, []).append(place)
    by_unit = np.stack([accuracy[..., places].min(-1) for places in units.values()], axis=-1)
    return by_unit, [task.clusters[places[0]] for places in units.values()]
