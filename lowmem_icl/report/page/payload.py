"""All that the page's script draws, as one JSON value: small tables as lists, units as encoded arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from scipy.cluster import hierarchy

from lowmem_icl.masks.files import MaskFile
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.above_chance import settings_of
from lowmem_icl.report.findings.circuits import told_search
from lowmem_icl.report.numbers import INDUCTION_SCORE
from lowmem_icl.report.page.plots.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, palettes
from lowmem_icl.report.page.sections.agreement import compared_pairs
from lowmem_icl.report.page.unit_arrays import Grid, unit_arrays
from lowmem_icl.report.points import CURVE_NAMES, UNDRAWN, curve_points
from lowmem_icl.report.run_tables import RunTables, Setting
from lowmem_icl.tables.schema import ACCURACIES

CURVE_COLOURS = {
    "own ranking": BLUE,
    "ranking of all tasks": ORANGE,
    "scored again at every level": GREEN,
    "by in-context effect": SKY,
    "most similar task's ranking": RED,
    "least similar task's ranking": PINK,
}
CURVE_KEYS = ("task", "shots", "method", "other_task")
CAPACITIES = ("prefix_matching", "copying")
Rows = list[dict[str, Any]]


def payload(run: RunTables) -> dict[str, Any]:
    """Return a run's numbers as the page's script reads them."""
    model = run.record["model"]
    grid = Grid(run.tasks, run.shots, model["layers"], model["heads"])
    results = run.results
    return {
        "model": {
            name: model.get(name) for name in ("id", "revision", "model_type", "layers", "heads", "digest")
        },
        "tasks": list(run.tasks),
        "shots": list(run.shots),
        "settings": [list(setting) for setting in run.settings],
        "start": start(run),
        "inductionScore": INDUCTION_SCORE,
        "atChance": [[task, shots] for task, shots in sorted(run.at_chance)],
        "units": unit_arrays(run.units, run.greedy_masks, grid),
        "curves": {kind: curves(results, kind, model) for kind in ("head", "ffn")},
        "grid": grid_points(results, model),
        "capacity": {name: capacity(results, name) for name in CAPACITIES},
        "removal": removal(results),
        "agreement": agreement(results),
        "transfer": transfer(results),
        "masks": masks(run.greedy_masks),
        "palettes": palettes(),
    }


def start(run: RunTables) -> dict[str, Any]:
    """Return the setting that the page shows first: of its first sentence, else the last above chance, or
    the first file of a run of given prompts alone; none before that has any numbers.
    """
    told = told_search(run.masks, settings_of(run.results, run.masks), run.record["model"])
    if told is not None:
        return {"task": told["task"], "shots": told["shots"]}
    above = [setting for setting in run.settings if setting not in run.at_chance]
    last = 0 if None in run.shots and len(run.shots) == 1 else -1
    task, shots = (above or run.settings or [("", None)])[last]
    return {"task": task, "shots": shots}


def curves(results: pl.DataFrame, kind: str, model: Mapping[str, Any]) -> Rows:
    """Return the pruning curves of heads or FFNs: accuracy over the number of units removed."""
    points = curve_points(results, model).filter(
        (pl.col("kind") == kind) & ~pl.col("procedure").is_in(UNDRAWN) & pl.col("metric").is_in(ACCURACIES)
    )
    # Single random draws have a mask, their mean and band have none but where nothing is removed.
    is_drawn = (pl.col("method") != "random") | pl.col("mask").is_null() | (pl.col("mask") == CLEAN)
    drawn = points.filter(is_drawn).with_columns(
        removed=pl.col("heads_removed").fill_null(0) + pl.col("ffns_removed").fill_null(0)
    )
    knees = _knees(results.filter(pl.col("kind") == kind))
    found = []
    for group, curve in drawn.group_by(*CURVE_KEYS, "other_shots", maintain_order=True):
        task, shots, method, other_task, other_shots = group
        if other_shots is not None and other_shots != shots:
            continue
        curve = curve.sort("removed")
        label = _curve_name(str(method), other_task)
        found.append({
            "task": task, "shots": shots, "label": label, "colour": CURVE_COLOURS.get(label, GREY),
            "random": method == "random",
            "x": curve["removed"].to_list(), "y": curve["value"].to_list(),
            "low": curve["low"].to_list(), "high": curve["high"].to_list(),
            "knee": knees.get((task, shots, method, other_task)),
            "chance": next(iter(curve["chance"].drop_nulls()), None),
            "units": model["layers"] * (model["heads"] if kind == "head" else 1),
        })  # fmt: skip
    return found


def _knees(results: pl.DataFrame) -> dict[tuple[Any, ...], int]:
    """Return how many units are removed at the knee of every curve."""
    knees = results.filter((pl.col("experiment") == "prune") & (pl.col("metric") == "knee"))
    removed = pl.col("heads_removed").fill_null(0) + pl.col("ffns_removed").fill_null(0)
    return {tuple(keys): count for *keys, count in knees.select(*CURVE_KEYS, removed).iter_rows()}


def _curve_name(method: str, other_task: str | None) -> str:
    return CURVE_NAMES.get((method, other_task == AGGREGATE), method)


def grid_points(results: pl.DataFrame, model: Mapping[str, Any]) -> Rows:
    """Return accuracies with heads and FFNs removed together."""
    points = curve_points(results, model).filter(
        (pl.col("procedure") == "curve-combined") & pl.col("metric").is_in(ACCURACIES)
    )
    return points.select("task", "shots", "heads_removed", "ffns_removed", "value", "low", "high").to_dicts()


def capacity(results: pl.DataFrame, name: str) -> Rows:
    """Return curves of the induction score that is left, over the percentage of heads removed."""
    records = results.filter(
        (pl.col("metric") == "capacity_retained")
        & (pl.col("other_method") == name)
        & pl.col("percent").is_not_null()
        & pl.col("method").is_in(["gradient", "random"])
    ).sort("percent")
    found = []
    for (task, shots, method), curve in records.group_by("task", "shots", "method", maintain_order=True):
        found.append({
            "task": task, "shots": shots, "label": "gradient ranking" if method == "gradient" else "random",
            "colour": BLUE if method == "gradient" else GREY, "random": method == "random",
            "x": curve["percent"].to_list(), "y": curve["value"].to_list(),
            "low": curve["low"].to_list(), "high": curve["high"].to_list(),
            "knee": None, "chance": None, "units": 100,
        })  # fmt: skip
    return found


def removal(results: pl.DataFrame) -> Rows:
    """Return the accuracy lost without induction heads and without random heads, paired, with bounds.

    Losses and not accuracies: random draws are judged on fewer documents than the clean model.
    """
    records = results.filter(
        (pl.col("experiment") == "induction")
        & (pl.col("procedure") == "removal")
        & (pl.col("metric") == "acc_drop")
        & pl.col("method").is_in(["induction", "random-median"])
    )
    return records.select(
        "method", "task", "shots", "value", "low", "high", "heads_removed", "documents"
    ).to_dicts()


def agreement(results: pl.DataFrame, method: str = "gradient") -> Rows:
    """Return rank correlations between tasks by shot count, NaN where one is unknown, with the order of tasks
    that puts alike ones side by side, and the mean ceiling of their pairs.
    """
    pairs = results.filter(
        (pl.col("metric") == "spearman")
        & (pl.col("method") == method)
        & (pl.col("other_method") == method)
        & (pl.col("shots") == pl.col("other_shots"))
        & (pl.col("task") != AGGREGATE)
        & (pl.col("other_task") != AGGREGATE)
    )
    compared = compared_pairs(
        results.filter((pl.col("experiment") == "overlap") & (pl.col("method") == method))
    )
    same_shots = compared.filter(pl.col("shots") == pl.col("other_shots"))
    ceilings = same_shots.group_by("shots").agg(pl.col("ceiling").mean())
    found = []
    for (shots,), members in pairs.group_by("shots", maintain_order=True):
        names = list(dict.fromkeys([*members["task"], *members["other_task"]]))
        matrix = np.full((len(names), len(names)), np.nan)
        np.fill_diagonal(matrix, 1)
        for row in members.iter_rows(named=True):
            left, right = names.index(row["task"]), names.index(row["other_task"])
            matrix[left, right] = matrix[right, left] = row["value"]
        order = alike_side_by_side(matrix)
        ceiling = next(iter(ceilings.filter(pl.col("shots") == shots)["ceiling"]), None)
        found.append({
            "shots": shots, "ceiling": ceiling,
            "tasks": [names[index] for index in order],
            "values": matrix[np.ix_(order, order)].round(4).tolist(),
        })  # fmt: skip
    return found


def alike_side_by_side(matrix: np.ndarray) -> list[int]:
    """Return an order of rows [N, N] of correlations by average-linkage clustering, leaves ordered; unknown
    ones count as 0.
    """
    if len(matrix) < 3:
        return list(range(len(matrix)))
    distances = np.clip(1 - np.nan_to_num(matrix), 0, 2)[np.triu_indices(len(matrix), 1)]
    tree = hierarchy.linkage(distances, "average", optimal_ordering=True)
    return [int(index) for index in hierarchy.leaves_list(tree)]


def transfer(results: pl.DataFrame) -> Rows:
    """Return accuracies of every task under the greedy masks of all others, with the clean ones."""
    records = results.filter(
        (pl.col("experiment") == "prune")
        & (pl.col("procedure") == "greedy-transfer")
        & pl.col("metric").is_in(ACCURACIES)
    )
    return records.select(
        "shots",
        "task",
        "mask_task",
        "value",
        "low",
        "high",
        "chance",
        "documents",
        clean=pl.col("mask") == "clean",
    ).to_dicts()


def masks(greedy: Mapping[Setting, MaskFile]) -> Rows:
    """Return what the greedy masks' files say but their units, which are in the arrays."""
    return [
        {"task": task, "shots": shots, "name": file.name, "made": file.made, "scores": file.scores}
        for (task, shots), file in greedy.items()
    ]
