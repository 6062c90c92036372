"""The page's section on induction heads: their scores, what their removal does, and what pruning leaves."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.numbers import induction_head_count, induction_heads, mean_over_tasks, unit_name
from lowmem_icl.report.page.plots.induction import INDUCTION_SCORE, removal_plot, score_plot
from lowmem_icl.report.page.plots.lines import curves_plot
from lowmem_icl.report.page.plots.style import PagePlot
from lowmem_icl.report.page.section import Section
from lowmem_icl.report.run_tables import RunTables
from lowmem_icl.tables.schema import ACCURACIES

CAPACITIES = {"prefix_matching": "prefix matching", "copying": "copying"}
CAPACITY_CAPTION = (
    "What is left of the summed score when heads go, least important first by gradient; grey: 95 % of random "
    "orders."
)
MOST_NAMED = 8


def induction_section(run: RunTables) -> Section | None:
    """Return the scores of all heads and what induction heads do; None where heads were not scored."""
    induction = run.results.filter(pl.col("experiment") == "induction")
    if induction.is_empty():
        return None
    sentences = [
        *sequences_note(run.record.get("induction") or {}),
        *heads_note(induction),
        *removal_note(induction),
    ]
    return Section("induction", "Induction heads", " ".join(sentences), _plots(induction))


def _plots(induction: pl.DataFrame) -> list[PagePlot]:
    removed = induction.filter(pl.col("procedure") == "removal")
    scored = induction.filter((pl.col("metric") == "prefix_matching") & pl.col("layer").is_not_null())
    left = set(induction.filter(pl.col("metric") == "capacity_retained")["other_method"])
    plots = [score_plot()] if len(scored) else []
    if len(removed):
        plots.append(removal_plot(removed["task"].n_unique()))
    return plots + [
        curves_plot(
            f"{name.split('_')[0]}-capacity", "% of heads removed", f"{title} left", CAPACITY_CAPTION,
            ("induction-capacity",), height=240,
        )
        for name, title in CAPACITIES.items()
        if name in left
    ]  # fmt: skip


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
        f"Removing the {_removed_text(induction, without['heads_removed'])} takes the {task} at "
        f"{without['shots']} shots from {clean['value']:.3f} to {without['value']:.3f}{chance}"
    )
    draws = by_method.get(("random-median", True))
    if draws is not None:
        text += (
            "; as many other heads of the same layers, previous-token heads left out, cost "
            f"{draws['value']:.3f} (median of random draws; at 95 % another draw lies between "
            f"{draws['low']:.3f} and {draws['high']:.3f}; {draws['documents']} documents)"
        )
    return [f"{text}."]


def _removed_text(induction: pl.DataFrame, count: int) -> str:
    """Return which heads were removed: the highest by prefix matching."""
    scored = induction_heads(induction, count).sort("layer", "head").to_dicts()
    names = [unit_name("head", row["layer"], row["head"]) for row in scored]
    named = f" ({' '.join(names)})" if 0 < len(names) <= MOST_NAMED else ""
    found = induction_head_count(induction)
    if found > count:
        return f"{count} strongest of {found} induction heads{named} together"
    return f"{'induction head' if count == 1 else f'{count} induction heads'}{named}"
