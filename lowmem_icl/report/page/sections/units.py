"""The page's sections on single units: the map, the atlas of all settings, and the ranking."""

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.headline import NONE_SIGNIFICANT
from lowmem_icl.report.numbers import PICKED, SIGNIFICANT_Q, STAR, mean_over_tasks, unit_drops
from lowmem_icl.report.page.plots.maps import head_map
from lowmem_icl.report.page.section import Section
from lowmem_icl.report.page.unit_arrays import METRICS
from lowmem_icl.report.run_tables import RunTables

# The units that an estimate is compared on, by the method of the comparison's records.
COMPARED = {"attribution": "all exact units", "attribution-drawn": "those drawn at random"}
STARS_ARE_COUNTS = (
    "A star is about how many documents are hurt, not about their mean, whose interval may hold 0."
)
NOT_REMOVED = "No unit was removed alone."
ATLAS_TEXT = "Every task and shot count in the scale of the map; click one to load it."


def has_units(run: RunTables) -> bool:
    """Tell whether the run measured anything of single units."""
    return bool((run.results["metric"].is_in(list(METRICS)) & run.results["layer"].is_not_null()).any())


def map_section(run: RunTables) -> Section | None:
    """Return the map of all units; None where there are no numbers of single units."""
    if not has_units(run):
        return None
    model = run.record["model"]
    ablate = run.results.filter(pl.col("experiment") == "ablate")
    text = exactness_note(ablate) if len(ablate) else NOT_REMOVED
    return Section("map", "Heads and FFNs", text, [head_map(model["layers"], model["heads"])])


def atlas_section(run: RunTables) -> Section | None:
    """Return the place of the small maps; None where there are no numbers of single units."""
    return Section("atlas-section", "Atlas", ATLAS_TEXT) if has_units(run) else None


def ranking_section(run: RunTables) -> Section | None:
    """Return the place of the ranked units; None where there are no numbers of single units."""
    if not has_units(run):
        return None
    q_values = run.units["q_value"].fill_null(1).to_numpy()
    claimed = STAR if (q_values <= SIGNIFICANT_Q).any() else NONE_SIGNIFICANT
    text = (
        f"By the chosen metric at the chosen task and shots: {PICKED}; {claimed}. {STARS_ARE_COUNTS} The "
        "page holds two or three digits of every number; units.parquet has them all."
    )
    return Section("units", "Units, ranked", text)


def exactness_note(ablate: pl.DataFrame) -> str:
    """Return how many drops are exact and, under screening, how good the estimates of the others are."""
    drops = unit_drops(ablate).filter(pl.col("task") != AGGREGATE)
    exact = drops.filter(pl.col("exact"))
    documents = int(exact["documents"].drop_nulls().cast(pl.Int64).to_numpy().max(initial=0))
    if len(exact) == len(drops):
        return f"Every unit was ablated exactly, on {documents} training documents per task."
    agreement = mean_over_tasks(ablate.filter(pl.col("metric") == "estimate_spearman"))
    by_method = dict(agreement.group_by("method").agg(pl.col("value").mean()).iter_rows())
    found = [
        f"{by_method[method]:.2f} over {units}" for method, units in COMPARED.items() if method in by_method
    ]
    return (
        f"{len(exact):,} of {len(drops):,} drops are exact, on {documents} training documents per task; the "
        "others are estimated by attribution, to first order, on all of them, and only for gold "
        "log-probability."
    ) + (f" Rank correlation of estimates and exact drops: {', '.join(found)}." if found else "")
