"""What commands print of a run in tables; names and paths are printed as they are, never as markup."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_icl.report.findings.above_chance import Settings, settings_of
from lowmem_icl.report.findings.answer import answer
from lowmem_icl.report.findings.circuits import kept_texts
from lowmem_icl.report.findings.headline import MATTERS, NONE_SIGNIFICANT, headline_text, headline_units
from lowmem_icl.report.findings.wording import counts_text, decimal_text, setting_text
from lowmem_icl.report.losses import AT_CHANCE, SearchMask, greedy_losses, searches_without_certificate
from lowmem_icl.report.numbers import (
    PICKED,
    accuracy,
    induction_heads,
    pruned,
    total_seconds,
    unit_name,
)
from lowmem_icl.report.patches import (
    DIRECTIONS,
    SETTING,
    by_setting,
    effect_text,
    prompt_scores,
    top_patches,
    vector_heads,
)
from lowmem_icl.report.run_tables import RunTables, read_run

MEANING = "what each number means, and when there is none: docs/numbers.md"
CHANCE_MARK = "°"
HEADS_LISTED = 5
COMPARED_METHODS = ("gradient", "random")
VERDICTS = {"holds": "yes", "fails": "no", "cannot tell": "?", AT_CHANCE: "chance"}
"""Of whether a tolerance is kept, as the table of searches has room for."""


def show_summary(folder: Path, console: Console) -> None:
    """Print a run's answer, then its main numbers: accuracies, greedy masks, units, where the rest is."""
    tables = read_run(folder)
    results, record = tables.results, tables.record
    found = answer(results, tables.units, tables.masks, record)
    settings = settings_of(results, tables.masks)
    for sentence in found.sentences:
        console.print(Text(f"• {sentence}"))
    facts = " · ".join(f"{chip.label}: {chip.value}" for chip in found.chips)
    console.print(Text(f"{facts}\n"))
    _print_accuracy(results, record, settings, console)
    _print_greedy(tables, console)
    _print_units(tables.units, settings, console)
    _print_patching(tables, console)
    scored = ", ".join(
        f"{unit_name('head', row['layer'], row['head'])} {row['value']:.2f}"
        for row in induction_heads(results).iter_rows(named=True)
    )
    if scored:
        console.print(f"heads by prefix matching (1: all attention goes where it should): {scored}")
    _print_line(console, MEANING)
    _print_line(console, f"{total_seconds(record):.0f} s; tables, masks and report.html in {folder}")


def _print_units(units: pl.DataFrame, settings: Settings, console: Console) -> None:
    listed = headline_units(units, settings).to_dicts()
    if not listed:
        return
    named = "; ".join(headline_text(unit) for unit in listed)
    console.print(
        f"units that matter alone in most settings above chance, median drop (lowest to highest) in nats of "
        f"gold log-probability: {named}"
    )
    none = "" if listed[0]["matters"] else f"{NONE_SIGNIFICANT}; "
    console.print(f"{none}{MATTERS}; {PICKED}")


def _print_accuracy(
    results: pl.DataFrame, record: Mapping[str, Any], settings: Settings, console: Console
) -> None:
    records = accuracy(results)
    if records.is_empty():
        return
    shots = sorted(set(records["shots"]))
    model = record["model"]
    table = _table(
        f"{model['id']} in {model['weights']}: accuracy by demonstrations, with 95 % intervals"
        + (f"; {CHANCE_MARK}: at chance" if settings.at_chance else ""),
        ("task", "chance", *(f"{n_shots}-shot" for n_shots in shots)),
    )
    for (task,), task_records in records.group_by("task", maintain_order=True):
        by_shots = {row["shots"]: row for row in task_records.iter_rows(named=True)}
        chance = task_records["chance"][0]
        table.add_row(
            Text(str(task)),
            "" if chance is None else f"{chance:.3f}",
            *(
                _accuracy_text(by_shots.get(n_shots))
                + (CHANCE_MARK if (task, n_shots) in settings.at_chance else "")
                for n_shots in shots
            ),
        )
    console.print(table)


