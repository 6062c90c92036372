"""Figures: what single heads are worth, by gradient, by removal, by demonstrations and by labels."""

import polars as pl
from matplotlib.figure import Figure

from lowmem_icl.report.figures.layout import Asked, Record
from lowmem_icl.report.figures.maps import head_maps


def importance_heads(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw the gradient scores of heads."""
    is_gradient = (pl.col("experiment") == "importance") & (pl.col("metric") == "gradient")
    gradients = results.filter(is_gradient)
    return head_maps(gradients, record, asked, "gradient importance")


def ablate_heads(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw what removing each head alone costs."""
    return head_maps(
        _ablated(results, "gold_logprob_drop"),
        record,
        asked,
        "gold log-probability lost without the head, nats",
    )


def ablate_in_context(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw what removing each head costs more with demonstrations than without."""
    return head_maps(
        _ablated(results, "icl_effect"), record, asked, "drop with demonstrations − without, nats"
    )


def ablate_labels(results: pl.DataFrame, record: Record, asked: Asked) -> Figure | None:
    """Draw what removing each head costs more with right labels than with shuffled ones."""
    return head_maps(
        _ablated(results, "label_effect"), record, asked, "drop with right labels − shuffled, nats"
    )


def _ablated(results: pl.DataFrame, metric: str) -> pl.DataFrame:
    return results.filter((pl.col("experiment") == "ablate") & (pl.col("metric") == metric))
