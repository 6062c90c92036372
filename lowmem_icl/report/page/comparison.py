"""Several runs on one page: what changed from the first to each other, in numbers and on one map."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.numbers import clean_accuracy, pruned
from lowmem_icl.report.page.encoding import encode_bits, encode_halves
from lowmem_icl.report.page.plots.maps import head_map
from lowmem_icl.report.page.plots.style import palettes
from lowmem_icl.report.page.section import Section, Table, interval_text, number_text
from lowmem_icl.report.page.unit_arrays import (
    METRICS,
    Grid,
    Values,
    is_significant,
    linear_range,
    unit_column,
)
from lowmem_icl.report.run_tables import PromptSetting, RunTables
from lowmem_icl.statistics.agreement import spearman

ACCURACY_COLUMNS = ("task", "shots", "run", "accuracy", "95 %", "change", "95 %")
UNIT_COLUMNS = (
    "task", "shots", "run", "rank correlation of drops", "top 10 in common", "kept", "kept in both",
    "Jaccard index of kept",
)  # fmt: skip
RUN_COLUMNS = ("run", "model", "layers × heads", "tasks", "shots", "protocol", "version", "state", "command")
MOST_TASKS_NAMED = 6
MAP_TEXT = (
    "Choose in the menu of metrics which run is shown, or what it has more than the first. Runs and "
    "differences of one metric share one scale; dot: q ≤ 0.05 in any of the runs."
)
ATLAS_TEXT = "Every task at the chosen shot count: each run, and its difference from the first."
CHANGE_TEXT = (
    "Changes are from the first run; their bounds join those of both runs as if the documents were others, "
    "so they are wide where the documents are the same."
)
COMPARED = (
    "gold_logprob_drop", "gold_prob_drop", "acc_drop", "gradient", "attribution", "restore_gold_logprob",
    "break_gold_logprob", "function_vector",
)  # fmt: skip
TOP = 10
DROP = "gold_logprob_drop"


def run_labels(runs: Sequence[RunTables]) -> list[str]:
    """Return a name for each run: its model's, or its folder's where that would not tell them apart."""
    models = [f"{run.record['model']['id']} {run.record['model']['weights']}" for run in runs]
    if len(set(models)) == len(runs):
        return models
    folders = [run.folder.name for run in runs]
    return folders if len(set(folders)) == len(runs) else [str(run.folder) for run in runs]


def have_one_shape(runs: Sequence[RunTables]) -> bool:
    """Tell whether all runs are of models with as many layers and heads."""
    return len({(run.record["model"]["layers"], run.record["model"]["heads"]) for run in runs}) == 1


def comparison_sections(runs: Sequence[RunTables]) -> list[Section]:
    """Return the sections of the page of several runs."""
    accuracy = Table(ACCURACY_COLUMNS, list(accuracy_rows(runs)), "accuracies and their changes")
    sections = [
        Section("accuracy", "Accuracy, run by run", CHANGE_TEXT, table=accuracy, meaning=("Intervals",))
    ]
    if have_one_shape(runs) and comparison_data(runs)["units"]["metrics"]:
        model = runs[0].record["model"]
        sections += [
            Section(
                "map", "Heads and FFNs, run by run", MAP_TEXT, [head_map(model["layers"], model["heads"])]
            ),
            Section("atlas-section", "Atlas", ATLAS_TEXT),
            Section("units", "Units, ranked", "By the chosen metric at the chosen task and shots."),
        ]
    rows = list(unit_rows(runs))
    if rows:
        table = Table(UNIT_COLUMNS, rows, "changes")
        sections.append(Section("changes", "Units and masks, run by run", table=table))
    return [*sections, Section("runs", "Runs", table=Table(RUN_COLUMNS, list(run_rows(runs)), "runs"))]


def common(runs: Sequence[RunTables]) -> list[PromptSetting]:
    """Return the settings that all runs have, in the first's order; means over tasks only where all are of
    the same tasks.
    """
    same_tasks = len({frozenset(run.tasks) for run in runs}) == 1
    return [
        (task, shots)
        for task, shots in runs[0].settings
        if all((task, shots) in run.settings for run in runs) and (task != AGGREGATE or same_tasks)
    ]


def run_rows(runs: Sequence[RunTables]) -> Iterator[list[str]]:
    """Yield formatted rows of RUN_COLUMNS: what was run, and how."""
    for label, run in zip(run_labels(runs), runs, strict=True):
        model, tasks = run.record["model"], [task for task in run.tasks if task != AGGREGATE]
        yield [
            label, f"{model['id']} {model['weights']}", f"{model['layers']} × {model['heads']}",
            f"{len(tasks)}: {', '.join(tasks)}" if len(tasks) <= MOST_TASKS_NAMED else str(len(tasks)),
            shots_text(run), run.record["options"]["protocol"],
            run.record["versions"].get("lowmem_icl", ""), run.record["state"], run.record["command"],
        ]  # fmt: skip


def shots_text(run: RunTables) -> str:
    """Return the numbers of demonstrations of a run's tasks."""
    return ", ".join(str(n_shots) for n_shots in run.shots if n_shots is not None)


