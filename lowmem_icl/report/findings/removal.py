"""The sentence on induction heads removed together, beside random heads of equal number."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.report.findings.above_chance import Settings, mean_above_chance
from lowmem_icl.report.findings.wording import MOST_NAMED, bounds_text, listed, units_text
from lowmem_icl.report.numbers import induction_head_count
from lowmem_icl.statistics.bands import prediction_band
from lowmem_icl.tables.schema import ACCURACIES

HEADS_MASK = "induction-heads"
MEDIAN = "random-median"
MOST_TASKS_NAMED = 2
Row = Mapping[str, Any]


def removal_sentence(results: pl.DataFrame, masks: pl.DataFrame, settings: Settings) -> str:
    """Return what removing induction heads costs at the most demonstrations, mean over tasks above chance,
    and what as many random heads cost; empty where none was removed above chance.
    """
    removal = results.filter(
        (pl.col("experiment") == "induction")
        & (pl.col("procedure") == "removal")
        & pl.col("metric").is_in([*ACCURACIES, "acc_drop"])
    )
    for shots in sorted(removal["shots"].drop_nulls().unique(), reverse=True):
        at_shots = removal.filter(pl.col("shots") == shots)
        mean, tasks = mean_above_chance(
            at_shots.filter(pl.col("method").ne_missing(MEDIAN)), settings.at_chance
        )
        heads = _heads_text(mean, _names(masks), induction_head_count(results)) if tasks else ""
        if heads and (text := _sentence(mean, tasks, shots, heads)):
            return text + _random_text(mean, _median_of(at_shots, tasks))
    return ""


def _median_of(records: pl.DataFrame, tasks: list[str]) -> Row | None:
    """Return the table's own record of the random draws, where it is of just these tasks."""
    of_all = [task for task in records["task"].unique() if task != AGGREGATE and in_domain(task)]
    task = tasks[0] if len(tasks) == 1 else AGGREGATE if set(tasks) == set(of_all) else ""
    own = records.filter(
        (pl.col("task") == task) & (pl.col("method") == MEDIAN) & (pl.col("metric") == "acc_drop")
    )
    return own.row(0, named=True) if len(own) else None


def _names(masks: pl.DataFrame) -> list[str]:
    listed_units = masks.filter(pl.col("mask") == HEADS_MASK)["removed"].drop_nulls()
    return listed_units[0].to_list() if len(listed_units) else []


def _heads_text(mean: pl.DataFrame, names: list[str], found: int) -> str:
    """Return which heads were removed; found: how many induction heads there are, 0 where that is unknown."""
    counts = mean.filter(pl.col("method") == "induction")["heads_removed"]
    if counts.is_empty():
        return ""
    count = counts[0]
    named = f" ({units_text(names)})" if 0 < len(names) <= MOST_NAMED else ""
    if count == 1:
        return f"{'strongest ' if found > 1 else ''}induction head{named}"
    if found > count:
        return f"{count} strongest of {found} induction heads{named} together"
    return f"{count} induction heads{named}"


def _sentence(mean: pl.DataFrame, tasks: list[str], shots: int, heads: str) -> str:
    by_method = {
        (row["method"], row["metric"] == "acc_drop"): row
        for row in mean.filter(pl.col("method").ne_missing("random")).iter_rows(named=True)
    }
    clean, without, lost = (
        by_method.get(key) for key in ((None, False), ("induction", False), ("induction", True))
    )
    if clean is None or without is None or lost is None:
        return ""
    at_shots = f"at {shots} {'shot' if shots == 1 else 'shots'}"
    return (
        f"Removing the {heads} takes {_accuracy_of(tasks)} {at_shots} from "
        f"{clean['value']:.3f} to {without['value']:.3f}{bounds_text(without['low'], without['high'])}"
    )


def _accuracy_of(tasks: list[str]) -> str:
    if len(tasks) == 1:
        return f"the accuracy of {tasks[0]}"
    named = f" of {listed(tasks)}" if len(tasks) <= MOST_TASKS_NAMED else f" of {len(tasks)} tasks"
    return f"the mean accuracy{named}"


def _random_text(mean: pl.DataFrame, median: Row | None) -> str:
    """Return what as many random heads of the same layers cost, with the band that holds the next draw."""
    drops = mean.filter(pl.col("metric") == "acc_drop")
    without = drops.filter(pl.col("method") == "induction").row(0, named=True)
    draws = drops.filter(pl.col("method") == "random")["value"].to_numpy()
    if median is not None:
        middle, low, high = median["value"], median["low"], median["high"]
    elif len(draws):
        middle, (low, high) = float(np.median(draws)), prediction_band(draws, -1, 1)
    else:
        return "; too few other heads for a random draw."
    count = without["heads_removed"]
    heads = "a random head" if count == 1 else f"{count} random heads"
    text = f"; {heads} of the same layers cost {middle:.3f}"
    if low is None or high is None or np.isnan(high):
        return f"{text} ({'one draw' if len(draws) == 1 else 'too few draws for a band'})."
    beyond = "" if without["value"] > high else "; so they cost no more than random heads may"
    return f"{text} (95 % of draws: {low:.3f} to {high:.3f}){beyond}."
