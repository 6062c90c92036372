"""What trackers are told of a stage: its headline numbers by name, a few for each task and shot count."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.numbers import (
    greedy_accuracy,
    induction_head_count,
    induction_heads,
    mean_over_tasks,
    top_units,
    unit_name,
    with_right_labels,
)
from lowmem_icl.report.patches import added_vectors, prompt_scores, top_patches, vector_heads
from lowmem_icl.tables.schema import ACCURACIES

Metrics = dict[str, float]

MEASURED = (*ACCURACIES, "f1", "gold_logprob", "gold_prob", "margin")
SEARCHES = ("greedy", "certified")
TOP = 5
LONGEST_WORD = 80


def stage_metrics(experiment: str, results: pl.DataFrame) -> Metrics:
    """Return an experiment's main numbers from its records of results.parquet, by names such as
    evaluate/recall/16-shot/acc; numbers that are null or NaN are left out.
    """
    make = _NUMBERS.get(experiment)
    if make is None or results.is_empty():
        return {}
    named = ((f"{experiment}/{name}", value) for name, value in make(results))
    return {name: float(value) for name, value in named if value is not None and value == value}


Numbers = Iterable[tuple[str, float | None]]


def _evaluate(results: pl.DataFrame) -> Numbers:
    """Clean scores; accuracy also under other labels and under given masks, by their names."""
    records = results.filter(pl.col("metric").is_in(MEASURED))
    for row in records.iter_rows(named=True):
        is_right, is_clean = row["labels"] in (None, "right"), row["mask"] == "clean"
        if not (is_right and is_clean) and row["metric"] not in ACCURACIES:
            continue
        under = ([] if is_right else [f"{row['labels']}-labels"]) + ([] if is_clean else [_word(row["mask"])])
        yield "/".join([_setting(row), *under, row["metric"]]), row["value"]


def _importance(results: pl.DataFrame) -> Numbers:
    heads = results.filter((pl.col("metric") == "gradient") & (pl.col("kind") == "head"))
    means = mean_over_tasks(heads).sort("value", descending=True, maintain_order=True)
    for row in means.group_by("shots", maintain_order=True).head(TOP).iter_rows(named=True):
        yield f"{_setting(row)}/gradient/{_unit(row)}", row["value"]


def _ablate(results: pl.DataFrame) -> Numbers:
    for row in top_units(results, TOP).iter_rows(named=True):
        yield f"{AGGREGATE}/{row['shots']}-shot/gold_logprob_drop/{_unit(row)}", row["value"]


def _prune(results: pl.DataFrame) -> Numbers:
    own = greedy_accuracy(results).filter(pl.col("method").is_in(SEARCHES) & with_right_labels())
    for row in own.iter_rows(named=True):
        name = f"{_setting(row)}/{row['method']}"
        yield f"{name}/{row['metric']}", row["value"]
        yield f"{name}/heads_removed", row["heads_removed"]
        yield f"{name}/ffns_removed", row["ffns_removed"]


def _induction(results: pl.DataFrame) -> Numbers:
    yield "induction_heads", induction_head_count(results)
    for row in induction_heads(results, TOP).iter_rows(named=True):
        yield f"prefix_matching/{unit_name('head', row['layer'], row['head'])}", row["value"]


def _overlap(results: pl.DataFrame) -> Numbers:
    """How alike rankings are: the mean of Spearman's correlations by the two methods, and their number."""
    pairs = results.filter(pl.col("metric") == "spearman")
    means = pairs.group_by("kind", "method", "other_method", maintain_order=True).agg(pl.col("value").mean())
    for row in means.iter_rows(named=True):
        yield f"{row['kind']}/{row['method']}-{row['other_method']}/mean_spearman", row["value"]


def _patch(results: pl.DataFrame) -> Numbers:
    for row in prompt_scores(results).iter_rows(named=True):
        for name in ("gold_logprob_clean", "gold_logprob_corrupted", "acc_clean", "acc_corrupted"):
            yield f"{_setting(row)}/{row['procedure']}/{name}", row[name]
    for row in top_patches(results, 1).iter_rows(named=True):
        name = f"{_setting(row)}/{row['procedure']}/{row['direction']}_gold_logprob"
        yield f"{name}/{_unit(row)}", row["value"]
    for row in vector_heads(results, TOP).iter_rows(named=True):
        yield f"{_setting(row)}/function_vector/{unit_name('head', row['layer'], row['head'])}", row["value"]
    for row in added_vectors(results).iter_rows(named=True):
        for name in ("without", "own", "other_task", "random"):
            yield f"{_word(row['task'])}/{row['mask_shots']}-shot/added/{name}", row[name]


def _icl_heads(results: pl.DataFrame) -> Numbers:
    removal = results.filter(
        (pl.col("procedure") == "removal")
        & (pl.col("metric") == "first_token_acc_drop")
        & (pl.col("method") != "random")
    )
    for row in mean_over_tasks(removal).iter_rows(named=True):
        name = f"{_setting(row)}/{row['method']}/{row['percent']}-percent/{row['other_method']}"
        yield f"{name}/first_token_acc_drop", row["value"]


def _setting(row: Mapping[str, Any]) -> str:
    task = _word(row["task"])
    return task if row["shots"] is None else f"{task}/{row['shots']}-shot"


def _word(name: str) -> str:
    """Return a task's or mask's name, which may be a path, as one part of a name that all trackers take."""
    return re.sub(r"[^\w.:-]+", "_", name).strip("._")[-LONGEST_WORD:] or "_"


def _unit(row: Mapping[str, Any]) -> str:
    return unit_name(row["kind"], row["layer"], row["head"])


_NUMBERS: Mapping[str, Callable[[pl.DataFrame], Numbers]] = {
    "evaluate": _evaluate,
    "importance": _importance,
    "ablate": _ablate,
    "prune": _prune,
    "induction": _induction,
    "overlap": _overlap,
    "patch": _patch,
    "icl-heads": _icl_heads,
}