def _accuracy_text(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    bounds = "" if row["low"] is None else f" {row['low']:.2f}–{row['high']:.2f}"
    return f"{row['value']:.3f}{bounds}"


def _print_greedy(tables: RunTables, console: Console) -> None:
    results, record = tables.results, tables.record
    masks = pruned(results)
    searched = masks.filter(pl.col("method") == "greedy")
    if searched.is_empty():
        return
    losses = greedy_losses(tables.masks)
    values = {
        (row["task"], row["shots"], row["method"]): f"{row['value']:.3f}"
        for row in masks.iter_rows(named=True)
    }
    kept = kept_texts(tables.masks, record["model"])
    table = _table(
        f"greedy pruning: what masks keep, whether the tolerance of {record['options']['tolerance']:g} "
        "holds (?: the documents cannot tell; chance: there is nothing to keep), and accuracy, compared with "
        "masks of equal size",
        ("task", "shots", "kept", "holds", "greedy", *COMPARED_METHODS),
    )
    table.columns[2].justify = "left"
    for row in searched.iter_rows(named=True):
        search = (row["task"], row["shots"])
        loss = losses.get(SearchMask(*search, "greedy"))
        table.add_row(
            Text(row["task"]),
            str(row["shots"]),
            Text("" if loss is not None and loss.verdict == AT_CHANCE else kept.get(search, "")),
            "" if loss is None else VERDICTS.get(loss.verdict, loss.verdict),
            *(values.get((*search, method), "") for method in ("greedy", *COMPARED_METHODS)),
        )
    console.print(table)
    _print_certified(masks, record, console)


def _print_certified(masks: pl.DataFrame, record: Mapping[str, Any], console: Console) -> None:
    """Print how much of the masks is certified, and where nothing is."""
    found = [
        f"{setting_text(row['task'], row['shots'])}: {counts_text(row['heads_removed'], row['ffns_removed'])}"
        for row in masks.filter(pl.col("method") == "certified").iter_rows(named=True)
    ]
    found += [f"{setting_text(*search)}: none" for search in sorted(searches_without_certificate(record))]
    if found:
        console.print(Text(f"certified to be removable: {'; '.join(found)}"))


def _print_patching(tables: RunTables, console: Console) -> None:
    """Print what patched prompts score, the unit that restores and that breaks most, and which heads make
    function vectors.
    """
    tops = {
        keys: {unit["direction"]: effect_text(unit) for unit in units}
        for keys, units in by_setting(top_patches(tables.results, 1), *SETTING)
    }
    table = _table(
        "patching: log-probability of the right answer after clean and corrupted prompts, in nats, and "
        "the units that restore and break most of it alone; *: q ≤ 0.05",
        ("task", "shots", "pairs", "clean", "corrupted", "restores", "breaks"),
    )
    for row in prompt_scores(tables.results).iter_rows(named=True):
        top = tops.get(tuple(row[name] for name in SETTING), {})
        place = "" if row["procedure"] == "last" else ", all tokens"
        table.add_row(
            Text(f"{row['task']}{place}"),
            "" if row["shots"] is None else str(row["shots"]),
            str(row["pairs"]),
            *(decimal_text(row[f"gold_logprob_{prompt}"]) for prompt in ("clean", "corrupted")),
            *(top.get(direction, "") for direction in DIRECTIONS),
        )
    if table.rows:
        console.print(table)
    for (task, shots), heads in by_setting(vector_heads(tables.results, HEADS_LISTED), "task", "shots"):
        named = ", ".join(
            f"{unit_name('head', head['layer'], head['head'])} {head['value']:.3f}" for head in heads
        )
        console.print(
            Text(f"function vectors, {setting_text(task, shots)}: probability added by heads: {named}")
        )


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _print_line(console: Console, line: str) -> None:
    """Print a line that may hold names or paths: unstyled, and broken by the terminal alone."""
    console.print(Text(line), soft_wrap=True)
