"""The page's section on induction heads: their scores, what their removal does, and what pruning leaves."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from lowmem_icl.report.findings.above_chance import settings_of
from lowmem_icl.report.findings.removal import removal_sentence
from lowmem_icl.report.numbers import INDUCTION_SCORE, unit_name
from lowmem_icl.report.page.plots.induction import removal_plot, score_plot
from lowmem_icl.report.page.plots.lines import curves_plot
from lowmem_icl.report.page.plots.style import PagePlot
from lowmem_icl.report.page.section import Section
from lowmem_icl.report.run_tables import RunTables

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
        removal_sentence(run.results, run.masks, settings_of(run.results, run.masks)),
    ]
    return Section("induction", "Induction heads", " ".join(filter(None, sentences)), _plots(induction))


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
