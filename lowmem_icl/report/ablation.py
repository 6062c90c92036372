"""The page's section on units removed alone: what each costs, and how good estimates of that are."""

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures.on_page import COLOURS, head_maps, new_figure, page_figure
from lowmem_icl.report.numbers import mean_over_tasks, subject, unit_drops
from lowmem_icl.report.section import Record, Section
from lowmem_icl.statistics.agreement import spearman

DROP = "gold_logprob_drop"
LINEAR_NATS = 0.01
"""Up to here the axes of estimates and exact drops are linear, beyond logarithmic."""
# The units that an estimate is compared on, by the method of the comparison's records.
COMPARED = {"attribution": "all exact units", "attribution-drawn": "those drawn at random"}


def ablation_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return what removing each unit alone costs; None where nothing was ablated."""
    ablate = results.filter(pl.col("experiment") == "ablate")
    if ablate.is_empty():
        return None
    shape = (record["model"]["layers"], record["model"]["heads"])
    ffns = ffn_drops(results)
    return Section(
        "Units removed alone",
        exactness_note(ablate),
        (
            *page_figure(
                "ablation", "Red: the answer becomes less likely without the head; blue: more likely.",
                head_maps, ablate, DROP, shape, "drop of gold log-probability, nats",
            ),
            *page_figure("ffns", f"What removing each FFN costs, {subject(ffns)}.", ffn_bars, ffns),
            *page_figure(
                "estimate", "First-order attribution against the exact drop; on the line they agree.",
                estimate_against_exact, results,
            ),
        ),
    )  # fmt: skip


def exactness_note(ablate: pl.DataFrame) -> str:
    """Return how many drops are exact and, under screening, how good the estimates of the others are."""
    drops = unit_drops(ablate).filter(pl.col("task") != AGGREGATE)
    exact = drops.filter(pl.col("exact"))
    documents = int(exact["documents"].cast(pl.Int64).to_numpy().max(initial=0))
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


def ffn_drops(results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of what removing each FFN costs in gold log-probability, mean over tasks."""
    return mean_over_tasks(unit_drops(results).filter(pl.col("kind") == "ffn"))


def ffn_bars(drops: pl.DataFrame) -> Figure | None:
    """Draw what removing each FFN alone costs in gold log-probability, a bar per shot count."""
    if drops.is_empty():
        return None
    figure, axes = new_figure(6.5, 2.8)
    axis = axes[0, 0]
    shots = sorted(set(drops["shots"]))
    width = 0.8 / len(shots)
    for number, n_shots in enumerate(shots):
        bars = drops.filter(pl.col("shots") == n_shots).sort("layer")
        x = bars["layer"].to_numpy() + (number - (len(shots) - 1) / 2) * width
        axis.bar(x, bars["value"], width, color=COLOURS[number % len(COLOURS)], label=f"{n_shots} shots")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="layer", ylabel="drop, nats")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=8)
    return figure


def compared_drops(results: pl.DataFrame) -> pl.DataFrame:
    """Return attribution (`value`) and the exact drop (`exact`) of every task's units that have both."""
    keys = ["task", "shots", "kind", "layer", "head"]
    tasks = results.filter(pl.col("task") != AGGREGATE)
    estimates = tasks.filter(pl.col("metric") == "attribution").select(*keys, "value")
    exact = unit_drops(tasks).filter(pl.col("exact")).select(*keys, pl.col("value").alias("exact"))
    return estimates.join(exact, on=keys, nulls_equal=True)


def estimate_against_exact(results: pl.DataFrame) -> Figure | None:
    """Draw each unit's attribution against its exact drop of gold log-probability, a panel per shot count."""
    both = compared_drops(results)
    if both.is_empty():
        return None
    shots = sorted(set(both["shots"]))
    figure, axes = new_figure(3 * len(shots), 3, 1, len(shots))
    for column, n_shots in enumerate(shots):
        axis, panel = axes[0, column], both.filter(pl.col("shots") == n_shots)
        for kind, colour in (("head", COLOURS[0]), ("ffn", COLOURS[5])):
            units = panel.filter(pl.col("kind") == kind)
            axis.scatter(units["value"], units["exact"], s=8, color=colour, alpha=0.6, label=kind)
        axis.axline((0, 0), slope=1, color="grey", linewidth=0.6)
        rank = spearman(panel["value"].to_numpy(), panel["exact"].to_numpy())
        title = f"{n_shots} shots" + (f", Spearman {rank:.2f}" if np.isfinite(rank) else "")
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="estimate, nats", ylabel="exact drop, nats" if column == 0 else "")
        axis.set_xscale("symlog", linthresh=LINEAR_NATS)
        axis.set_yscale("symlog", linthresh=LINEAR_NATS)
        # Plain labels: the default ones are formulas, which our style leaves unparsed.
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", labelrotation=90)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure
