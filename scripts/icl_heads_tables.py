"""The tables on heads that carry learning in context, from the run folders that scripts/icl_heads.sh leaves.

    python scripts/icl_heads_tables.py RUN... [--write docs/real-models.md]

With --write they are put between the file's marks, <!-- icl-heads: scripts/icl_heads_tables.py --> and
<!-- /icl-heads -->; without, they are printed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from doc_tables import put_table
from real_models_tables import markdown, number, shown_command

from lowmem_icl.report.numbers import mean_over_tasks
from lowmem_icl.report.run_tables import read_run

METHODS = {
    "function_vector": "function vector",
    "induction": "induction",
    "function_vector-excluding-induction": "f. v. without induction",
    "induction-excluding-function_vector": "induction without f. v.",
    "random-median": "random",
}
MEANS = {"task-mean": "mean over tasks", "own-mean": "the task's own mean"}


def with_bounds(row: dict[str, Any] | None, digits: int = 2) -> str:
    """Return a value with its bounds; a dash where there is none."""
    if row is None:
        return "–"
    value = number(row["value"], digits)
    if row["low"] is None:
        return value
    return f"{value} ({number(row['low'], digits)} to {number(row['high'], digits)})"


def by_level(records: pl.DataFrame, digits: int = 2) -> str:
    """Return a table of a metric: a row per percentage, a column per ranking."""
    found = {(row["percent"], row["method"]): row for row in records.iter_rows(named=True)}
    levels = sorted({(percent, row["count"]) for (percent, _), row in found.items()})
    rows = [
        [f"{percent} % ({count})", *(with_bounds(found.get((percent, name)), digits) for name in METHODS)]
        for percent, count in levels
    ]
    return markdown(["heads removed", *METHODS.values()], rows)


def overlap_table(records: pl.DataFrame) -> str:
    """Return how many of the top heads both rankings have, beside chance, and how deep these lie."""
    found = {(row["metric"], row["percent"], row["method"]): row for row in records.iter_rows(named=True)}
    rows = []
    for (metric, percent, method), row in found.items():
        if metric != "top_overlap":
            continue
        count, layered = row["count"], found["layer_overlap", percent, method]
        p_value = found["layer_overlap_p_value", percent, method]["value"]
        depths = [
            number(found["mean_depth", percent, name]["value"]) for name in ("function_vector", "induction")
        ]
        rows.append([
            f"{percent} % ({count})", round(row["value"] * count), f"{row['chance'] * count:.1f}",
            f"{layered['chance'] * count:.1f} (p {p_value:.2g})", " / ".join(depths),
        ])  # fmt: skip
    columns = ["top heads", "shared", "by chance", "within layers", "mean depth, f. v. / induction"]
    return markdown(columns, rows)


def removal_tables(removal: pl.DataFrame) -> Iterator[str]:
    """Yield what removing heads leaves of both accuracies, by both kinds of means."""
    for metric, said in {"acc": "Accuracy by options", "first_token_acc": "First-token accuracy"}.items():
        of_metric = mean_over_tasks(removal.filter(pl.col("metric") == metric))
        for means, named in MEANS.items():
            records = of_metric.filter(pl.col("other_method") == means)
            if records.is_empty():
                continue
            clean = of_metric.filter(pl.col("mask") == "clean").row(0, named=True)
            documents = f"{clean['documents']} documents"
            yield f"{said}, {named} in heads' place ({documents}; with all heads {with_bounds(clean)}):"
            yield by_level(records)


def sections(folder: Path) -> Iterator[str]:
    """Yield a run's tables with what they are of."""
    run = read_run(folder)
    results = run.results.filter(pl.col("experiment") == "icl-heads")
    yield f"### {folder.name}"
    yield f"`{shown_command(run.record['command'])}`"
    correlation = results.filter(pl.col("metric") == "spearman").row(0, named=True)
    yield f"Rank correlation of both scores over all heads: {with_bounds(correlation)}."
    yield overlap_table(results.filter(pl.col("procedure") == "overlap"))
    removal = results.filter(pl.col("procedure") == "removal")
    yield from removal_tables(removal)
    text = results.filter((pl.col("procedure") == "text") & (pl.col("metric") == "loss_difference"))
    if len(text):
        clean = text.filter(pl.col("mask") == "clean").row(0, named=True)
        windows = clean["documents"]
        positions = run.record["icl_heads"]["text"]
        yield (
            f"Loss at token {positions['early']} less loss at token {positions['late']} of plain text is "
            f"{with_bounds(clean)} nats with all heads ({windows} windows); of that, removal takes:"
        )
        yield by_level(results.filter(pl.col("metric") == "loss_difference_drop"))


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    write: Annotated[Path | None, typer.Option(help="Markdown file that gets the tables.")] = None,
) -> None:
    """Print the tables of runs, or put them into a file."""
    text = "\n\n".join(section for folder in runs for section in sections(folder))
    if write is None:
        print(text)
    else:
        put_table(write, "icl-heads", Path(__file__).name, f"\n{text}\n")


if __name__ == "__main__":
    typer.run(main)