def accuracy_rows(runs: Sequence[RunTables]) -> Iterator[list[str]]:
    """Yield formatted rows of ACCURACY_COLUMNS for the settings that all runs have."""
    tables = [
        {(row["task"], row["shots"]): row for row in clean_accuracy(run.results).iter_rows(named=True)}
        for run in runs
    ]
    for setting in common(runs):
        if setting not in tables[0]:
            continue
        first = tables[0][setting]
        for label, table in zip(run_labels(runs), tables, strict=True):
            if setting not in table:
                continue
            row = table[setting]
            yield [
                setting[0], str(setting[1]), label, number_text(row["value"]),
                interval_text(row["low"], row["high"]), *_change(first, row),
            ]  # fmt: skip


def _change(first: dict[str, Any], other: dict[str, Any]) -> tuple[str, str]:
    if first is other:
        return "", ""
    return f"{other['value'] - first['value']:+.3f}", interval_text(*change_bounds(first, other))


def change_bounds(first: dict[str, Any], other: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return bounds of other minus first from those of both, as of independent samples (Zou and
    Donner 2008).
    """
    if None in (first["low"], first["high"], other["low"], other["high"]):
        return None, None
    change = other["value"] - first["value"]
    below = math.hypot(other["value"] - other["low"], first["high"] - first["value"])
    above = math.hypot(other["high"] - other["value"], first["value"] - first["low"])
    return change - below, change + above


def unit_rows(runs: Sequence[RunTables]) -> Iterator[list[str]]:
    """Yield formatted rows of UNIT_COLUMNS: how each other run's units agree with the first's."""
    if not have_one_shape(runs):
        return
    grid = _grid(runs)
    drops = [grid.values(run.units, unit_column(DROP)) for run in runs]
    sizes = [_greedy_sizes(run) for run in runs]
    for index, (task, shots) in enumerate(product(grid.tasks, grid.shots)):
        for number, label in list(enumerate(run_labels(runs)))[1:]:
            both = np.isfinite(drops[0][index]) & np.isfinite(drops[number][index])
            left, right = drops[0][index][both], drops[number][index][both]
            agreed = (
                [number_text(spearman(left, right)), _top_in_common(left, right)] if both.any() else ["", ""]
            )
            masks = _mask_cells(runs[0], runs[number], (task, shots), sizes[0], sizes[number])
            if any((*agreed, *masks)):
                yield [task, str(shots), label, *agreed, *masks]


def _top_in_common(left: Values, right: Values) -> str:
    n = min(TOP, len(left))
    tops = [set(np.argsort(-values, kind="stable")[:n].tolist()) for values in (left, right)]
    return f"{len(tops[0] & tops[1])} of {n}"


def _greedy_sizes(run: RunTables) -> dict[tuple[str, int], str]:
    units = run.n_units("head"), run.n_units("ffn")
    return {
        (row["task"], row["shots"]): f"{units[0] - row['heads_removed']}H {units[1] - row['ffns_removed']}F"
        for row in pruned(run.results).filter(pl.col("method") == "greedy").iter_rows(named=True)
    }


def _mask_cells(
    first: RunTables, other: RunTables, setting: PromptSetting, first_sizes: Any, other_sizes: Any
) -> list[str]:
    """Return what greedy masks keep before and after, how much of it in both, and the share of it."""
    sizes = [size[setting] for size in (first_sizes, other_sizes) if setting in size]
    if len(sizes) < 2:
        return ["", "", ""]
    files = first.mask_of(*setting), other.mask_of(*setting)
    if files[0] is None or files[1] is None:
        return [" → ".join(sizes), "", ""]
    left, right = files[0].mask, files[1].mask
    in_both, in_any = first.kept(left | right), first.kept(left & right)
    return [" → ".join(sizes), str(in_both), number_text(in_both / in_any if in_any else None)]


def comparison_data(runs: Sequence[RunTables]) -> dict[str, Any]:
    """Return the numbers of several runs as the page's script reads those of one; of models of different
    shapes there is no unit in both.
    """
    grid, settings = _grid(runs), common(runs)
    nothing, significant = np.full(grid.shape, np.nan), np.zeros(grid.shape, dtype=np.bool_)
    none, metrics = np.zeros(grid.shape, dtype=np.bool_), {}
    if have_one_shape(runs):
        metrics = _compared_metrics(runs, grid)
        significant = np.any([is_significant(grid.values(run.units, "q_value")) for run in runs], axis=0)
    model = runs[0].record["model"]
    return {
        "model": {name: model.get(name) for name in ("id", "layers", "heads")},
        "tasks": list(grid.tasks), "shots": list(grid.shots), "settings": [list(each) for each in settings],
        "start": dict(zip(("task", "shots"), settings[-1], strict=True)),
        "atChance": [], "inductionScore": 1.0,
        "units": {
            "metrics": metrics, "scores": {}, "significant": {DROP: encode_bits(significant).as_json()},
            **{name: encode_halves(nothing).as_json() for name in ("low", "high", "q")},
            **{name: encode_bits(none).as_json() for name in ("exact", "kept")},
        },
        "curves": {"head": [], "ffn": []}, "grid": [], "capacity": {}, "removal": [], "agreement": [],
        "transfer": [], "masks": [], "palettes": palettes(),
    }  # fmt: skip


def _compared_metrics(runs: Sequence[RunTables], grid: Grid) -> dict[str, Any]:
    """Return every metric that all runs have, of each run and as differences from the first."""
    labels = run_labels(runs)
    metrics: dict[str, Any] = {}
    for name in COMPARED:
        found = [grid.values(run.units, unit_column(name)) for run in runs]
        if not all(np.isfinite(values).any() for values in found):
            continue
        shown = dict(zip(labels, found, strict=True))
        shown |= {
            f"{label} less {labels[0]}": values - found[0]
            for label, values in zip(labels[1:], found[1:], strict=True)
        }
        scale = np.concatenate(list(shown.values()))
        for number, (label, values) in enumerate(shown.items()):
            metrics[f"{name}.{number}"] = {
                "label": f"{METRICS[name].label}: {label}", "short": label, "group": name,
                "unit": METRICS[name].unit, "signed": True, "linear": linear_range(scale),
                "largest": float(np.nanmax(np.abs(scale))), "values": encode_halves(values, 7).as_json(),
            }  # fmt: skip
    return metrics


def _grid(runs: Sequence[RunTables]) -> Grid:
    settings, model = common(runs), runs[0].record["model"]
    tasks, shots = dict.fromkeys(task for task, _ in settings), dict.fromkeys(count for _, count in settings)
    return Grid(list(tasks), list(shots), model["layers"], model["heads"])
