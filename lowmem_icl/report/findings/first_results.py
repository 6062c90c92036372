"""The first result of a stage in a few words, for the line that it leaves when it is over."""

from collections.abc import Callable

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.numbers import induction_heads, mean_over_tasks, pruned, top_units, unit_name
from lowmem_icl.tables.schema import ACCURACIES

SHOWN_PERCENT = 5


def first_result(experiment: str, results: pl.DataFrame) -> str:
    """Return what an experiment found first, from its records of results.parquet; empty where it found
    nothing.
    """
    make = FIRST_RESULTS.get(experiment)
    return "" if make is None or results.is_empty() else make(results)


def _evaluate(results: pl.DataFrame) -> str:
    """Return the task that demonstrations help most; under given masks, what the first hurts most."""
    right = results.filter(
        pl.col("metric").is_in(ACCURACIES)
        & (pl.col("labels").fill_null("right") == "right")
        & (pl.col("task") != AGGREGATE)
    )
    clean = right.filter(pl.col("mask") == "clean").sort("shots", maintain_order=True)
    masks = right.filter(pl.col("mask") != "clean")
    if len(masks):
        pairs = masks.filter(pl.col("mask") == masks["mask"][0]).join(
            clean.select("task", "shots", "metric", pl.col("value").alias("clean")),
            on=["task", "shots", "metric"],
        )
        row = pairs.sort(pl.col("value") - pl.col("clean"), maintain_order=True).row(0, named=True)
        change = f"{row['clean']:.2f} → {row['value']:.2f}"
        return f"{row['task']} {change} at {row['shots']} shots under {row['mask']}"
    found = []
    for (task,), members in clean.group_by("task", maintain_order=True):
        values, shots = members["value"].to_list(), members["shots"].to_list()
        found.append((values[-1] - values[0], task, values, shots[-1]))
    if not found:
        return ""
    _, task, values, shots = max(found, key=lambda each: each[0])
    change = f"{values[0]:.2f} → {values[-1]:.2f}" if len(values) > 1 else f"{values[0]:.2f}"
    return f"{task} {change} at {shots} shots"


def _importance(results: pl.DataFrame) -> str:
    heads = results.filter((pl.col("metric") == "gradient") & (pl.col("kind") == "head"))
    means = mean_over_tasks(heads)
    if means.is_empty():
        return ""
    most = means.filter(pl.col("shots") == means["shots"].max()).sort("value", descending=True).head(3)
    names = " ".join(unit_name("head", row["layer"], row["head"]) for row in most.to_dicts())
    return f"largest gradients {names} at {most['shots'][0]} shots"


def _ablate(results: pl.DataFrame) -> str:
    drops = results.filter(
        (pl.col("metric") == "gold_logprob_drop")
        & (pl.col("procedure") == "single")
        & (pl.col("task") != AGGREGATE)
    )
    units = drops.select("kind", "layer", "head").unique().height
    settings = drops.select("task", "shots").unique().height
    costliest = top_units(results, 1).to_dicts()
    said = f"{units:,} units × {settings} settings"
    if not costliest:
        return said
    unit = costliest[-1]
    name = unit_name(unit["kind"], unit["layer"], unit["head"])
    return f"{said}; costliest {name} ({unit['value']:.2f} nats at {unit['shots']} shots)"


def _prune(results: pl.DataFrame) -> str:
    greedy = pruned(results).filter(pl.col("method") == "greedy")
    if greedy.is_empty():
        curves = results["procedure"].drop_nulls().unique().len()
        return f"{curves} kinds of curves"
    means = mean_over_tasks(greedy)
    row = (greedy if means.is_empty() else means).sort("shots", maintain_order=True).row(-1, named=True)
    named = "the mean over tasks" if row["task"] == AGGREGATE else row["task"]
    return (
        f"{row['heads_removed']} heads and {row['ffns_removed']} FFNs removed leave {named} at "
        f"{row['value']:.2f} at {row['shots']} shots"
    )


def _induction(results: pl.DataFrame) -> str:
    heads = induction_heads(results, 1).to_dicts()
    if not heads:
        return ""
    return f"prefix matching is highest in L{heads[0]['layer']}H{heads[0]['head']} ({heads[0]['value']:.2f})"


def _patch(results: pl.DataFrame) -> str:
    """Return the head that restores most in the setting where one restores most; where no pairs were patched,
    the head with the highest function-vector score.
    """
    heads = results.filter((pl.col("kind") == "head") & (pl.col("task") != AGGREGATE) & pl.col("exact"))
    for metric, said in (
        ("restore_gold_logprob", "of heads {unit} restores most, {value:.2f} nats of {where}"),
        ("function_vector", "{unit} has the highest function-vector score, {value:.2f} in {where}"),
    ):
        of_metric = heads.filter(pl.col("metric") == metric)
        if of_metric.is_empty():
            continue
        # Where patches were put first.
        of_metric = of_metric.filter(pl.col("procedure") == of_metric["procedure"].first())
        row = of_metric.sort("value", descending=True, maintain_order=True).row(0, named=True)
        where = row["task"] if row["shots"] is None else f"{row['task']} at {row['shots']} shots"
        unit = unit_name("head", row["layer"], row["head"])
        return said.format(unit=unit, value=row["value"], where=where)
    return ""


def _icl_heads(results: pl.DataFrame) -> str:
    """Return what removing 5 % of the heads by each score (the most where that is none) costs beside random
    ones, by the mean over tasks where there is one: of first-token accuracy, since options are told apart
    without knowing the task.
    """
    drops = results.filter((pl.col("procedure") == "removal") & (pl.col("metric") == "first_token_acc_drop"))
    levels = drops["percent"].unique().to_list()
    shown = SHOWN_PERCENT if SHOWN_PERCENT in levels else max(levels, default=SHOWN_PERCENT)
    for means in ("task-mean", "own-mean"):
        rows = mean_over_tasks(drops.filter(other_method=means, percent=shown))
        values = {row["method"]: row["value"] for row in rows.iter_rows(named=True)}
        if values:
            return (
                f"removing {shown} % of the heads costs {values['function_vector']:.2f} of first-token "
                f"accuracy by function vectors, {values['induction']:.2f} by induction, "
                f"{values['random-median']:.2f} at random"
            )
    return ""


def _overlap(results: pl.DataFrame) -> str:
    rows = results.filter(pl.col("metric") == "spearman")
    return f"{len(rows):,} pairs of rankings" if len(rows) else ""


FIRST_RESULTS: dict[str, Callable[[pl.DataFrame], str]] = {
    "evaluate": _evaluate,
    "importance": _importance,
    "ablate": _ablate,
    "prune": _prune,
    "patch": _patch,
    "induction": _induction,
    "icl-heads": _icl_heads,
    "overlap": _overlap,
}
