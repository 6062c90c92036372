"""Sentences on the masks that `evaluate --mask` was given."""

from typing import Any

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.above_chance import Settings
from lowmem_icl.report.findings.wording import bounds_text, counts_text, setting_text, span_text


def given_mask_sentences(masks: pl.DataFrame, settings: Settings, most: int) -> list[str]:
    """Return a sentence for each mask that an evaluation was given, `most` at most, from masks.parquet: its
    accuracy beside the clean one's, in settings above chance.
    """
    above = set(settings.above)
    given = masks.filter((pl.col("experiment") == "evaluate") & (pl.col("task") != AGGREGATE))
    sentences = []
    for _, members in given.group_by("mask", maintain_order=True):
        rows = [row for row in members.to_dicts() if (row["task"], row["shots"]) in above]
        if rows:
            sentences.append(_sentence(rows))
    left_out = len(sentences) - most
    if left_out > 0:
        sentences[most - 1] += f" {left_out} more {'mask was' if left_out == 1 else 'masks were'} judged."
    return sentences[:most]


def _sentence(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    same = "" if first["same_as"] is None else f", the same as {first['same_as']}"
    removed = f"{first['mask']} ({counts_text(first['heads_removed'], first['ffns_removed'])} removed{same})"
    if len(rows) == 1:
        clean = "" if first["clean"] is None else f", clean {first['clean']:.3f}"
        bounds = bounds_text(first["low"], first["high"])
        return (
            f"{removed}: {setting_text(first['task'], first['shots'])} {first['value']:.3f}{bounds}{clean}."
        )
    compared = [row for row in rows if row["clean"] is not None]
    if not compared:
        return f"{removed}: accuracy {span_text([row['value'] for row in rows], '{:.3f}'.format)}."
    worst = min(compared, key=lambda row: row["value"] - row["clean"])
    best = max(compared, key=lambda row: row["value"] - row["clean"])
    where = f"{len(compared)} settings above chance accuracy"
    if best is worst:
        change = round(best["value"] - best["clean"], 3) + 0.0
        return f"{removed}: in each of {where} changes by {change:+.3f}."
    return f"{removed}: in {where} goes from {_change(best)} at best, from {_change(worst)} at worst."


def _change(row: dict[str, Any]) -> str:
    return f"{row['clean']:.3f} to {row['value']:.3f} ({setting_text(row['task'], row['shots'])})"
