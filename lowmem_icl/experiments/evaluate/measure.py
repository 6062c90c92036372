"""Accuracy and log-probabilities of a task, clean and under masks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.session.result import task_fields
from lowmem_icl.statistics.intervals import CHANGE, MEAN, SHARE, mean_interval
from lowmem_icl.tables.blocks import Block
from lowmem_icl.tables.schema import ACCURACIES
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores, task_metrics, unit_accuracy

PER_DOCUMENT = {"gold_logprob": MEAN, "gold_prob": SHARE, "margin": MEAN}
"""Scores of documents whose means are reported, and what they are."""


@dataclass(frozen=True, eq=False)
class MaskScores:
    """The scores of all options of a task, [O], under a mask of this name."""

    name: str
    mask: Mask
    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]


def evaluation_records(task: PackedTask, under: MaskScores) -> Iterator[Block]:
    """Yield the records of one task under one mask.

    Metrics of the task are lm-eval's, with its standard errors; gold_logprob, gold_prob and margin are means
    over documents with intervals clustered by passage. `majority` (of the clean run with right labels) is the
    accuracy of the best constant answer, `top_answer_share` the share of documents that get the answer given
    most often: a model that always says the same has 1 there, whatever its accuracy.
    """
    base = task_fields(task.task) | {
        "mask": under.name,
        "heads_removed": len(under.mask.heads),
        "ffns_removed": len(under.mask.ffns),
        "ablation": under.mask.ablation,
        "exact": True,
    }
    for metric in task_metrics(task.task, under.logprobs, under.greedy):
        chance = task.task.chance if metric.metric in ACCURACIES else None
        yield base | metric._asdict() | {"chance": chance}
    scores = document_scores(task.task, under.logprobs, under.greedy)
    for name, kind in PER_DOCUMENT.items():
        if not np.isnan(scores[name]).any():
            interval = mean_interval(scores[name], task.task.clusters, kind)
            yield base | {"metric": name} | interval._asdict()
    if under.name == CLEAN and task.task.labels == "right":
        yield base | {"metric": "majority", "value": task.task.majority}
    share = top_answer_share(task.task, under.logprobs)
    if share is not None:
        yield base | {"metric": "top_answer_share", "value": share}


def drop_records(task: PackedTask, clean: MaskScores, under: MaskScores) -> Iterator[Block]:
    """Yield what a task loses under a mask, clean minus masked on the same documents: acc_drop,
    gold_logprob_drop and, where there are options to choose among, gold_prob_drop, with intervals over the
    paired differences, clustered.
    """
    base = task_fields(task.task) | {
        "mask": under.name,
        "heads_removed": len(under.mask.heads),
        "ffns_removed": len(under.mask.ffns),
        "ablation": under.mask.ablation,
        "exact": True,
    }
    whole = document_scores(task.task, clean.logprobs, clean.greedy)
    left = document_scores(task.task, under.logprobs, under.greedy)
    accuracy, clusters = unit_accuracy(task.task, whole["acc"])
    lost = accuracy - unit_accuracy(task.task, left["acc"])[0]
    yield base | {"metric": "acc_drop"} | mean_interval(lost, clusters, CHANGE)._asdict()
    for name in ("gold_logprob", "gold_prob"):
        if np.isnan(whole[name]).any():
            continue
        interval = mean_interval(whole[name] - left[name], task.task.clusters, MEAN)
        yield base | {"metric": f"{name}_drop"} | interval._asdict()


def label_effect_records(
    right: TaskRows, control: TaskRows, with_right: MaskScores, with_control: MaskScores
) -> Iterator[Block]:
    """Yield what right labels give: scores with them minus scores with a control's, of the same documents.

    Intervals are over the paired differences, clustered; documents that are right only together count once in
    `acc_label_effect`.
    """
    base = task_fields(control) | {
        "mask": CLEAN,
        "heads_removed": 0,
        "ffns_removed": 0,
        "exact": True,
    }
    scores = document_scores(right, with_right.logprobs, with_right.greedy)
    others = document_scores(control, with_control.logprobs, with_control.greedy)
    accuracy, clusters = unit_accuracy(right, scores["acc"])
    gained = accuracy - unit_accuracy(control, others["acc"])[0]
    yield base | {"metric": "acc_label_effect"} | mean_interval(gained, clusters, CHANGE)._asdict()
    gained = scores["gold_logprob"] - others["gold_logprob"]
    interval = mean_interval(gained, right.clusters, MEAN)
    yield base | {"metric": "gold_logprob_label_effect"} | interval._asdict()


def single_cluster_notes(tasks: Sequence[TaskRows]) -> Iterator[str]:
    """Yield a sentence for every task whose documents are all one cluster: nothing of it has an interval."""
    for task in tasks:
        if len(set(task.clusters)) == 1 < len(task.documents):
            yield (
                f"task {task.task} at {task.shots} shots: its {len(task.documents)} documents share one set "
                "of demonstrations or one prompt, which says nothing of others: its numbers have no "
                "intervals, and means over tasks leave its error out"
            )


def top_answer_share(task: TaskRows, logprobs: NDArray[np.float64]) -> float | None:
    """Return the share of documents that get the answer given most often, from option scores [O].

    None where documents differ in how many options they have, or have but one: option numbers then mean
    nothing.
    """
    counts = {len(document.gold) for document in task.documents}
    if len(counts) > 1 or counts == {1}:
        return None
    answers = logprobs.reshape(-1, counts.pop()).argmax(1)
    return float(np.bincount(answers).max() / len(answers))


def answer_columns(task: PackedTask, mask: str, logprobs: NDArray[np.float64]) -> Block:
    """Return the columns of answers.parquet for one task under one mask, one record per option."""
    counts = [len(document.options) for document in task.task.documents]
    return {
        "task": task.task.task,
        "shots": task.task.shots,
        "split": task.task.split,
        "mask": mask,
        "document": np.repeat([document.index for document in task.task.documents], counts),
        "option": np.concatenate([np.arange(count) for count in counts]),
        "tokens": task.options.continuation_tokens,
        "logprob": logprobs,
        "gold": [gold for document in task.task.documents for gold in document.gold],
        "context_tokens": task.options.context_tokens,
        "truncated": task.options.truncated,
    }
