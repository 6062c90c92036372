"""Numbers of patched prompts: what prompts score, which units restore and break most, and which heads make
function vectors.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from lowmem_icl.report.findings.wording import decimal_text
from lowmem_icl.report.numbers import TOP_UNITS, mean_over_tasks, significance_mark, unit_name
from lowmem_icl.tables.unit_table import q_metric

SETTING = ("task", "shots", "procedure")
UNIT = ("kind", "layer", "head")
BOUNDS = ("value", "low", "high")
DIRECTIONS = {"restore": True, "break": False}
"""What a patch does, and whether the largest effect is the highest one: to break is to lose."""
TOP_HEADS = 10


def patch_records(results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of patching, without estimates of what is measured exactly as well."""
    return results.filter((pl.col("experiment") == "patch") & pl.col("exact"))


def prompt_scores(results: pl.DataFrame) -> pl.DataFrame:
    """Return a record per task, shot count and place of patches: `corruption`, `pairs`, and gold
    log-probability and accuracy (null where there is one option) of both prompts as `<metric>_clean` and
    `<metric>_corrupted`; `pairs_apart`: how many lie far enough apart to normalise by.
    """
    records = patch_records(results)
    prompts = records.filter(pl.col("layer").is_null() & pl.col("labels").is_not_null())
    corrupted, clean = (
        prompts.filter(same) for same in (pl.col("labels") != "right", pl.col("labels") == "right")
    )
    table = corrupted.filter(pl.col("metric") == "gold_logprob").select(
        *SETTING, pl.col("labels").alias("corruption"), pl.col("documents").alias("pairs")
    )
    for metric in ("gold_logprob", "acc"):
        for name, scores in (("clean", clean), ("corrupted", corrupted)):
            own = scores.filter(pl.col("metric") == metric)
            table = _joined(table, own, [pl.col("value").alias(f"{metric}_{name}")])
    apart = records.filter(pl.col("metric") == "restore_normalised").unique(SETTING, maintain_order=True)
    table = _joined(table, apart, [pl.col("documents").alias("pairs_apart")])
    return table.with_columns(pl.col("pairs_apart").fill_null(0))


def top_patches(results: pl.DataFrame, n: int = TOP_UNITS) -> pl.DataFrame:
    """Return the n units that restore, and that break, the gold answer's log-probability most, of every task,
    shot count and place, by `direction`: `value` in nats, its bounds and `q_value`; to break is below 0.
    """
    records = patch_records(results)
    keys = [*SETTING, *UNIT]
    settings = records.select(SETTING).unique(maintain_order=True).with_row_index("place")
    found = []
    for direction, is_highest in DIRECTIONS.items():
        metric = f"{direction}_gold_logprob"
        q_values = records.filter(pl.col("metric") == q_metric(metric))
        q_values = q_values.select(*keys, pl.col("value").alias("q_value"))
        found.append(
            records.filter(pl.col("metric") == metric)
            .select(*SETTING, pl.lit(direction).alias("direction"), *UNIT, *BOUNDS)
            .join(q_values, on=keys, how="left", nulls_equal=True)
            .join(settings, on=SETTING, how="left", nulls_equal=True)
            .sort("place", "value", "layer", "head", descending=[False, is_highest, False, False])
            .group_by(SETTING, maintain_order=True)
            .head(n)
            .drop("place")
        )
    return pl.concat(found)


def vector_heads(results: pl.DataFrame, n: int = TOP_HEADS) -> pl.DataFrame:
    """Return the n heads with the highest function-vector scores per shot count, mean over tasks, and of
    every file of prompts that was given.
    """
    scores = patch_records(results).filter(pl.col("metric") == "function_vector")
    of_tasks = mean_over_tasks(scores.filter(pl.col("shots").is_not_null()))
    chosen = pl.concat([of_tasks, scores.filter(pl.col("shots").is_null())])
    return (
        chosen.select("task", "shots", "layer", "head", *BOUNDS)
        .sort("value", "layer", "head", descending=[True, False, False])
        .group_by("task", "shots", maintain_order=True)
        .head(n)
        .sort("shots", nulls_last=True, maintain_order=True)
    )


def added_vectors(results: pl.DataFrame) -> pl.DataFrame:
    """Return a record per task and shot count that a function vector is made of (`mask_shots`): how often
    the answer's first token comes without demonstrations, `without` a vector, with the task's `own` at the
    `layer` where that is best, its bounds `low` and `high`, and with `other_task`'s and a `random` vector
    there, null where there is none.
    """
    records = patch_records(results).filter(pl.col("metric") == "first_token_acc")
    keys = ["task", "layer", "setting"]
    # Another task's vector says whose it is, not what it is compared with: the order of records does.
    is_own = (pl.col("method") == "own").fill_null(value=False)
    starts = is_own & (pl.col("layer") == 0)
    of_vectors = records.with_columns(setting=starts.cast(pl.Int64).cum_sum()).filter(
        pl.col("layer").is_not_null()
    )
    own = of_vectors.filter(is_own).sort("value", "layer", descending=[True, False], maintain_order=True)
    table = (
        own.unique("setting", keep="first", maintain_order=True)
        .sort("setting")
        .select(*keys, "mask_shots", "documents", pl.col("value").alias("own"), "low", "high")
    )
    clean = records.filter(pl.col("layer").is_null()).unique("task", maintain_order=True)
    table = table.join(
        clean.select("task", pl.col("value").alias("without")), on="task", how="left", maintain_order="left"
    )
    for method in ("other_task", "random"):
        other = of_vectors.filter(pl.col("method") == method).select(*keys, pl.col("value").alias(method))
        table = table.join(other, on=keys, how="left", maintain_order="left")
    return table.drop("setting")


def estimate_ranks(results: pl.DataFrame) -> dict[str, float]:
    """Return by direction how attribution patching ranks units as the exact effects do: Spearman's
    correlation, mean over tasks and shot counts, where patches were put first.
    """
    records = patch_records(results).filter(pl.col("metric").str.ends_with("_estimate_spearman"))
    if records.is_empty():
        return {}
    records = records.filter(pl.col("procedure") == records["procedure"].first())
    if len(of_tasks := records.filter(pl.col("shots").is_not_null())):
        records = of_tasks
    found = {}
    for direction in DIRECTIONS:
        of_direction = records.filter(pl.col("metric") == f"{direction}_estimate_spearman")
        values = mean_over_tasks(of_direction)["value"].to_numpy()
        if len(values):
            found[direction] = float(values.mean())
    return found


def effect_text(unit: Mapping[str, Any], *, with_bounds: bool = False) -> str:
    """Return a unit of `top_patches` with its effect, interval and star: "L1H0 6.58 [3.91, 8.67]*"."""
    bounds = "" if unit["low"] is None or not with_bounds else f" [{unit['low']:.2f}, {unit['high']:.2f}]"
    name = unit_name(unit["kind"], unit["layer"], unit["head"])
    return f"{name} {decimal_text(unit['value'])}{bounds}{significance_mark(unit)}"


def by_setting(table: pl.DataFrame, *columns: str) -> Iterator[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Yield the records of a table by the values of some columns, in order of appearance."""
    for keys, members in table.group_by(columns, maintain_order=True):
        yield keys, members.to_dicts()


def _joined(table: pl.DataFrame, records: pl.DataFrame, values: list[pl.Expr]) -> pl.DataFrame:
    own = records.select(*SETTING, *values)
    return table.join(own, on=SETTING, how="left", nulls_equal=True, maintain_order="left")
