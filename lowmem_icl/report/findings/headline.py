"""Which units matter: in how many settings, and how much there."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.report.findings.above_chance import Settings
from lowmem_icl.report.findings.wording import decimal_text, share_of_settings, span_text, units_text
from lowmem_icl.report.numbers import SIGNIFICANT_Q

HEADLINE_UNITS = 5
MATTERS = (
    "a unit matters where more documents are hurt than helped without it, at a false discovery rate of "
    f"{100 * SIGNIFICANT_Q:.0f} % over the units of a setting (exact sign test)"
)
NONE_SIGNIFICANT = "none is significant"


def headline_units(units: pl.DataFrame, settings: Settings, n: int = HEADLINE_UNITS) -> pl.DataFrame:
    """Return the n units that matter alone in most settings above chance, of equals those of the larger
    median drop.

    units: units.parquet. `matters` of `settings`: where q ≤ SIGNIFICANT_Q and more documents are hurt than
    helped, and where the unit was ablated exactly; `median, lowest, highest`: of the drops of gold
    log-probability over the latter, in nats. Tasks out of domain count only where there is no other.
    """
    above = [setting for setting in settings.above if setting[0] != AGGREGATE]
    counted = [setting for setting in above if in_domain(setting[0])] or above
    schema = {"task": pl.String(), "shots": pl.Int32()}
    keys = pl.DataFrame(counted, schema=schema, orient="row")
    own = units.filter(pl.col("drop").is_not_null() & pl.col("exact")).join(keys, on=list(schema), how="semi")
    is_hurt = pl.col("documents_hurt") > pl.col("documents_helped")
    matters = (pl.col("q_value") <= SIGNIFICANT_Q) & is_hurt
    return (
        own.group_by("unit", "kind", "layer", "head", maintain_order=True)
        .agg(
            matters=matters.fill_null(value=False).sum().cast(pl.Int64),
            settings=pl.len().cast(pl.Int64),
            median=pl.col("drop").median(),
            lowest=pl.col("drop").min(),
            highest=pl.col("drop").max(),
        )
        .sort("matters", "median", "layer", "head", descending=[True, True, False, False], nulls_last=True)
        .head(n)
    )


def headline_text(unit: Mapping[str, Any]) -> str:
    """Return a unit of `headline_units` with its count and the spread of its drops."""
    drops = decimal_text(unit["median"])
    if unit["settings"] > 1:
        drops += f" ({decimal_text(unit['lowest'])} to {decimal_text(unit['highest'])})"
    return f"{unit['unit']} in {unit['matters']} of {unit['settings']}, {drops}"


def units_sentence(units: pl.DataFrame, settings: Settings) -> str:
    """Return a sentence on the units that matter alone in most settings; empty where none was ablated."""
    first = headline_units(units, settings).to_dicts()
    if not first:
        return ""
    n_settings = max(unit["settings"] for unit in first)
    if not first[0]["matters"]:
        return f"Of the units removed alone {NONE_SIGNIFICANT} {share_of_settings(n_settings, n_settings)}."
    most = [unit for unit in first if unit["matters"] == first[0]["matters"]]
    others = first[len(most) :]
    more = [f"{unit['unit']} in {unit['matters']}" for unit in others if unit["matters"]]
    low, high = min(unit["lowest"] for unit in most), max(unit["highest"] for unit in most)
    return (
        f"Removed alone, {units_text([unit['unit'] for unit in most])} "
        f"{'matters' if len(most) == 1 else 'matter'} {share_of_settings(first[0]['matters'], n_settings)}"
        f"{''.join(f', {text}' for text in more)}; without {'it' if len(most) == 1 else 'them'} the gold "
        f"answer loses {span_text([low, high], decimal_text)} nats on average."
    )
