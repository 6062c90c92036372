"""The page's section on induction heads: their scores, pruning, and their removal."""

from collections.abc import Mapping
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.on_page import (
    COLOURS,
    draw_head_map,
    legend_label,
    new_figure,
    page_figure,
    unit_grid,
)
from lowmem_icl.report.numbers import mean_over_tasks, unit_name
from lowmem_icl.report.section import Record, Section
from lowmem_icl.tables.schema import ACCURACIES

MAPS = {
    "prefix_matching": "prefix matching",
    "copying": "copying",
    "previous_token": "previous token",
    "copying_eigenvalues": "copying, by eigenvalues",
}
CAPACITIES = ("prefix_matching", "copying")
MOST_CURVES = 8
INDUCTION_SCORE = 0.3
"""From this prefix-matching score on a head counts as an induction head."""
MOST_NAMED = 8


def induction_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return the scores of all heads and what induction heads do; None where heads were not scored."""
    induction = results.filter(pl.col("experiment") == "induction")
    if induction.is_empty():
        return None
    shape = (record["model"]["layers"], record["model"]["heads"])
    sentences = [
        *sequences_note(record.get("induction", {})),
        *heads_note(induction),
        *removal_note(induction),
    ]
    return Section(
        "Induction heads",
        " ".join(sentences),
        (
            *page_figure(
                "induction",
                "Heads by layer, layer 0 at the bottom. Copying by eigenvalues: -1 to 1, from the weights "
                "alone.",
                score_maps, induction, shape,
            ),
            *page_figure(
                "capacity",
                "What is left of the summed scores when heads are removed, least important first; grey: 95 "
                "% of random orders.",
                capacity_curves, induction,
            ),
        ),
    )  # fmt: skip


def score_maps(induction: pl.DataFrame, shape: tuple[int, int]) -> Figure | None:
    """Draw one map of all heads per score; None where there is none. shape: layers and heads."""
    scores = induction.filter(pl.col("metric").is_in(list(MAPS)))
    if scores.is_empty():
        return None
    height = max(1.3, min(3.0, 0.22 * shape[0] + 0.6))
    figure, axes = new_figure(7, 2 * height, 2, 2)
    for axis, (metric, name) in zip(axes.ravel(), MAPS.items(), strict=True):
        signed = metric == "copying_eigenvalues"
        grid = unit_grid(scores.filter(pl.col("metric") == metric), *shape)
        draw_head_map(axis, grid, signed=signed, largest=1.0 if signed else None)
        axis.set_title(name, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
    for axis in axes[-1]:
        axis.set_xlabel("head")
    return figure


def capacity_curves(induction: pl.DataFrame) -> Figure | None:
    """Draw how much prefix matching and copying is left when heads go by gradient rankings.

    The rankings are those of all tasks together where there are such, else the tasks' own; None without
    rankings.
    """
    records = induction.filter(
        (pl.col("metric") == "capacity_retained") & pl.col("percent").is_not_null()
    ).sort("task", "shots", "percent")
    ranked = records.filter(pl.col("method") == "gradient")
    if (ranked["task"] == AGGREGATE).any():
        ranked = ranked.filter(pl.col("task") == AGGREGATE)
    if ranked.is_empty():
        return None
    figure, axes = new_figure(7, 2.8, 1, len(CAPACITIES))
    for axis, capacity in zip(axes[0], CAPACITIES, strict=True):
        is_shown = pl.col("other_method") == capacity
        random_orders = records.filter(is_shown & (pl.col("method") == "random"))
        _draw_capacity(axis, ranked.filter(is_shown), random_orders)
        axis.set(xlabel="heads removed, %", title=MAPS[capacity])
        axis.sharey(axes[0, 0])
    for axis in axes[0, 1:]:
        axis.tick_params(labelleft=False)
    axes[0, 0].set_ylabel("capacity retained, %")
    axes[0, 0].legend(frameon=False, fontsize=7)
    return figure


def _draw_capacity(axis: Axes, ranked: pl.DataFrame, random_orders: pl.DataFrame) -> None:
    axis.fill_between(
        random_orders["percent"],
        100 * random_orders["low"],
        100 * random_orders["high"],
        color="lightgrey",
        label="random",
    )
    curves = list(ranked.group_by("task", "shots", maintain_order=True))
    for number, ((task, n_shots), curve) in enumerate(curves[:MOST_CURVES]):
        colour, label = COLOURS[number % len(COLOURS)], legend_label(f"{task}, {n_shots} shots")
        axis.plot(curve["percent"], 100 * curve["value"], color=colour, label=label)


def sequences_note(sequences: Mapping[str, Any]) -> list[str]:
    """Return what heads were scored on, from what run.json says of the random sequences."""
    if not sequences:
        return []
    (shortest, longest), (_, wanted) = sequences["base_tokens"], sequences["base_tokens_wanted"]
    cut = "" if longest == wanted else f" (up to {wanted} where context and vocabulary allow)"
    ordered = "merge ranks" if sequences["drawable_ids_ordered_by"] == "merges" else "ids"
    return [
        f"Scored on {sequences['sequences']} sequences of {shortest} to {longest} different random "
        f"tokens{cut}, four times in a row, drawn from the middle 92 % of the {ordered}; copying on "
        "sequences of the same lengths without repeats."
    ]


def heads_note(induction: pl.DataFrame) -> list[str]:
    """Return which heads are induction heads."""
    scores = induction.filter(pl.col("metric") == "prefix_matching").sort("value", descending=True)
    found = scores.filter(pl.col("value") >= INDUCTION_SCORE)
    if found.is_empty():
        return [f"No head reaches a prefix-matching score of {INDUCTION_SCORE}."]
    named = ", ".join(
        f"{unit_name('head', row['layer'], row['head'])} ({row['value']:.2f})"
        for row in found.head(MOST_NAMED).iter_rows(named=True)
    )
    more = ", …" if len(found) > MOST_NAMED else ""
    return [
        f"{len(found)} of {len(scores)} heads reach a prefix-matching score of {INDUCTION_SCORE}: "
        f"{named}{more}."
    ]


def removal_note(induction: pl.DataFrame) -> list[str]:
    """Return a sentence on accuracy without induction heads at the most demonstrations, mean over tasks."""
    records = mean_over_tasks(
        induction.filter(
            (pl.col("procedure") == "removal") & pl.col("metric").is_in([*ACCURACIES, "acc_drop"])
        )
    )
    if records.is_empty():
        return []
    records = records.filter(pl.col("shots") == pl.col("shots").max())
    by_method = {
        (record["method"], record["metric"] == "acc_drop"): record for record in records.iter_rows(named=True)
    }
    clean, without = by_method.get((None, False)), by_method.get(("induction", False))
    if without is None or clean is None:
        return []
    task = "mean accuracy" if without["task"] == AGGREGATE else f"accuracy of {without['task']}"
    chance = "" if without["chance"] is None else f", chance being {without['chance']:.2f}"
    text = (
        f"Removing {without['heads_removed']} of them together takes the {task} at {without['shots']} shots "
        f"from {clean['value']:.3f} to {without['value']:.3f}{chance}"
    )
    draws = by_method.get(("random-median", True))
    if draws is not None:
        text += (
            "; as many other heads of the same layers, previous-token heads left out, cost "
            f"{draws['value']:.3f} (median of random draws; at 95 % another draw lies between "
            f"{draws['low']:.3f} and {draws['high']:.3f}; {draws['documents']} documents)"
        )
    return [f"{text}."]
