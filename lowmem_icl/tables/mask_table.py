"""masks.parquet: a record per mask and setting that it was judged in, with what it removes and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.masks.files import MaskFile
from lowmem_icl.masks.mask import Mask, all_ffns, all_heads
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.statistics.certificate import verdict
from lowmem_icl.tables.guessing import clean_records, settings_at_chance
from lowmem_icl.tables.schema import ACCURACIES, MASKS

SETTING = ("task", "shots")
JUDGED = ("experiment", "procedure", "mask", *SETTING)
# Procedures that name masks and judge none.
NO_JUDGEMENT = ("capacity", "important-heads", "scores")
# Of random draws, under the draws' name: no mask.
MEDIAN = "random-median"
UNIT_LISTS = {name: MASKS[name] for name in ("mask", "same_as", "removed", "kept")}
# What files say, in columns of their own until it is known whether the tables say it.
MADE = {
    "file_method": pl.String(),
    "file_mask_task": pl.String(),
    "file_mask_shots": pl.Int32(),
    "file_acc": pl.Float64(),
    "file_em": pl.Float64(),
    "file_at_chance": pl.Boolean(),
}


@dataclass(frozen=True)
class Judging:
    """What masks are judged by: the model's layers and heads per layer, what must be preserved, and how much
    of it may be lost.
    """

    layers: int
    heads: int
    objective: str
    tolerance: float


def mask_table(results: pl.DataFrame, files: Mapping[str, MaskFile], judging: Judging) -> pl.DataFrame:
    """Return masks.parquet from results.parquet and the mask files that it names, by their names.

    A mask's own task and shot count stand first; its lists of units stand in its first record alone, since
    they are long and the same in all. A mask without a file has none.
    """
    judged = results.filter(
        pl.col("mask").is_not_null()
        & pl.col("experiment").is_in(["evaluate", "prune", "induction"])
        & ~pl.col("procedure").is_in(NO_JUDGEMENT).fill_null(value=False)
        & pl.col("method").ne_missing(MEDIAN)
    )
    accuracy = judged.filter(pl.col("metric").is_in(ACCURACIES) & _right_labels())
    records = accuracy.filter(pl.col("mask") != CLEAN).unique(JUDGED, keep="first", maintain_order=True)
    losses = (
        judged.filter(pl.col("metric") == f"{judging.objective}_drop")
        .select(*JUDGED, loss="value", loss_low="low", loss_high="high")
        .unique(JUDGED, keep="first", maintain_order=True)
    )
    records = (
        _with_clean(records, accuracy)
        .join(_majorities(results), on=SETTING, how="left", maintain_order="left")
        .join(
            losses.unique(JUDGED, keep="first"),
            on=JUDGED,
            how="left",
            nulls_equal=True,
            maintain_order="left",
        )
        .join(_chance(results), on=SETTING, how="left", maintain_order="left")
        .with_columns(pl.col("ablation").fill_null("zero"), objective=_if_lost(pl.lit(judging.objective)))
    )
    ordered = _with_files(records, files, judging)
    verdicts = [
        None if loss is None else verdict(low, high, judging.tolerance)
        for loss, low, high in ordered.select("loss", "loss_low", "loss_high").iter_rows()
    ]
    return ordered.with_columns(pl.Series("verdict", verdicts, dtype=pl.String)).select(
        pl.col(name).cast(dtype) for name, dtype in MASKS.items()
    )


def _right_labels() -> pl.Expr:
    return pl.col("labels").fill_null("right") == "right"


def _if_lost(value: pl.Expr) -> pl.Expr:
    return pl.when(pl.col("loss").is_not_null()).then(value)


def _with_clean(records: pl.DataFrame, accuracy: pl.DataFrame) -> pl.DataFrame:
    """Return records with the clean accuracy of the same documents; null where these were not scored clean.

    Curves are judged on the first documents only, so the clean run stands there by itself.
    """
    keys = [*SETTING, "split", "metric", "documents"]
    clean = accuracy.filter(pl.col("mask") == CLEAN).select(
        *keys, clean="value", clean_low="low", clean_high="high"
    )
    return records.join(
        clean.unique(keys, keep="first", maintain_order=True),
        on=keys, how="left", nulls_equal=True, maintain_order="left",
    )  # fmt: skip


def _majorities(results: pl.DataFrame) -> pl.DataFrame:
    """Return the accuracy of the best constant answer, by task and shot count."""
    return (
        results.filter((pl.col("metric") == "majority") & _right_labels())
        .unique(SETTING, keep="first", maintain_order=True)
        .select(*SETTING, majority="value")
    )


def _chance(results: pl.DataFrame) -> pl.DataFrame:
    """Return whether the clean model is at chance, of all settings where that is known."""
    clean = clean_records(results)
    known = clean.filter(pl.col("metric").is_in(ACCURACIES)).select(SETTING).unique()
    at_chance = settings_at_chance(clean)
    return known.with_columns(
        pl.Series("at_chance", [setting in at_chance for setting in known.iter_rows()], dtype=pl.Boolean)
    )


def _own_first(records: pl.DataFrame) -> pl.DataFrame:
    """Return records by mask in the order of their first appearance, the setting it was made for first."""
    is_own = (pl.col("task") == pl.col("mask_task")) & (pl.col("shots") == pl.col("mask_shots"))
    return (
        records.with_row_index("place")
        .with_columns(first=pl.col("place").min().over("mask"), is_other=~is_own.fill_null(value=False))
        .sort("first", "is_other", maintain_order=True)
        .drop("place", "first", "is_other")
    )


def _with_files(records: pl.DataFrame, files: Mapping[str, MaskFile], judging: Judging) -> pl.DataFrame:
    """Return records with what the masks' files say: their units, how they were made, and, where the clean
    model was not evaluated, how it did.
    """
    names = [name for name in records["mask"].unique(maintain_order=True).to_list() if name in files]
    said = _units_of_files([files[name] for name in names], judging).with_columns(
        pl.DataFrame([_made(files[name]) for name in names], schema=MADE)
    )
    joined = records.join(said, on="mask", how="left", maintain_order="left").with_columns(
        pl.coalesce(name, f"file_{name}").alias(name) for name in ("method", "mask_task", "mask_shots")
    )
    joined = _own_first(joined)
    is_own = (pl.col("task") == pl.col("mask_task")) & (pl.col("shots") == pl.col("mask_shots"))
    clean = pl.when(pl.col("metric") == "em").then("file_em").otherwise("file_acc")
    is_first = pl.col("mask").is_first_distinct()
    return joined.with_columns(
        *(pl.when(is_first).then(pl.col(name)).alias(name) for name in ("removed", "kept")),
        clean=pl.coalesce("clean", pl.when(is_own & pl.col("loss").is_not_null()).then(clean)),
        at_chance=pl.coalesce("at_chance", pl.when(is_own).then("file_at_chance")),
    )


def _made(mask_file: MaskFile) -> dict[str, Any]:
    """Return what a mask's file says of its making, and of the clean model in the setting it was made for."""
    made, scores = mask_file.made, mask_file.scores
    tasks, shots = made.get("tasks", []), made.get("shots", [])
    before = scores.get("before", {})
    return {
        "file_method": made.get("method"),
        "file_mask_task": AGGREGATE if len(tasks) > 1 else next(iter(tasks), None),
        "file_mask_shots": shots[0] if len(shots) == 1 else None,
        "file_acc": before.get("acc"),
        "file_em": before.get("em"),
        "file_at_chance": bool(scores.get("at_chance", False)) if before else None,
    }


