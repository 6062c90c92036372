"""The page's section on which heads carry learning in context: induction or function-vector heads."""

from collections.abc import Iterator

import polars as pl

from lowmem_icl.report.numbers import mean_over_tasks
from lowmem_icl.report.page.plots.icl_heads import removal_curves
from lowmem_icl.report.page.plots.style import PagePlot
from lowmem_icl.report.page.section import Section, Table, interval_text, number_text
from lowmem_icl.report.run_tables import RunTables

METRIC = "first_token_acc"
SHOWN_PERCENT = 5
FEWEST_SHARED = 3
"""Of fewer top heads more are looked at."""
METHODS = {
    "function_vector": "function vector",
    "induction": "induction",
    "function_vector-excluding-induction": "function vector, less induction",
    "induction-excluding-function_vector": "induction, less function vector",
    "random-median": "random",
}
PLOTTED = {name: METHODS[name] for name in ("random-median", "function_vector", "induction")}
MEANS = {"task-mean": "the mean over tasks", "own-mean": "the task's own mean"}
TEXT = (
    "Heads are ranked by induction (prefix matching) and by function vectors (what their mean output adds to "
    "the right answer where the demonstrations do not show it). The top heads of each, and random ones, are "
    "removed together at the last token of prompts with demonstrations, a mean output in their place: where "
    "that is the mean over tasks, what the heads say of the task is lost; where it is the task's own, only "
    "what they say of the question. (Yin and Steinhardt 2025.)"
)
COLUMNS = ("in their place", "heads removed", *METHODS.values())
CAPTION = (
    "How often the answer's first token is the most likely one, mean over tasks, with {means} in the heads' "
    "place. Dotted: all heads there; grey: 95 % of random draws of as many heads."
)


def icl_heads_section(run: RunTables) -> Section | None:
    """Return how both rankings agree and what removing their top heads costs; None where nothing was
    removed.
    """
    records = run.results.filter(pl.col("experiment") == "icl-heads")
    if records.is_empty():
        return None
    removal = records.filter((pl.col("procedure") == "removal") & (pl.col("metric") == METRIC))
    means = mean_over_tasks(removal)
    text = " ".join([TEXT, *overlap_sentences(records), *text_sentences(records)])
    plots, rows = list[PagePlot](), list[list[str]]()
    clean = next(iter(means.filter(pl.col("mask") == "clean")["value"]), None)
    for kind, said in MEANS.items():
        of_kind = means.filter(pl.col("other_method") == kind)
        if of_kind.is_empty():
            continue
        plots.append(removal_curves(kind, of_kind, PLOTTED, clean, CAPTION.format(means=said)))
        rows += _rows(of_kind, said)
    table = Table(COLUMNS, rows, "first-token accuracy without heads") if rows else None
    return Section("icl-heads", "Which heads carry learning in context", text, plots, table)


def _rows(records: pl.DataFrame, said: str) -> Iterator[list[str]]:
    found = {(row["percent"], row["method"]): row for row in records.iter_rows(named=True)}
    for percent, count in sorted({(row["percent"], row["count"]) for row in found.values()}):
        cells = []
        for method in METHODS:
            row = found.get((percent, method))
            bounds = "" if row is None else interval_text(row["low"], row["high"])
            value = "" if row is None else number_text(row["value"])
            cells.append(f"{value} ({bounds})" if bounds else value)
        yield [said, f"{percent} % ({count})", *cells]


def overlap_sentences(records: pl.DataFrame) -> Iterator[str]:
    """Yield how many of the top heads both rankings have, beside chance, and how deep these lie."""
    found = {(row["metric"], row["percent"], row["method"]): row for row in records.iter_rows(named=True)}
    percents = [percent for metric, percent, _ in found if metric == "top_overlap"]
    if not percents:
        return
    percent = SHOWN_PERCENT if SHOWN_PERCENT in percents else max(percents)
    if found["top_overlap", percent, "function_vector"]["count"] < FEWEST_SHARED:
        percent = max(percents)
    shared, layered = (
        found[metric, percent, "function_vector"] for metric in ("top_overlap", "layer_overlap")
    )
    count = shared["count"]
    both = round(shared["value"] * count)
    yield (
        f"Of the top {count} by each score ({percent} %) both rankings have {both}; by chance "
        f"{shared['chance'] * count:.1f} would be shared, with the layers as they are "
        f"{layered['chance'] * count:.1f}."
    )
    depths = [found["mean_depth", percent, name]["value"] for name in ("function_vector", "induction")]
    yield (
        f"From 0, the first layer, to 1, the last, those of function vectors lie at {depths[0]:.2f} on "
        f"average, those of induction at {depths[1]:.2f}."
    )


def text_sentences(records: pl.DataFrame) -> Iterator[str]:
    """Yield what removing heads takes of what text further on is read better by."""
    rows = records.filter(pl.col("procedure") == "text").to_dicts()
    clean = next((row for row in rows if row["metric"] == "loss_difference" and row["mask"] == "clean"), None)
    if clean is None:
        return
    lost = {
        row["method"]: row
        for row in rows
        if (row["metric"], row["percent"]) == ("loss_difference_drop", SHOWN_PERCENT)
    }
    said = [
        f"the top {SHOWN_PERCENT} % by {METHODS[name]} take {number_text(lost[name]['value'])} "
        f"({interval_text(lost[name]['low'], lost[name]['high'])})"
        for name in ("function_vector", "induction")
        if name in lost
    ]
    rest = f"; of that {' and '.join(said)}" if said else ""
    yield (
        f"In plain text the loss falls by {number_text(clean['value'])} nats "
        f"({interval_text(clean['low'], clean['high'])}, {clean['documents']} windows) from early to late "
        f"tokens{rest}."
    )
