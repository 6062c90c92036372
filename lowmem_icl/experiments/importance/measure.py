"""Importance of heads and FFNs from one backward pass: the paper's score and a signed estimate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.session.result import task_fields
from lowmem_icl.session.work import best_gold
from lowmem_icl.statistics.intervals import MEAN, mean_intervals
from lowmem_icl.statistics.resampling import DocumentScores
from lowmem_icl.tables.blocks import Block
from lowmem_icl.tasks.packing import PackedTask

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of one task at one shot count.

    gradient: heads [L, H], ffns [L]: Σ_examples Σ_tokens |⟨z, ∂L/∂z⟩| / Σ_examples (N − 1), L the mean
    negative log-likelihood per gold token (Bansal et al. 2023, eq. 8-10; one denominator for all layers, or,
    as in the paper's code, Σ_examples of answer tokens in the last). attribution: the mean over examples of
    Σ_tokens ⟨z, ∂logp/∂z⟩, per document [N, L, H] and [N, L]: a first-order estimate of how much the gold
    log-probability drops without the unit. head_documents: what every document adds to gradient_heads, kept
    in float32 for resampling.
    """

    gradient_heads: Values
    gradient_ffns: Values
    attribution_heads: Values
    attribution_ffns: Values
    head_documents: DocumentScores


def importance(
    task: PackedTask, gradients: UnitGradients, *, last_layer_by_continuation: bool = False
) -> Importance:
    """Turn the unit gradients of a task's documents into scores.

    `last_layer_by_continuation`: the last layer is divided by answer tokens, as in the paper's code.
    """
    selected = np.flatnonzero(best_gold(task, gradients.logprobs))
    continuation = task.options.continuation_tokens[selected].astype(np.float64)
    # A path is context and continuation without the last token: its length is N - 1.
    lengths = task.options.path_tokens[selected].astype(np.float64)
    by_document = gradients.head_absolute / continuation[:, None, None]
    # By document and layer what it is divided by, [N, L].
    n_layers, n_heads = by_document.shape[1:]
    tokens = np.repeat(lengths[:, None], n_layers, axis=1)
    if last_layer_by_continuation:
        tokens[:, -1] = continuation
    return Importance(
        gradient_heads=by_document.sum(0) / tokens.sum(0)[:, None],
        gradient_ffns=(gradients.ffn_absolute / continuation[:, None]).sum(0) / tokens.sum(0),
        attribution_heads=gradients.head_signed,
        attribution_ffns=gradients.ffn_signed,
        head_documents=DocumentScores(
            task.task.task,
            by_document.reshape(len(by_document), -1).astype(np.float32),
            # A column for all units, unless layers differ: documents times units are many.
            np.repeat(tokens, n_heads, axis=1) if last_layer_by_continuation else lengths[:, None],
            tuple(task.task.clusters),
        ),
    )


def unit_blocks(
    base: Mapping[str, object], metric: str, heads: Mapping[str, Values], ffns: Mapping[str, Values]
) -> list[Block]:
    """Return two blocks of results, one record per unit, from columns over heads [L, H] and over FFNs [L]."""
    common = {"method": metric, "metric": metric, "exact": True, **base}
    layer, head = np.indices(heads["value"].shape)
    return [
        common
        | {"kind": "head", "layer": layer.ravel(), "head": head.ravel()}
        | {name: column.ravel() for name, column in heads.items()},
        common | {"kind": "ffn", "layer": np.arange(len(ffns["value"]))} | dict(ffns),
    ]


def importance_blocks(task: PackedTask, scores: Importance) -> list[Block]:
    """Return blocks of results of a task's scores; attribution, a mean over documents, with its clustered
    interval.
    """
    base, clusters = task_fields(task.task), task.task.clusters
    gradient = unit_blocks(
        base, "gradient", {"value": scores.gradient_heads}, {"value": scores.gradient_ffns}
    )
    heads, ffns = (
        mean_columns(by_document, clusters)
        for by_document in (scores.attribution_heads, scores.attribution_ffns)
    )
    return gradient + unit_blocks(base, "attribution", heads, ffns)


def mean_columns(by_document: Values, clusters: Sequence[str]) -> dict[str, Values]:
    """Return columns of the clustered mean over documents with its interval, by unit, from [N, ...]."""
    units = by_document.shape[1:]
    intervals = mean_intervals(by_document.reshape(len(by_document), -1).T, clusters, MEAN)
    columns = intervals._asdict() | {"value": by_document.mean(0)}
    return {name: column.reshape(units) for name, column in columns.items()}
