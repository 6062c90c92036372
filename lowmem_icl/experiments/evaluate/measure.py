"""Accuracy and log-probabilities of tasks, clean and under masks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask
from lowmem_icl.statistics.intervals import mean_with_interval
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores, task_metrics

CLEAN = "clean"
PER_DOCUMENT = ("gold_logprob", "gold_prob", "margin")


def evaluation_rows(
    task: PackedTask,
    mask: str,
    removed: Mask,
    logprobs: NDArray[np.float64],
    greedy: NDArray[np.bool_],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield the result rows of one task under one mask; logprobs, greedy: [O].

    Metrics of the task are lm-eval's, with its standard errors; gold_logprob, gold_prob and margin are means over
    documents with intervals clustered by passage. `majority` (of the clean run) is the accuracy of the best constant
    answer, `top_answer_share` the share of documents that get the answer given most often: a model that always says the
    same has 1 there, whatever its accuracy.
    """
    base = {
        "task": task.task.task,
        "shots": task.task.shots,
        "split": task.task.split,
        "mask": mask,
        "heads_removed": len(removed.heads),
        "ffns_removed": len(removed.ffns),
        "exact": True,
        "documents": len(task.task.documents),
    }
    for metric in task_metrics(task.task, logprobs, greedy):
        of_choice = metric.metric in ("acc", "em")
        yield base | {
            "metric": metric.metric,
            "value": metric.value,
            "stderr": metric.stderr,
            "low": metric.value - 1.96 * metric.stderr,
            "high": metric.value + 1.96 * metric.stderr,
            "chance": task.task.chance if of_choice else None,
        }
    scores = document_scores(task.task, logprobs, greedy)
    clusters = task.task.clusters
    for name in PER_DOCUMENT:
        values = scores[name]
        if not np.isnan(values).any():
            interval = mean_with_interval(values, clusters, seed=seed)
            yield base | {"metric": name} | interval._asdict()
    if mask == CLEAN:
        yield base | {"metric": "majority", "value": task.task.majority}
    share = top_answer_share(task.task, logprobs)
    if share is not None:
        yield base | {"metric": "top_answer_share", "value": share}


def top_answer_share(task: TaskRows, logprobs: NDArray[np.float64]) -> float | None:
    """Return the share of documents that get the answer given most often, from option scores [O].

    None where documents differ in how many options they have, or have but one: the places of options then mean nothing.
    """
    counts = {len(document.gold) for document in task.documents}
    if len(counts) > 1 or counts == {1}:
        return None
    answers = logprobs.reshape(-1, counts.pop()).argmax(1)
    return float(np.bincount(answers).max() / len(answers))


def answer_columns(task: PackedTask, mask: str, logprobs: NDArray[np.float64]) -> dict[str, Any]:
    """Return the columns of answers.parquet for one task under one mask, one entry an option."""
    counts = [len(document.options) for document in task.task.documents]
    return {
        "task": [task.task.task] * len(task.options),
        "shots": [task.task.shots] * len(task.options),
        "split": [task.task.split] * len(task.options),
        "mask": [mask] * len(task.options),
        "document": np.repeat([document.index for document in task.task.documents], counts),
        "option": np.concatenate([np.arange(count) for count in counts]),
        "tokens": [len(option.continuation) for option in task.options],
        "logprob": logprobs,
        "gold": [gold for document in task.task.documents for gold in document.gold],
        "context_tokens": [option.context_tokens for option in task.options],
        "truncated": [option.truncated for option in task.options],
    }


def mean_over_tasks(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield rows of the task `aggregate`: the mean over tasks of every metric that all tasks have.

    Rows are grouped by `fields`, which must not hold `task`; the standard error is that of a mean of independent
    tasks. A task's own metric (em for ReCoRD) counts as its accuracy.
    """
    tasks = {row["task"] for row in rows}
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        metric = "acc" if row["metric"] == "em" else row["metric"]
        grouped.setdefault((metric, *(row.get(field) for field in fields)), []).append(row)
    for (metric, *values), members in grouped.items():
        if len(tasks) < 2 or {row["task"] for row in members} != tasks:
            continue
        value = float(np.mean([row["value"] for row in members]))
        errors = [row.get("stderr") for row in members]
        stderr = None if None in errors else float(np.sqrt(np.sum(np.square(errors))) / len(members))  # type: ignore[arg-type]
        chances = [row.get("chance") for row in members]
        yield dict(zip(fields, values, strict=True)) | {
            "task": "aggregate",
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "low": None if stderr is None else value - 1.96 * stderr,
            "high": None if stderr is None else value + 1.96 * stderr,
            "chance": None if None in chances else float(np.mean(chances)),  # type: ignore[arg-type]
            "exact": True,
            "documents": sum(row["documents"] for row in members),
        }
