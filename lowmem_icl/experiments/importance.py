"""Importance of heads and FFNs from one backward pass: the paper's score and a signed first-order estimate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.tasks.packing import PackedTask

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of one task at one shot count.

    gradient: heads [L, H], ffns [L]: Σ_examples Σ_tokens |⟨z, ∂L/∂z⟩| / Σ_examples (N − 1), L the mean negative
    log-likelihood per gold token (Bansal et al. 2023, eq. 8-10; one denominator for all layers).
    attribution: the mean over examples of Σ_tokens ⟨z, ∂logp/∂z⟩, per document [N, L, H] and [N, L]: a first-order
    estimate of how much the gold log-probability drops without the unit.
    """

    gradient_heads: Values
    gradient_ffns: Values
    attribution_heads: Values
    attribution_ffns: Values


def choose_gold(task: PackedTask, logprobs: Values) -> NDArray[np.bool_]:
    """Return which options to differentiate, [O]: of every document the gold one that scores best."""
    chosen = np.zeros(len(task.options), dtype=np.bool_)
    for document, first in zip(task.task.documents, task.first_option, strict=True):
        gold = [int(first) + place for place, is_gold in enumerate(document.gold) if is_gold]
        chosen[max(gold, key=lambda number: (logprobs[number], -number))] = True
    return chosen


def importance(
    task: PackedTask,
    head_absolute: Values,
    head_signed: Values,
    ffn_absolute: Values,
    ffn_signed: Values,
    logprobs: Values,
) -> Importance:
    """Turn the unit gradients of a task's documents (engine.stream.UnitGradients) into scores."""
    chosen = [task.options[number] for number in np.flatnonzero(choose_gold(task, logprobs))]
    continuation = np.array([len(option.continuation) for option in chosen], dtype=np.float64)
    # A path is context and continuation without the last token: its length is N - 1.
    predictions = sum(len(option.path) for option in chosen)
    return Importance(
        gradient_heads=(head_absolute / continuation[:, None, None]).sum(0) / predictions,
        gradient_ffns=(ffn_absolute / continuation[:, None]).sum(0) / predictions,
        attribution_heads=head_signed,
        attribution_ffns=ffn_signed,
    )


def unit_rows(base: dict[str, Any], metric: str, heads: Values, ffns: Values) -> Iterator[dict[str, Any]]:
    """Yield a result row a unit from scores of heads [L, H] and FFNs [L]."""
    common = {"experiment": "importance", "method": metric, "metric": metric, "exact": True} | base
    for (layer, head), value in np.ndenumerate(heads):
        yield common | {"kind": "head", "layer": layer, "head": head, "value": float(value)}
    for (layer,), value in np.ndenumerate(ffns):
        yield common | {"kind": "ffn", "layer": layer, "value": float(value)}


def importance_rows(task: PackedTask, scores: Importance) -> Iterator[dict[str, Any]]:
    """Yield the result rows of a task's scores; attribution, a mean over documents, with its standard error."""
    documents = len(task.task.documents)
    base = {
        "task": task.task.task,
        "shots": task.task.shots,
        "split": task.task.split,
        "documents": documents,
    }
    yield from unit_rows(base, "gradient", scores.gradient_heads, scores.gradient_ffns)
    per_document = (scores.attribution_heads, scores.attribution_ffns)
    means = [values.mean(0) for values in per_document]
    stderrs = [
        values.std(0, ddof=1) / np.sqrt(documents) if documents > 1 else np.full(values.shape[1:], np.nan)
        for values in per_document
    ]
    of_unit = np.concatenate([stderrs[0].ravel(), stderrs[1]])
    for row, stderr in zip(unit_rows(base, "attribution", *means), of_unit, strict=True):
        yield row | {
            "stderr": float(stderr),
            "low": row["value"] - 1.96 * float(stderr),
            "high": row["value"] + 1.96 * float(stderr),
        }
