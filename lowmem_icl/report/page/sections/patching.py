"""The page's section on patched prompts: what they score, which units restore and break the right answer, and
the heads of function vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.above_chance import settings_of
from lowmem_icl.report.findings.patching import patch_sentence
from lowmem_icl.report.findings.wording import listed, setting_text, span_text
from lowmem_icl.report.numbers import unit_name
from lowmem_icl.report.page.plots.patching import patch_plot
from lowmem_icl.report.page.plots.style import PagePlot
from lowmem_icl.report.page.section import Section, Table, interval_text, number_text
from lowmem_icl.report.patches import (
    DIRECTIONS,
    added_vectors,
    by_setting,
    effect_text,
    estimate_ranks,
    patch_records,
    prompt_scores,
    top_patches,
    vector_heads,
)
from lowmem_icl.report.run_tables import RunTables

CORRUPTIONS = {
    "shuffled": "the demonstrations' answers exchanged among them",
    "wrong": "a wrong answer in every demonstration",
    "queries": "another question after the same demonstrations",
    "given": "whatever a file says",
}
PLACES = {"last": "the last token", "all": "all tokens"}
PROMPT_COLUMNS = (
    "task", "shots", "corrupted prompt", "pairs", "0.1 nats apart",
    "gold log-probability, clean", "corrupted", "accuracy, clean", "corrupted",
)  # fmt: skip
UNIT_COLUMNS = ("task", "shots", "patched at", "restore most", "break most")
HEAD_COLUMNS = ("task", "shots", "head", "score", "95 %")
UNITS_LISTED = 3
MOST_SETTINGS = 12
"""Of more than these the page lists the units of the means over tasks; units.parquet has them all."""
TEXT = (
    "Two prompts with one right answer: the clean one shows the task, the corrupted one does not. A patch "
    "puts what one head or FFN computed on one of them into the run on the other. To restore is to put the "
    "clean value into the corrupted run: where that brings the right answer back, the unit's value "
    "suffices. To break is to put the corrupted value into the clean run: where that loses it, the value "
    "is needed. Neither implies the other: of units that can stand in for each other each restores and "
    "none breaks; of units that only work together each breaks and none restores (Heimersheim and Nanda "
    "2024)."
)
UNITS_TEXT = (
    "Effects are patched less unpatched, in nats of the right answer's log-probability, with 95 % "
    "intervals over pairs: above 0 for what restores, below 0 for what breaks. A star: more pairs go one "
    "way than the other, at q ≤ 0.05 over all units. The units are picked and measured on the same pairs, "
    "so their effects are likely too large."
)
HEADS_TEXT = (
    "A head's mean output at the last token of clean prompts stands in for its output at the last token of "
    "corrupted ones; the score is what that adds to the probability of the answer's first token (Todd et "
    "al. 2024). What it adds is the task and not this question's answer, since a mean knows nothing of the "
    "question."
)
ADDED_COLUMNS = (
    "task", "made at shots", "without", "layer", "own vector", "95 %", "another task's", "random", "prompts",
)  # fmt: skip
ADDED_TEXT = (
    "The mean outputs of the heads with the highest scores, summed, are added to what a layer writes at "
    "the last token of a prompt without demonstrations: how often the answer's first token is then the "
    "most likely one, beside another task's vector and a random one as long, at the layer where the own "
    "vector does best. That layer is picked and measured on the same prompts."
)


@dataclass(frozen=True)
class PatchingPart:
    """A part of the section, as its template shows it."""

    title: str
    text: str
    table: Table | None = None
    plots: Sequence[PagePlot] = ()


def patching_section(run: RunTables) -> Section | None:
    """Return what patches change; None where nothing was patched."""
    records = patch_records(run.results)
    if records.is_empty():
        return None
    parts = [*_prompts(run), *_units(run), *_heads(run), *_added(run)]
    plots = [plot for part in parts for plot in part.plots]
    return Section("patching", "Patching", TEXT, plots, data=parts)


def _prompts(run: RunTables) -> Iterator[PatchingPart]:
    scores = prompt_scores(run.results).unique(["task", "shots"], keep="first", maintain_order=True)
    if scores.is_empty():
        return
    corruptions = list(dict.fromkeys(scores["corruption"]))
    rows = [
        [
            row["task"], shots_text(row["shots"]), *([row["corruption"]] if len(corruptions) > 1 else []),
            str(row["pairs"]), str(row["pairs_apart"]),
            *(number_text(row[f"{metric}_{prompt}"])
            for metric in ("gold_logprob", "acc") for prompt in ("clean", "corrupted")),
        ]
        for row in scores.iter_rows(named=True)
    ]  # fmt: skip
    said = listed([f"{CORRUPTIONS.get(name, name)} ({name})" for name in corruptions])
    text = (
        f"Corrupted prompts have {said}. Where they score as well as clean ones there is nothing to restore. "
        "Pairs less than 0.1 nats apart are left out of normalised effects."
    )
    columns = [name for name in PROMPT_COLUMNS if len(corruptions) > 1 or name != "corrupted prompt"]
    yield PatchingPart("What the prompts score", text, Table(columns, rows, "what prompts score"))


def _units(run: RunTables) -> Iterator[PatchingPart]:
    tops = top_patches(run.results, UNITS_LISTED)
    if tops.is_empty():
        return
    means = tops.filter(pl.col("task") == AGGREGATE)
    if tops.select("task", "shots").n_unique() > MOST_SETTINGS and len(means):
        tops = means
    rows = [
        [str(task), shots_text(shots), PLACES[place], *(effect_text(unit, with_bounds=True) for unit in pair)]
        for (task, shots, place), units in by_setting(tops, "task", "shots", "procedure")
        for pair in zip(*(_of(direction, units) for direction in DIRECTIONS), strict=True)
    ]
    sentence = patch_sentence(run.units, settings_of(run.results, run.masks))
    table = Table(UNIT_COLUMNS, rows, "units that restore and break most")
    yield PatchingPart(
        "What restores, and what breaks",
        " ".join(filter(None, [sentence, UNITS_TEXT, estimates_note(run)])),
        table,
        [patch_plot()],
    )


def estimates_note(run: RunTables) -> str:
    """Return how attribution patching ranks units, beside the exact patches; empty where it is not known."""
    ranks = estimate_ranks(run.results)
    if not ranks:
        return ""
    named = listed([f"{rank:.2f} for what {direction}s" for direction, rank in ranks.items()])
    return f"Attribution patching, an estimate to first order, ranks units alike: rank correlation {named}."


def _heads(run: RunTables) -> Iterator[PatchingPart]:
    heads = vector_heads(run.results)
    if heads.is_empty():
        return
    rows = [
        [
            row["task"], shots_text(row["shots"]), unit_name("head", row["layer"], row["head"]),
            number_text(row["value"]), interval_text(row["low"], row["high"]),
        ]
        for row in heads.iter_rows(named=True)
    ]  # fmt: skip
    depths = [
        depth_sentence(members, run.record["model"]) for _, members in by_setting(heads, "task", "shots")
    ]
    text = " ".join([HEADS_TEXT, *depths])
    yield PatchingPart("Function vectors", text, Table(HEAD_COLUMNS, rows, "heads by function-vector score"))


def _added(run: RunTables) -> Iterator[PatchingPart]:
    added = added_vectors(run.results)
    if added.is_empty():
        return
    rows = [
        [
            row["task"], str(row["mask_shots"]), number_text(row["without"]), str(row["layer"]),
            number_text(row["own"]), interval_text(row["low"], row["high"]), number_text(row["other_task"]),
            number_text(row["random"]), str(row["documents"]),
        ]
        for row in added.iter_rows(named=True)
    ]  # fmt: skip
    table = Table(ADDED_COLUMNS, rows, "function vectors added")
    yield PatchingPart("Function vectors added to prompts without demonstrations", ADDED_TEXT, table)


def depth_sentence(heads: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> str:
    """Return where the heads of the highest scores of a setting lie, and whose interval lies above 0."""
    layers = [head["layer"] for head in heads]
    certain = sum(head["low"] is not None and head["low"] > 0 for head in heads)
    where = setting_text(heads[0]["task"], heads[0]["shots"])
    return (
        f"{where[0].upper()}{where[1:]}: the {len(heads)} highest lie in layers {span_text(layers)} of 0 to "
        f"{model['layers'] - 1} (median {np.median(layers):g}); {certain} of them have an interval "
        "above 0."
    )


def _of(direction: str, units: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [unit for unit in units if unit["direction"] == direction]


def shots_text(shots: int | None) -> str:
    """Return a shot count for a table; empty of prompts that were given."""
    return "" if shots is None else str(shots)
