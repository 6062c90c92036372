"""The page's section on what right labels give: scores with right, shuffled and foreign ones side by side."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from lowmem_icl.protocols import AGGREGATE, LABELS
from lowmem_icl.report.findings.wording import listed
from lowmem_icl.report.numbers import clean_evaluation
from lowmem_icl.report.page.section import Section, Table, interval_text, number_text
from lowmem_icl.report.run_tables import RunTables
from lowmem_icl.tables.schema import ACCURACIES

COLUMNS = (
    "task", "shots", "measure", *LABELS,
    "right − shuffled", "95 %", "right − foreign", "95 %",
)  # fmt: skip
MEASURES = {"acc": "accuracy", "gold_logprob": "log-probability"}
TEXT = (
    "The same documents after the same demonstrations, whose answers are their own (right), exchanged among "
    "them (shuffled) or those of other documents (foreign); differences are paired. A task whose accuracy "
    "does not fall with wrong labels has not been learnt from labels: its demonstrations give format alone."
)

Cells = Mapping[str, Mapping[str, Any]]


def labels_section(run: RunTables) -> Section | None:
    """Return every task's scores by labels and shot count; None where there are no controls."""
    rows = label_rows(run.results)
    if not rows:
        return None
    text = f"{TEXT} {learnt_sentence(run.results)}".strip()
    return Section("labels", "What the labels give", text, table=Table(COLUMNS, rows))


def learnt_sentence(results: pl.DataFrame) -> str:
    """Return which tasks are learnt from labels: whose accuracy credibly falls when these are shuffled, or,
    where nothing was shuffled, foreign, at any shot count; empty where no control has an interval.
    """
    is_effect = pl.col("metric").str.ends_with("_label_effect") & ~pl.col("metric").str.starts_with("gold")
    effects = clean_evaluation(results).filter(is_effect & (pl.col("task") != AGGREGATE))
    effects = effects.filter(pl.col("low").is_not_null())
    if effects.is_empty():
        return ""
    first = "shuffled" if (effects["labels"] == "shuffled").any() else "foreign"
    effects = effects.filter(pl.col("labels") == first)
    learnt = {
        task: [str(row["shots"]) for row in members.iter_rows(named=True) if row["low"] > 0]
        for (task,), members in effects.group_by("task", maintain_order=True)
    }
    named = [f"{task} (at {', '.join(shots)} shots)" for task, shots in learnt.items() if shots]
    others = [str(task) for task, shots in learnt.items() if not shots]
    start = f"Accuracy credibly falls with {first} labels in"
    if not named:
        return f"{start} none of {listed(others)}." if len(others) > 1 else ""
    return f"{start} {listed(named)}{f'; that is not shown for {listed(others)}' if others else ''}."


def label_rows(results: pl.DataFrame) -> list[list[str]]:
    """Return formatted rows of COLUMNS: one per task, shot count and measure that has a control."""
    records = clean_evaluation(results).with_columns(
        metric=pl.when(pl.col("metric").is_in(ACCURACIES)).then(pl.lit("acc")).otherwise(pl.col("metric"))
    )
    controlled = records.filter(pl.col("metric").str.ends_with("_label_effect"))
    rows = []
    for task, shots in controlled.select("task", "shots").unique(maintain_order=True).iter_rows():
        members = records.filter((pl.col("task") == task) & (pl.col("shots") == shots))
        for metric, name in MEASURES.items():
            scores, effects = (_by_labels(members, each) for each in (metric, f"{metric}_label_effect"))
            values = [number_text(scores[labels]["value"]) if labels in scores else "" for labels in LABELS]
            gains = [text for labels in LABELS[1:] for text in _effect_texts(effects, labels)]
            rows.append([str(task), str(shots), name, *values, *gains])
    return rows


def _by_labels(records: pl.DataFrame, metric: str) -> Cells:
    return {row["labels"]: row for row in records.filter(pl.col("metric") == metric).iter_rows(named=True)}


def _effect_texts(effects: Cells, labels: str) -> tuple[str, str]:
    if labels not in effects:
        return "", ""
    effect = effects[labels]
    return number_text(effect["value"]), interval_text(effect["low"], effect["high"])
