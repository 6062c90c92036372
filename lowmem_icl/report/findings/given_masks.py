"""Sentences on the masks that `evaluate --mask` was given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.above_chance import Setting, Settings
from lowmem_icl.report.findings.wording import counts_text, decimal_text, setting_text


@dataclass(frozen=True)
class _Cost:
    """Clean accuracy minus that under a mask in a setting, with an interval where there is one."""

    setting: Setting
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{decimal_text(self.value)} ({setting_text(*self.setting)})"


def given_mask_sentences(
    results: pl.DataFrame, masks: pl.DataFrame, settings: Settings, most: int
) -> list[str]:
    """Return a sentence for each mask that an evaluation was given, `most` at most: what it costs in settings
    above chance, that which costs least at worst first.
    """
    above = set(settings.above)
    given = masks.filter((pl.col("experiment") == "evaluate") & (pl.col("task") != AGGREGATE))
    drops = _drops(results)
    judged = []
    for _, members in given.group_by("mask", maintain_order=True):
        rows = [row for row in members.to_dicts() if (row["task"], row["shots"]) in above]
        costs = [cost for row in rows if (cost := _cost(row, drops)) is not None]
        if costs:
            judged.append((max(cost.value for cost in costs), _sentence(rows[0], costs)))
    sentences = [sentence for _, sentence in sorted(judged, key=lambda pair: pair[0])]
    left_out = len(sentences) - most
    if left_out > 0:
        sentences[most - 1] += f" {left_out} more {'mask was' if left_out == 1 else 'masks were'} judged."
    return sentences[:most]


def _drops(results: pl.DataFrame) -> dict[tuple[str, Setting], dict[str, Any]]:
    records = results.filter((pl.col("experiment") == "evaluate") & (pl.col("metric") == "acc_drop"))
    return {(row["mask"], (row["task"], row["shots"])): row for row in records.to_dicts()}


def _cost(row: dict[str, Any], drops: dict[tuple[str, Setting], dict[str, Any]]) -> _Cost | None:
    """Return what a mask costs in a row's setting: paired by document where that was measured."""
    setting = row["task"], row["shots"]
    drop = drops.get((row["mask"], setting))
    if drop is not None:
        return _Cost(setting, drop["value"], drop["low"], drop["high"])
    return None if row["clean"] is None else _Cost(setting, row["clean"] - row["value"])


def _sentence(first: dict[str, Any], costs: Sequence[_Cost]) -> str:
    same = "" if first["same_as"] is None else f", the same as {first['same_as']}"
    removed = f"{first['mask']} ({counts_text(first['heads_removed'], first['ffns_removed'])} removed{same})"
    least, most = (which(costs, key=lambda cost: cost.value) for which in (min, max))
    if len(costs) == 1:
        known = least.low is not None and least.high is not None
        bounds = f" [{decimal_text(least.low or 0.0)}, {decimal_text(least.high or 0.0)}]" if known else ""
        what = f"{decimal_text(least.value)}{bounds} of accuracy in {setting_text(*least.setting)}"
        return f"{removed} costs {what}."
    if decimal_text(least.value) == decimal_text(most.value):
        what = f"{decimal_text(least.value)} of accuracy in each of {len(costs)} settings above chance"
    else:
        what = f"{least} to {most} of accuracy in {len(costs)} settings above chance"
    return f"{removed} costs {what}."
