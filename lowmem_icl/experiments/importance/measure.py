"""Importance of heads and FFNs from one backward pass: the paper's score and a signed first-order estimate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.statistics.resampling import DocumentScores
from lowmem_icl.tasks.packing import PackedTask

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of one task at one shot count.

    gradient: heads [L, H], ffns [L]: Σ_examples Σ_tokens |⟨z, ∂L/∂z⟩| / Σ_examples (N − 1), L the mean negative
    log-likelihood per gold token (Bansal et al. 2023, eq. 8-10; one denominator for all layers, or, as in the paper's
    code, Σ_examples of answer tokens in the last).
    attribution: the mean over examples of Σ_tokens ⟨z, ∂logp/∂z⟩, per document [N, L, H] and [N, L]: a first-order
    estimate of how much the gold log-probability drops without the unit.
    head_documents: what every document adds to gradient_heads, kept in float32 for resampling.
    """

    gradient_heads: Values
    gradient_ffns: Values
    attribution_heads: Values
    attribution_ffns: Values
    head_documents: DocumentScores


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
    *,
    last_layer_by_continuation: bool = False,
) -> Importance:
    """Turn the unit gradients of a task's documents (engine.stream.UnitGradients) into scores.

    `last_layer_by_continuation`: the last layer is divided by answer tokens, as in the paper's code.
    """
    chosen = [task.options[number] for number in np.flatnonzero(choose_gold(task, logprobs))]
    continuation = np.array([len(option.continuation) for option in chosen], dtype=np.float64)
    # A path is context and continuation without the last token: its length is N - 1.
    lengths = np.array([len(option.path) for option in chosen], dtype=np.float64)
    by_document = head_absolute / continuation[:, None, None]
    # By document and layer what it is divided by, [N, L].
    tokens = np.repeat(lengths[:, None], head_absolute.shape[1], axis=1)
    if last_layer_by_continuation:
        tokens[:, -1] = continuation
    return Importance(
        gradient_heads=by_document.sum(0) / tokens.sum(0)[:, None],
        gradient_ffns=(ffn_absolute / continuation[:, None]).sum(0) / tokens.sum(0),
        attribution_heads=head_signed,
        attribution_ffns=ffn_signed,
        head_documents=DocumentScores(
            task.task.task,
            by_document.reshape(len(by_document), -1).astype(np.float32),
            # A column for all units, unless layers differ: documents times units are many.
            np.repeat(tokens, head_absolute.shape[2], axis=1)
            if last_layer_by_continuation
            else lengths[:, None],
            tuple(task.task.clusters),
        ),
    )


def unit_columns(
    base: Mapping[str, Any], metric: str, heads: Mapping[str, Values], ffns: Mapping[str, Values]
) -> list[dict[str, Any]]:
    """Return two blocks of result columns, an entry a unit, from columns over heads [L, H] and over FFNs [L]."""
    common = {"experiment": "importance", "method": metric, "metric": metric, "exact": True, **base}
    layer, head = np.indices(heads["value"].shape)
    return [
        common
        | {"kind": "head", "layer": layer.ravel(), "head": head.ravel()}
        | {name: column.ravel() for name, column in heads.items()},
        common | {"kind": "ffn", "layer": np.arange(len(ffns["value"]))} | dict(ffns),
    ]


def importance_columns(task: PackedTask, scores: Importance) -> list[dict[str, Any]]:
    """Return blocks of result columns of a task's scores; attribution, a mean over documents, with its standard error."""
    base = {
        "task": task.task.task,
        "shots": task.task.shots,
        "split": task.task.split,
        "documents": len(task.task.documents),
    }
    gradient = unit_columns(
        base, "gradient", {"value": scores.gradient_heads}, {"value": scores.gradient_ffns}
    )
    attribution = unit_columns(
        base, "attribution", _mean(scores.attribution_heads), _mean(scores.attribution_ffns)
    )
    return gradient + attribution


def _mean(by_document: Values) -> dict[str, Values]:
    """Return columns of the mean over documents with its interval, by unit, from [N, ...]."""
    documents, value = len(by_document), by_document.mean(0)
    stderr = np.full(value.shape, np.nan)
    if documents > 1:
        stderr = by_document.std(0, ddof=1) / np.sqrt(documents)
    return {"value": value, "stderr": stderr, "low": value - 1.96 * stderr, "high": value + 1.96 * stderr}
