"""Sentences on greedy masks: the smallest circuit that keeps a task, and what can go."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.above_chance import Settings
from lowmem_icl.report.findings.wording import (
    FIRST_NAMED,
    MOST_NAMED,
    bounds_text,
    counts_text,
    listed,
    setting_text,
    share_of_settings,
    span_text,
    units_text,
)

Row = Mapping[str, Any]
PAPER = "the paper removed 70 % of OPT-66B's heads and 20 % of its FFNs with little loss"
VERDICTS = {"fails": "it fails {}", "cannot tell": "the documents cannot tell {}"}


def own_masks(masks: pl.DataFrame, method: str = "greedy") -> pl.DataFrame:
    """Return the records of masks.parquet of searches on the task and shot count they were made for."""
    return masks.filter(
        (pl.col("procedure") == "greedy")
        & (pl.col("method") == method)
        & (pl.col("task") == pl.col("mask_task"))
        & (pl.col("task") != AGGREGATE)
    )


def searches_above_chance(masks: pl.DataFrame, settings: Settings) -> list[dict[str, Any]]:
    """Return the greedy masks of settings above chance, each in its own setting."""
    above = set(settings.above)
    return [row for row in own_masks(masks).iter_rows(named=True) if (row["task"], row["shots"]) in above]


def told_search(masks: pl.DataFrame, settings: Settings, model: Row) -> dict[str, Any] | None:
    """Return the search that the first sentence is about, a record of masks.parquet: the smallest mask that
    is shown to keep its task, or the one that comes closest; None where nothing was searched above chance.

    A task that demonstrations teach comes before all others: of what a model does without them, a circuit
    says nothing of in-context learning.
    """
    found = _holding(masks, settings, taught=True) or _holding(masks, settings, taught=False)
    if not found:
        return min(searches_above_chance(masks, settings), key=_by_worst_loss, default=None)
    return min(found, key=lambda row: _n_kept(row, model))


def _holding(masks: pl.DataFrame, settings: Settings, *, taught: bool) -> list[dict[str, Any]]:
    """Return the searches that are shown to keep the tolerance; `taught`: only of tasks that demonstrations
    teach.
    """
    return [
        row
        for row in searches_above_chance(masks, settings)
        if row["verdict"] == "holds" and (not taught or (row["task"], row["shots"]) in settings.credible)
    ]


def _of_text(n_masks: int) -> str:
    """Return of how many masks, each shown by itself at 95 %, the smallest was taken."""
    return "" if n_masks < 2 else f" (of {n_masks}, each shown by itself)"


def circuit_sentence(masks: pl.DataFrame, units: pl.DataFrame, settings: Settings, record: Row) -> str:
    """Return a sentence on the smallest circuit that is shown to keep a task, or on the mask that comes
    closest; empty where nothing was searched above chance.
    """
    model = record["model"]
    smallest = told_search(masks, settings, model)
    if smallest is None:
        return ""
    randoms = {(row["task"], row["shots"]): row["value"] for row in own_masks(masks, "random").to_dicts()}
    if smallest["verdict"] != "holds":
        return (
            f"No greedy mask is shown to keep the tolerance of {record['options']['tolerance']:g} on new "
            f"documents: {verdicts_text(searches_above_chance(masks, settings))}. Closest is "
            f"{_closest_text(smallest, randoms, units, model)}."
        )
    taught = (smallest["task"], smallest["shots"]) in settings.credible
    of_task = "a task learnt from demonstrations" if taught else "a task"
    if _n_kept(smallest, model) == _n_units(model):
        return f"No unit can go within the tolerance of {record['options']['tolerance']:g}."
    kept = kept_text(smallest, units, model)
    verb = "suffices" if _n_kept(smallest, model) == 1 else "suffice"
    n_holding = len(_holding(masks, settings, taught=taught))
    return (
        f"The smallest circuit that keeps {of_task}{_of_text(n_holding)}: "
        f"{setting_text(smallest['task'], smallest['shots'])}: "
        + (f"{kept} {verb}" if kept else "no head and no FFN is needed")
        + f": accuracy {_accuracy_text(smallest, randoms)}."
    )


def _by_worst_loss(row: Row) -> tuple[bool, float, float]:
    high, loss = row["loss_high"], row["loss"]
    return high is None, high if high is not None else 0.0, loss if loss is not None else 0.0


def _closest_text(row: Row, randoms: Mapping[tuple[str, int], float], units: pl.DataFrame, model: Row) -> str:
    kept = kept_text(row, units, model) or "no unit"
    bounds = bounds_text(row["loss_low"], row["loss_high"])
    lost = "" if row["loss"] is None else f", losing {row['loss']:.3f}{bounds} of {row['objective']}"
    return (
        f"{setting_text(row['task'], row['shots'])}: with {kept} kept, accuracy is "
        f"{_accuracy_text(row, randoms)}{lost}"
    )


def _accuracy_text(row: Row, randoms: Mapping[tuple[str, int], float]) -> str:
    compared = [] if row["clean"] is None else [f"clean {row['clean']:.3f}"]
    random = randoms.get((row["task"], row["shots"]))
    compared += [] if random is None else [f"random mask of equal size {random:.3f}"]
    return f"{row['value']:.3f}" + (f" ({', '.join(compared)})" if compared else "")


def verdicts_text(searched: Sequence[Row]) -> str:
    """Return in how many settings the tolerance fails, and in how many that cannot be told."""
    count = {name: sum(row["verdict"] == name for row in searched) for name in VERDICTS}
    count["cannot tell"] = len(searched) - count["fails"]
    return listed(
        [
            VERDICTS[name].format(share_of_settings(number, len(searched)))
            for name, number in count.items()
            if number
        ]
    )


def kept_text(row: Row, units: pl.DataFrame, model: Row) -> str:
    """Return what a mask keeps, by name or, of more than MOST_NAMED, by number with the costliest named;
    empty where it keeps nothing.

    row: of masks.parquet; units: units.parquet; model: run.json's.
    """
    if _n_kept(row, model) == 0:
        return ""
    if row["kept"] is not None and len(row["kept"]) <= MOST_NAMED:
        return units_text(row["kept"])
    heads, ffns = model["layers"] * model["heads"], model["layers"]
    text = (
        f"{heads - row['heads_removed']:,} of {heads:,} heads and {ffns - row['ffns_removed']:,} of "
        f"{ffns:,} FFNs"
    )
    return text + _first_text(row, units)


def kept_texts(masks: pl.DataFrame, model: Row) -> dict[tuple[str, int], str]:
    """Return what the greedy mask of each task (and of all) and shot count keeps, in a few words: by name or,
    of more than MOST_NAMED units, by number; of equal masks only the first is written out.
    """
    searched = masks.filter(
        (pl.col("procedure") == "greedy")
        & (pl.col("method") == "greedy")
        & (pl.col("task") == pl.col("mask_task"))
    )
    found: dict[tuple[str, int], str] = {}
    first: dict[tuple[str, ...], tuple[str, int]] = {}
    for row in searched.sort("task", "shots").iter_rows(named=True):
        setting = (row["task"], row["shots"])
        same = setting if row["kept"] is None else first.setdefault(tuple(row["kept"]), setting)
        if same != setting:
            found[setting] = f"as {setting_text(*same)}"
        elif row["kept"] is not None and len(row["kept"]) <= MOST_NAMED:
            found[setting] = " ".join(row["kept"]) or "no unit"
        else:
            heads = model["layers"] * model["heads"] - row["heads_removed"]
            found[setting] = counts_text(heads, model["layers"] - row["ffns_removed"])
    return found


def _first_text(row: Row, units: pl.DataFrame) -> str:
    """Return the kept units that cost most alone, in brackets; nothing where none was ablated."""
    first = (
        units.filter(
            (pl.col("task") == row["task"])
            & (pl.col("shots") == row["shots"])
            & pl.col("kept")
            & pl.col("rank").is_not_null()
        )
        .sort("rank")
        .head(FIRST_NAMED)
    )
    if first.is_empty():
        return ""
    estimated = "" if first["exact"].all() else ", some by estimate"
    return f" (costliest alone: {' '.join(first['unit'])}{estimated})"


def _n_units(model: Row) -> int:
    return int(model["layers"] * (model["heads"] + 1))


def _n_kept(row: Row, model: Row) -> int:
    return _n_units(model) - int(row["heads_removed"]) - int(row["ffns_removed"])


def removable_sentence(results: pl.DataFrame, masks: pl.DataFrame, settings: Settings, record: Row) -> str:
    """Return a sentence on how much can go, beside what the paper removed; empty where that is not known
    above chance.

    By greedy masks that are shown to keep the tolerance, else by the knees of pruning curves.
    """
    searched = searches_above_chance(masks, settings)
    model, tolerance = record["model"], record["options"]["tolerance"]
    holding = [row for row in searched if row["verdict"] == "holds"]
    if holding:
        where = share_of_settings(len(holding), len(searched))
        return (
            f"What can go: {where} greedy masks are shown to lose at most {tolerance:g} of "
            f"{holding[0]['objective']}; they remove {_removed_text(holding, model)} together; {PAPER}."
        )
    knees = _knees_text(results, settings, model)
    if knees:
        return f"What can go: {knees}; {PAPER}."
    if not searched:
        return ""
    return (
        f"What can go is not settled: greedy masks remove {_removed_text(searched, model)}, but are not "
        f"shown to keep the tolerance; {PAPER}."
    )


def _removed_text(rows: Sequence[Row], model: Row) -> str:
    heads = span_text([100 * row["heads_removed"] / (model["layers"] * model["heads"]) for row in rows])
    ffns = span_text([100 * row["ffns_removed"] / model["layers"] for row in rows])
    return f"{heads} % of the heads and {ffns} % of the FFNs"


def _knees_text(results: pl.DataFrame, settings: Settings, model: Row) -> str:
    """Return between which levels the last one lies that costs at most one point of accuracy, by every task's
    own ranking.
    """
    above = set(settings.above)
    knees = [
        row
        for row in results.filter(
            pl.col("metric").is_in(["knee", "knee_certain"]) & pl.col("other_task").is_null()
        ).iter_rows(named=True)
        if (row["task"], row["shots"]) in above
    ]
    parts = []
    for kind, name, column, total in (
        ("head", "heads", "heads_removed", model["layers"] * model["heads"]),
        ("ffn", "FFNs", "ffns_removed", model["layers"]),
    ):
        # A level of few units removes fewer than it says.
        levels = [
            row["value"] if row[column] is None else 100 * row[column] / total
            for row in knees
            if row["kind"] == kind
        ]
        parts += [f"{span_text(levels)} % of the {name}"] if levels else []
    if not parts:
        return ""
    where = share_of_settings(len({(row["task"], row["shots"]) for row in knees}), len(above))
    return (
        f"{where}, by a task's own ranking, the last level that costs at most one point of accuracy lies at "
        f"{listed(parts)}{', each alone' if len(parts) > 1 else ''} (certain knee to knee)"
    )
