"""Points of pruning curves, by what is removed and not by the level that asked for it."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from lowmem_icl.masks.naming import CLEAN

# Of one curve of one metric; a single random draw is a curve, and so is the mean of all.
CURVE = ("procedure", "task", "shots", "method", "kind", "other_task", "other_shots", "metric", "seed")
REMOVED = ("heads_removed", "ffns_removed")
CURVE_NAMES = {
    ("gradient", False): "own ranking",
    ("ablation", False): "own ranking",
    ("gradient", True): "ranking of all tasks",
    ("ablation", True): "ranking of all tasks",
    ("rescored", False): "scored again at every level",
    ("icl_effect", False): "by in-context effect",
    ("gradient-highest", False): "most similar task's ranking",
    ("gradient-lowest", False): "least similar task's ranking",
}
"""What curves are called, by their method and whether the ranking is that of all tasks."""
# Curves of another shot count's ranking are in the table alone; heads and FFNs together are a grid.
UNDRAWN = ("cross-shot", "curve-combined")
KNEES = ("knee", "knee_certain", "knee_acc_drop")


def curve_points(results: pl.DataFrame, model: Mapping[str, Any]) -> pl.DataFrame:
    """Return the points of all pruning curves, every set of removed units of a curve once, by how much is
    removed.

    model: run.json's, for its layers and heads. Of few units neighbouring levels remove the same: 50, 60 and
    70 per cent of four FFNs are two of them. Such levels are one point, that of the lowest. Masks of a curve
    are nested, so that equal numbers are equal sets. Added columns: `heads_share` and `ffns_share`, how much
    of the heads and FFNs is removed, in per cent, and `share`, that of the curve's kind (null for curves of
    both).
    """
    n_heads, n_ffns = model["layers"] * model["heads"], model["layers"]
    return (
        results.filter(
            (pl.col("experiment") == "prune")
            & pl.col("percent").is_not_null()
            & ~pl.col("metric").is_in(KNEES)
        )
        .with_columns(
            is_draw=(pl.col("mask") != CLEAN).fill_null(value=False) & (pl.col("method") == "random")
        )
        .sort("percent", maintain_order=True)
        .unique([*CURVE, "is_draw", *REMOVED], keep="first", maintain_order=True)
        .drop("is_draw")
        .with_columns(
            heads_share=100 * pl.col("heads_removed").fill_null(0) / n_heads,
            ffns_share=100 * pl.col("ffns_removed").fill_null(0) / n_ffns,
        )
        .with_columns(
            share=pl.when(pl.col("kind") == "head")
            .then("heads_share")
            .when(pl.col("kind") == "ffn")
            .then("ffns_share")
        )
    )
