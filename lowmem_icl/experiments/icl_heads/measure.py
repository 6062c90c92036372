"""How far two rankings of heads agree, and what removing their top heads costs.

Axis letters: L layers, H heads of a layer, M removals, N documents, O options, W windows of text, P tokens
that are predicted in each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.experiments.icl_heads.removals import (
    FUNCTION_VECTOR,
    INDUCTION,
    MASK,
    RANDOM_MEDIAN,
    Removal,
    Scores,
    columns,
    top_heads,
)
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.masks.rankings import removed_count
from lowmem_icl.session.result import task_fields
from lowmem_icl.statistics.bands import prediction_band
from lowmem_icl.statistics.detection import rank_correlation
from lowmem_icl.statistics.intervals import CHANGE, MEAN, PROPORTION, Kind, mean_intervals
from lowmem_icl.statistics.shared_units import chance_of_sharing, chance_within_layers
from lowmem_icl.tables.blocks import Block
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.scoring import document_scores, unit_accuracy

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]

OVERLAP_PERCENTS = (2, 5, 10)
BOUNDS = {
    "acc": (0.0, 1.0), "first_token_acc": (0.0, 1.0),
    "acc_drop": (-1.0, 1.0), "first_token_acc_drop": (-1.0, 1.0),
}  # fmt: skip
"""Of metrics that cannot lie outside them."""


def overlap_records(scores: Scores) -> Iterator[dict[str, Any]]:
    """Yield how far the two rankings agree: the share of the top heads that both have, beside chance over all
    heads and within the same layers, their rank correlation, and how deep the top heads lie.

    Depth runs from 0, the first layer, to 1, the last.
    """
    layers, heads = scores.induction.shape
    base = {"procedure": "overlap", "kind": "head", "exact": True}
    both = base | {"method": FUNCTION_VECTOR, "other_method": INDUCTION}
    correlation = rank_correlation(scores.function_vector, scores.induction)
    if np.isfinite(correlation.value):
        yield both | {"metric": "spearman"} | correlation._asdict()
    for percent in OVERLAP_PERCENTS:
        count = removed_count(percent, layers * heads)
        if not count:
            continue
        at = {"percent": percent, "count": count}
        tops = {method: top_heads(values, count) for method, values in scores.by_method.items()}
        left, right = (_flags(top, (layers, heads)) for top in tops.values())
        shared = float((left & right).sum()) / count
        for metric, chance in (
            ("top_overlap", chance_of_sharing(left, right)),
            ("layer_overlap", chance_within_layers(left, right)),
        ):
            yield both | at | {"metric": metric, "value": shared, "chance": chance.expected / count}
            yield both | at | {"metric": f"{metric}_p_value", "value": chance.p_value}
        for method, top in tops.items():
            depth = np.mean([layer for layer, _ in top.heads]) / max(1, layers - 1)
            yield base | at | {
                "method": method, "metric": "mean_depth", "value": float(depth), "chance": 0.5,
            }  # fmt: skip


def _flags(mask: Mask, shape: tuple[int, int]) -> Flags:
    flags = np.zeros(shape, dtype=np.bool_)
    flags[tuple(np.array(sorted(mask.heads)).T)] = True
    return flags


@dataclass(frozen=True, eq=False)
class TaskScores:
    """What the documents of a task score, clean and under M removals: log-probabilities of all options, and
    whether they are what the model writes, [1 + M, O] each; whether it writes the first token of a right
    answer, [1 + M, N].
    """

    task: TaskRows
    logprobs: Values
    greedy: Flags
    first_token: Flags

    def by_metric(self) -> Iterator[tuple[str, Values, Sequence[str], tuple[Kind, Kind]]]:
        """Yield metrics by document, [1 + M, N], with what intervals cluster by, and what values and their
        differences are.
        """
        found = document_scores(self.task, self.logprobs, self.greedy)
        accuracy, clusters = unit_accuracy(self.task, found["acc"])
        yield "acc", accuracy, clusters, (PROPORTION, CHANGE)
        first = self.first_token.astype(np.float64)
        yield "first_token_acc", first, self.task.clusters, (PROPORTION, CHANGE)
        yield "gold_logprob", found["gold_logprob"], self.task.clusters, (MEAN, MEAN)


def clean_records(scores: TaskScores) -> Iterator[dict[str, Any]]:
    """Yield what a task's documents score with all heads."""
    base = task_fields(scores.task) | {
        "procedure": "removal", "mask": CLEAN, "heads_removed": 0, "ffns_removed": 0, "exact": True,
    }  # fmt: skip
    for metric, values, clusters, (kind, _) in scores.by_metric():
        (interval,) = zip(*mean_intervals(values[:1], clusters, kind), strict=True)
        chance = {"chance": scores.task.chance} if metric == "acc" else {}
        yield base | {"metric": metric} | chance | _interval_fields(interval)


def removal_blocks(scores: TaskScores, removals: Sequence[Removal], means: str) -> Iterator[Block]:
    """Yield what a task's documents score without heads, and what that costs, paired by document; `means`
    says whose stand in the heads' place.
    """
    base = task_fields(scores.task) | {
        "procedure": "removal", "other_method": means, "exact": True, **columns(removals),
    }  # fmt: skip
    for metric, values, clusters, (kind, change) in scores.by_metric():
        yield base | {"metric": metric} | mean_intervals(values[1:], clusters, kind)._asdict()
        lost = mean_intervals(values[:1] - values[1:], clusters, change)
        yield base | {"metric": f"{metric}_drop"} | lost._asdict()


def text_blocks(logprobs: Values, removals: Sequence[Removal], means: str) -> Iterator[Block]:
    """Yield how far loss falls from the early to the late tokens of a text, in nats, with all heads and
    without some, with intervals over windows.

    logprobs: [1 + M, W, P], the first half of P early, the second late.
    """
    early, late = (-half.mean(-1) for half in np.split(logprobs, 2, axis=-1))
    alone = [str(window) for window in range(early.shape[1])]
    base = {"procedure": "text", "documents": len(alone), "exact": True}
    clean = base | {"mask": CLEAN, "heads_removed": 0, "ffns_removed": 0}
    masked = base | {"other_method": means, **columns(removals)}
    for metric, values in {"early_loss": early, "late_loss": late, "loss_difference": early - late}.items():
        intervals = mean_intervals(values, alone, MEAN)
        (whole, *_) = zip(*intervals, strict=True)
        yield clean | {"metric": metric} | _interval_fields(whole)
        under = {name: column[1:] for name, column in intervals._asdict().items()}
        yield masked | {"metric": metric} | under
    difference = early - late
    lost = mean_intervals(difference[:1] - difference[1:], alone, MEAN)
    yield masked | {"metric": "loss_difference_drop"} | lost._asdict()


def _interval_fields(interval: Sequence[float]) -> dict[str, float]:
    return {
        name: float(value) for name, value in zip(("value", "stderr", "low", "high"), interval, strict=True)
    }


def band_records(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield, for everything that random draws were measured by, their median with the band that holds the
    next draw at 95 %; records: those of all draws.
    """
    keys = ("procedure", "task", "shots", "other_method", "percent", "metric")
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in records:
        grouped.setdefault(tuple(row[key] for key in keys), []).append(row)
    for members in grouped.values():
        values = np.array([row["value"] for row in members])
        low, high = prediction_band(values, *BOUNDS.get(members[0]["metric"], ()))
        yield dict(members[0]) | {
            "mask": f"{MASK}-random", "method": RANDOM_MEDIAN, "value": float(np.median(values)),
            "stderr": None, "low": low, "high": high, "seed": None,
        }  # fmt: skip
