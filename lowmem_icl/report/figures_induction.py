"""The page's part on induction heads: maps of their scores, curves of what pruning leaves of them, and what was found."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from lowmem_icl.report.figures import ACCURACY, COLOURS, STYLE, unit_grid
from lowmem_icl.report.numbers import unit_name

MAPS = {
    "prefix_matching": "prefix matching",
    "copying": "copying",
    "previous_token": "previous token",
    "copying_eigenvalues": "copying, by eigenvalues",
}
CAPACITIES = ("prefix_matching", "copying")
AGGREGATE = "aggregate"
MOST_CURVES = 8
INDUCTION_SCORE = 0.3
MOST_NAMED = 8


def score_maps(induction: pl.DataFrame, layers: int, heads: int) -> Figure | None:
    """Draw one map of all heads for every score; None where there is none."""
    of_heads = induction.filter(pl.col("metric").is_in(list(MAPS)))
    if of_heads.is_empty():
        return None
    height = max(1.3, min(3.0, 0.22 * layers + 0.6))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2 * height), layout="constrained")
        axes = figure.subplots(2, 2, squeeze=False)
    for axis, (metric, name) in zip(axes.ravel(), MAPS.items(), strict=True):
        signed = metric == "copying_eigenvalues"
        grid = unit_grid(of_heads.filter(pl.col("metric") == metric), layers, heads)
        largest = 1.0 if signed or not np.isfinite(grid).any() else float(np.nanmax(grid)) or 1.0
        image = axis.imshow(
            grid,
            origin="lower",
            aspect="auto",
            cmap="RdBu_r" if signed else "viridis",
            vmin=-1 if signed else 0,
            vmax=largest,
        )
        figure.colorbar(image, ax=axis, fraction=0.05)
        axis.set_title(name, fontsize=9)
        axis.set_yticks(range(0, layers, max(1, layers // 4)))
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
    for axis in axes[-1]:
        axis.set_xlabel("head")
    return figure


def capacity_curves(induction: pl.DataFrame) -> Figure | None:
    """Draw how much prefix matching and copying is left under gradient rankings; None where there are no rankings.

    The rankings of all tasks together where there are such, else the tasks' own.
    """
    rows = induction.filter((pl.col("metric") == "capacity_retained") & pl.col("k").is_not_null())
    ranked = rows.filter(pl.col("method") == "gradient")
    if (ranked["task"] == AGGREGATE).any():
        ranked = ranked.filter(pl.col("task") == AGGREGATE)
    if ranked.is_empty():
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.subplots(1, len(CAPACITIES), sharey=True)
    for axis, capacity in zip(axes, CAPACITIES, strict=True):
        of_capacity = rows.filter((pl.col("other_method") == capacity) & (pl.col("method") == "random")).sort(
            "k"
        )
        axis.fill_between(
            of_capacity["k"].to_numpy(),
            100 * of_capacity["low"].to_numpy(),
            100 * of_capacity["high"].to_numpy(),
            color="lightgrey",
            label="random",
        )
        curves = ranked.filter(pl.col("other_method") == capacity).sort("task", "shots", "k")
        grouped = list(curves.group_by("task", "shots", maintain_order=True))
        for number, ((task, shots), curve) in enumerate(grouped[:MOST_CURVES]):
            axis.plot(
                curve["k"],
                100 * curve["value"].to_numpy(),
                color=COLOURS[number % len(COLOURS)],
                label=f"{task}, {shots} shots",
            )
        axis.set(xlabel="heads removed, %", title=MAPS[capacity])
    axes[0].set_ylabel("capacity retained, %")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def told(induction: pl.DataFrame, used: Mapping[str, Any]) -> str:
    """Return what heads were scored on, which are induction heads, and what their removal does."""
    sentences = []
    if used:
        (least, most), (_, wanted) = used["base_tokens"], used["base_tokens_wanted"]
        cut = "" if most == wanted else f" (up to {wanted} where context and vocabulary allow)"
        ordered = "merge ranks" if used["drawable_ids_ordered_by"] == "merges" else "ids"
        sentences.append(
            f"Scored on {used['sequences']} sequences of {least} to {most} different random tokens{cut}, four times over, "
            f"from the middle 92 % of the {ordered}; copying on sequences as long without repeats."
        )
    scores = induction.filter(pl.col("metric") == "prefix_matching").sort("value", descending=True)
    found = scores.filter(pl.col("value") >= INDUCTION_SCORE)
    named = ", ".join(
        f"{unit_name('head', row['layer'], row['head'])} ({row['value']:.2f})"
        for row in found.head(MOST_NAMED).iter_rows(named=True)
    )
    if found.is_empty():
        sentences.append(f"No head reaches a prefix-matching score of {INDUCTION_SCORE}.")
    else:
        sentences.append(
            f"{len(found)} of {len(scores)} heads reach a prefix-matching score of {INDUCTION_SCORE}: {named}"
            f"{', …' if len(found) > MOST_NAMED else ''}."
        )
    sentences += _effect(induction)
    return " ".join(sentences)


def _effect(induction: pl.DataFrame) -> list[str]:
    """Return a sentence on the accuracy without induction heads, over all tasks at the most demonstrations."""
    rows = induction.filter(pl.col("mask").is_not_null() & pl.col("metric").is_in([*ACCURACY, "acc_drop"]))
    if rows.is_empty():
        return []
    if (rows["task"] == AGGREGATE).any():
        rows = rows.filter(pl.col("task") == AGGREGATE)
    rows = rows.filter(pl.col("shots") == rows["shots"].max())
    at = {(row["mask"], row["metric"] == "acc_drop"): row for row in rows.iter_rows(named=True)}
    without, clean = at.get(("induction-heads", False)), at.get(("clean", False))
    if without is None or clean is None:
        return []
    task = "mean accuracy" if without["task"] == AGGREGATE else f"accuracy of {without['task']}"
    chance = "" if without["chance"] is None else f", chance being {without['chance']:.2f}"
    text = (
        f"Removing {without['heads_removed']} of them together takes the {task} at {without['shots']} shots from "
        f"{clean['value']:.3f} to {without['value']:.3f}{chance}"
    )
    draws = at.get(("induction-random", True))
    if draws is not None:
        text += (
            f"; as many other heads of the same layers, previous-token heads left out, cost {draws['value']:.3f} "
            f"(median of random draws, 95 % of which lie between {draws['low']:.3f} and {draws['high']:.3f}; "
            f"{draws['documents']} documents)"
        )
    return [f"{text}."]
