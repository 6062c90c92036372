"""units.parquet: a record per task, shot count and unit, with all that a run knows of the unit there."""

from collections.abc import Iterable

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.tables.schema import PATCH_METRICS, UNIT_METRICS, UNITS, unit_columns

UNIT = ("kind", "layer", "head")
SETTING = ("task", "shots")
KEYS = (*SETTING, *UNIT)
# Metrics of results.parquet, by experiment, and the columns that their values become.
COUNTS = ("documents_hurt", "documents_helped")
SCORES = ("gradient", "attribution")
HEAD_SCORES = ("prefix_matching", "copying", "previous_token")
GOLD_Q_VALUE = "q_value"
"""Of `gold_logprob_drop`; the q-values of other metrics are called after these."""


def q_metric(metric: str) -> str:
    """Return the metric that holds a metric's q-values in results.parquet."""
    return GOLD_Q_VALUE if metric == UNIT_METRICS["drop"] else f"{metric}_{GOLD_Q_VALUE}"


def unit_table(results: pl.DataFrame, masks: pl.DataFrame) -> pl.DataFrame:
    """Return units.parquet from results.parquet and masks.parquet.

    Records stand by task, the mean over tasks last, then shots, layer and head, an FFN after its layer's
    heads. Where only heads were scored, they have one record each, without task and shots.
    """
    of_units = results.filter(pl.col("layer").is_not_null() & pl.col("kind").is_not_null()).select(
        *KEYS, "experiment", "procedure", "metric", "value", "low", "high", "exact", "documents"
    )
    ablated, scored = (of_units.filter(pl.col("experiment") == name) for name in ("ablate", "importance"))
    heads = of_units.filter(pl.col("experiment") == "induction")
    patched = _at_last_token(of_units.filter((pl.col("experiment") == "patch") & pl.col("exact")))
    table = _settings(pl.concat([ablated, scored, patched]), heads)
    for source, metrics in ((ablated, UNIT_METRICS), (patched, PATCH_METRICS)):
        for column, metric in metrics.items():
            table = _with_bounds(table, source, column, metric)
    for source, others in ((ablated, COUNTS), (scored, SCORES)):
        for metric in others:
            table = _joined(table, source, metric, [pl.col("value").alias(metric)])
    for metric in HEAD_SCORES:
        table = _joined(table, heads, metric, [pl.col("value").alias(metric)], UNIT)
    table = _with_kept(table, masks).with_columns(
        rank=pl.col("drop").rank("ordinal", descending=True).over(SETTING),
    )
    return table.select(pl.col(name).cast(dtype, strict=False) for name, dtype in UNITS.items())


def _settings(records: pl.DataFrame, heads: pl.DataFrame) -> pl.DataFrame:
    """Return the keys of all records, each once and in their order, with the units' names."""
    tasks = records["task"].unique(maintain_order=True).to_list()
    order = {task: index for index, task in enumerate(tasks)} | {AGGREGATE: len(tasks)}
    keys = records.select(KEYS) if len(records) else heads.select(KEYS)
    is_head = pl.col("kind") == "head"
    name = pl.format("L{}H{}", "layer", pl.col("head").fill_null(0))
    return (
        keys.unique()
        .with_columns(
            place=pl.col("task").replace_strict(order, default=None, return_dtype=pl.Int64),
            unit=pl.when(is_head).then(name).otherwise(pl.format("L{}F", "layer")),
        )
        .sort("place", "shots", "layer", "head", nulls_last=True)
        .drop("place")
    )


def _at_last_token(patched: pl.DataFrame) -> pl.DataFrame:
    """Return the records of patches at the last token, and of those at all tokens what has no other."""
    return patched.sort(pl.col("procedure") == "all", maintain_order=True).unique(
        [*KEYS, "metric"], keep="first", maintain_order=True
    )


def _with_bounds(table: pl.DataFrame, records: pl.DataFrame, column: str, metric: str) -> pl.DataFrame:
    """Return the table with a metric's values, bounds and q-values."""
    names = unit_columns(column)
    bounds = [pl.col(bound).alias(names[bound]) for bound in ("low", "high")]
    more = [pl.col("exact"), pl.col("documents")] if column == "drop" else []
    table = _joined(table, records, metric, [pl.col("value").alias(column), *bounds, *more])
    if "q_value" not in names:
        return table
    return _joined(table, records, q_metric(metric), [pl.col("value").alias(names["q_value"])])


def _joined(
    table: pl.DataFrame,
    records: pl.DataFrame,
    metric: str,
    values: Iterable[pl.Expr],
    keys: tuple[str, ...] = KEYS,
) -> pl.DataFrame:
    """Return the table with what records say of a metric; null where they say nothing."""
    said = records.filter(pl.col("metric") == metric).select(*keys, *values)
    # Ours say it once. Records that a stranger's table doubles would double all others with each metric.
    said = said.unique(keys, keep="first", maintain_order=True)
    return table.join(said, on=keys, how="left", nulls_equal=True, maintain_order="left")


def _with_kept(table: pl.DataFrame, masks: pl.DataFrame) -> pl.DataFrame:
    """Return the table with whether the greedy mask of the task and shot count keeps the unit."""
    greedy = masks.filter(
        (pl.col("procedure") == "greedy")
        & (pl.col("method") == "greedy")
        & (pl.col("task") == pl.col("mask_task"))
        & pl.col("kept").is_not_null()
    ).unique(SETTING, keep="first", maintain_order=True)
    kept = (
        greedy.select(*SETTING, unit="kept")
        .explode("unit")
        .drop_nulls("unit")
        .unique(maintain_order=True)
        .with_columns(is_kept=pl.lit(True))
    )
    searched = greedy.select(*SETTING, is_searched=pl.lit(True))
    return (
        table.join(kept, on=[*SETTING, "unit"], how="left", maintain_order="left")
        .join(searched, on=SETTING, how="left", maintain_order="left")
        .with_columns(kept=pl.when("is_searched").then(pl.col("is_kept").fill_null(value=False)))
    )