def _units_of_files(files: Sequence[MaskFile], judging: Judging) -> pl.DataFrame:
    """Return what each mask removes and keeps, by name, and the first mask that removes the same."""
    units = [str(unit) for unit in (*all_heads(judging.layers, judging.heads), *all_ffns(judging.layers))]
    first_with: dict[bytes, str] = {np.zeros(len(units), dtype=np.bool_).tobytes(): CLEAN}
    rows: dict[str, list[Any]] = {name: [] for name in UNIT_LISTS}
    for mask_file in files:
        name, is_removed = mask_file.name, _removed(mask_file.mask, judging)
        first = first_with.setdefault(is_removed.tobytes(), name)
        rows["mask"].append(name)
        rows["same_as"].append(None if first == name else first)
        rows["removed"].append(list(compress(units, is_removed)))
        rows["kept"].append(list(compress(units, ~is_removed)))
    return pl.DataFrame(rows, schema=UNIT_LISTS)


def _removed(mask: Mask, judging: Judging) -> NDArray[np.bool_]:
    """Return whether each unit is removed, heads first, [U]."""
    is_removed = np.zeros(judging.layers * (judging.heads + 1), dtype=np.bool_)
    if mask.heads:
        layers, heads = np.array(list(mask.heads)).T
        is_removed[layers * judging.heads + heads] = True
    if mask.ffns:
        is_removed[judging.layers * judging.heads + np.array(list(mask.ffns))] = True
    return is_removed
