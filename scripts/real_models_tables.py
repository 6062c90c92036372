"""The tables of docs/real-models.md, from the run folders that scripts/real_models.sh leaves.

    python scripts/real_models_tables.py RUNS [--docs docs/real-models.md]

Every folder below RUNS with a results.parquet is a run. With --docs the tables are put between the file's
marks, <!-- tables: scripts/real_models_tables.py --> and <!-- /tables -->; without, they are printed.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from doc_tables import put_table
from scipy.stats import spearmanr

from lowmem_icl.report.losses import Loss, SearchMask, greedy_losses
from lowmem_icl.report.numbers import (
    accuracy,
    held_out_tops,
    induction_heads,
    mean_over_tasks,
    pruned,
    top_units,
    total_seconds,
    unit_name,
)
from lowmem_icl.report.run_tables import read_run

UNIT = ("task", "shots", "kind", "layer", "head")
MATCHING = 0.3
PLACES = ("--out", "--store-dir", "--data-dir", "--masks-dir")
INDUCTION_HEADS_SHOWN = LABEL_UNITS_SHOWN = 5


@dataclass(frozen=True)
class Run:
    """A run's name, its record, its results and its table of masks."""

    name: str
    record: dict[str, Any]
    results: pl.DataFrame
    masks: pl.DataFrame

    def of(self, **values: object) -> pl.DataFrame:
        """Return the records with these values."""
        return self.results.filter(*(pl.col(name) == value for name, value in values.items()))


def shown_command(command: str) -> str:
    """Return a run's command without what only its machine needs."""
    words, shown = iter(shlex.split(command)), []
    for word in words:
        if word in PLACES:
            next(words, None)
        elif word != "--quiet":
            shown.append(Path(word).name if "/" in word and not word.startswith("-") else word)
    return " ".join(shown)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as it stands in a cell; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def accuracy_table(run: Run) -> str:
    """Return accuracy of every task by shots, with the label controls beside it."""
    shots = run.record["shots"]
    clean = {(row["task"], row["shots"]): row for row in accuracy(run.results).iter_rows(named=True)}
    controls = {
        (row["task"], row["shots"], row["labels"]): row["value"]
        for row in run.of(experiment="evaluate", mask="clean", metric="acc").iter_rows(named=True)
        if row["labels"] in ("shuffled", "foreign")
    }
    rows = []
    for task in dict.fromkeys(task for task, _ in clean):
        cells: list[str] = []
        for n_shots in shots:
            row = clean[task, n_shots]
            others = [controls.get((task, n_shots, labels)) for labels in ("shuffled", "foreign")]
            cell = number(row["value"])
            cells.append(cell if others == [None, None] else " / ".join([cell, *map(number, others)]))
        rows.append([task, number(clean[task, shots[0]]["chance"]), *cells])
    return markdown(["task", "chance", *(f"{n_shots} shots" for n_shots in shots)], rows)


def effect_table(run: Run) -> str:
    """Return what right labels give over shuffled ones, paired, in nats, with 95 % intervals."""
    effects = {
        (row["task"], row["shots"]): row
        for row in run.of(metric="gold_logprob_label_effect", labels="shuffled").iter_rows(named=True)
    }
    shots = sorted({n_shots for _, n_shots in effects})
    rows = [
        [task, *(_with_interval(effects.get((task, n_shots))) for n_shots in shots)]
        for task in dict.fromkeys(task for task, _ in effects)
    ]
    return markdown(["task", *(f"{n_shots} shots" for n_shots in shots)], rows)


def _with_interval(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    bounds = "" if row["low"] is None else f" ({number(row['low'])} to {number(row['high'])})"
    return number(row["value"]) + bounds


def unit_table(run: Run) -> str:
    """Return the units that cost most when removed alone, mean over tasks."""
    by_shots: dict[int, list[str]] = {}
    for row in top_units(run.results).iter_rows(named=True):
        name = unit_name(row["kind"], row["layer"], row["head"])
        by_shots.setdefault(row["shots"], []).append(f"{name} {number(row['value'])}")
    held_out = {
        row["shots"]: number(row["value"]) for row in held_out_tops(run.results).iter_rows(named=True)
    }
    columns = ["shots", "costliest units, nats", "their mean on documents that did not pick them"]
    rows = [[shots, ", ".join(names), held_out.get(shots, "–")] for shots, names in by_shots.items()]
    return markdown(columns, rows)


def label_table(run: Run) -> str:
    """Return the units whose drops are most about labels, mean over tasks; nothing where unknown."""
    effects = mean_over_tasks(run.of(experiment="ablate", metric="label_effect"))
    rows = [
        [
            row["shots"], unit_name(row["kind"], row["layer"], row["head"]), number(row["value"]),
            f"{number(row['low'])} to {number(row['high'])}",
        ]
        for row in effects.sort(["shots", "value"], descending=[False, True])
        .group_by("shots", maintain_order=True)
        .head(LABEL_UNITS_SHOWN)
        .iter_rows(named=True)
    ]  # fmt: skip
    columns = ["shots", "unit", "drop with right minus with shuffled labels, nats", "95 %"]
    return markdown(columns, rows) if rows else ""


def knee_table(run: Run) -> str:
    """Return how much of heads and FFNs can go by each task's own ranking, and what that costs elsewhere.

    Heads go by gradient, FFNs by ablation; knees are found on training documents.
    """
    of_a_curve = ["procedure", "task", "shots", "method"]
    curves = run.of(experiment="prune").filter(
        pl.col("other_task").is_null() & pl.col("procedure").is_in(["curve-heads", "curve-ffns"])
    )
    knees, certain, costs = (
        curves.filter(pl.col("metric") == metric) for metric in ("knee", "knee_certain", "knee_acc_drop")
    )
    both = knees.join(certain, on=of_a_curve, suffix="_certain").join(costs, on=of_a_curve, suffix="_cost")
    rows = [
        [
            row["task"], row["shots"], "heads" if row["procedure"] == "curve-heads" else "FFNs",
            f"{row['value_certain']:.0f} to {row['value']:.0f} %",
            f"{number(row['value_cost'], 3)} ({number(row['low_cost'])} to {number(row['high_cost'])})",
        ]
        for row in both.sort(
            "task", "shots", "procedure", descending=[False, False, True]
        ).iter_rows(named=True)
    ]  # fmt: skip
    return markdown(["task", "shots", "of", "knee lies at", "what its upper end costs elsewhere"], rows)


def greedy_table(run: Run) -> str:
    """Return what the greedy search removes, and accuracy under its masks and others of equal size."""
    table = pruned(run.results).filter(pl.col("task") != "aggregate")
    model, losses = run.record["model"], greedy_losses(run.masks)
    rows = []
    for (task, shots), masks in table.group_by("task", "shots", maintain_order=True):
        by_method = {row["method"]: row for row in masks.iter_rows(named=True)}
        if "greedy" not in by_method:
            continue
        greedy = by_method["greedy"]
        rows.append(
            [
                task, shots, f"{greedy['heads_removed']}/{model['layers'] * model['heads']}",
                f"{greedy['ffns_removed']}/{model['layers']}",
                *(number(by_method[name]["value"]) if name in by_method else "–"
                  for name in ("greedy", "gradient", "random")),
                *_loss_cells(losses.get(SearchMask(task, shots, "greedy"))),
            ]
        )  # fmt: skip
    columns = ("task", "shots", "heads gone", "FFNs gone", "greedy", "gradient", "random")
    return markdown([*columns, f"loss of {run.record['options']['objective']}", "tolerance kept"], rows)


def _loss_cells(loss: Loss | None) -> tuple[str, str]:
    if loss is None:
        return "–", "–"
    bounds = "" if loss.low is None else f" ({number(loss.low)} to {number(loss.high)})"
    return f"{number(loss.value, 3)}{bounds}", loss.verdict


def induction_text(run: Run) -> str:
    """Return heads by prefix matching, and what removing the best of them costs beside random heads."""
    heads = induction_heads(run.results, 10_000)
    matching = heads.filter(pl.col("value") >= MATCHING)
    best = ", ".join(
        f"{unit_name('head', row['layer'], row['head'])} {number(row['value'])}"
        for row in heads.head(INDUCTION_HEADS_SHOWN).iter_rows(named=True)
    )
    lines = [f"{len(matching)} of {len(heads)} heads match prefixes at {MATCHING} or more; the best: {best}."]
    costs = run.of(experiment="induction", metric="acc_drop")
    costs = costs.filter(pl.col("method").is_not_null())
    rows = [
        [row["task"], row["shots"], row["method"], row["heads_removed"], number(row["value"], 3)]
        for row in costs.group_by("task", "shots", "method", maintain_order=True)
        .agg(pl.col("heads_removed").max(), pl.col("value").mean())
        .iter_rows(named=True)
    ]
    table = markdown(["task", "shots", "removed", "heads", "lost accuracy (mean of masks)"], rows)
    return "\n\n".join([*lines, table] if rows else lines)


def overlap_table(run: Run) -> str:
    """Return how rankings of heads by gradient agree between tasks, and between shot counts."""
    pairs = run.of(experiment="overlap", procedure="pair", metric="spearman", method="gradient")
    pairs = pairs.filter(
        (pl.col("other_method") == "gradient") & (pl.col("task") != "aggregate")
        & (pl.col("other_task") != "aggregate")
    )  # fmt: skip
    same_task, same_shots = pl.col("task") == pl.col("other_task"), pl.col("shots") == pl.col("other_shots")
    rows = [
        ["tasks, at one shot count", *_spread(pairs.filter(~same_task & same_shots))],
        ["shot counts, of one task", *_spread(pairs.filter(same_task & ~same_shots))],
    ]
    return markdown(["between", "pairs", "mean rank correlation", "lowest", "highest"], rows)


def _spread(pairs: pl.DataFrame) -> list[object]:
    values = pairs["value"].to_list()
    if not values:
        return [0, "–", "–", "–"]
    return [len(values), number(sum(values) / len(values)), number(min(values)), number(max(values))]


def time_table(runs: Sequence[Run]) -> str:
    """Return how long every stage of every run took, and the most memory it had."""
    stages = list(dict.fromkeys(name for run in runs for name in run.record["stages"]))
    rows = []
    for run in runs:
        seconds = {name: stage["seconds"] for name, stage in run.record["stages"].items()}
        peak = max(session["peak_resident_bytes"] or 0 for session in run.record["sessions"])
        rows.append(
            [run.name, *(number(seconds.get(name), 0) for name in stages),
             number(total_seconds(run.record), 0), f"{peak / 1e9:.2f} GB"]
        )  # fmt: skip
    return markdown(["run", *stages, "all, s", "peak memory"], rows)


def form_table(left: Run, right: Run) -> str:
    """Return how int8 and float32 of one model agree: accuracy, and the order of units by their drops."""
    first, second = (
        run.of(experiment="ablate", procedure="single", metric="gold_logprob_drop") for run in (left, right)
    )
    both = first.join(second, on=list(UNIT), nulls_equal=True, suffix="_other")
    accuracies = accuracy(left.results).join(accuracy(right.results), on=["task", "shots"], suffix="_other")
    apart = (accuracies["value"] - accuracies["value_other"]).abs()
    largest = max(apart.to_list(), default=None)
    rows = []
    for (task, shots), units in both.group_by("task", "shots", maintain_order=True):
        if task != "aggregate":
            correlation = float(spearmanr(units["value"], units["value_other"]).statistic)
            rows.append([task, shots, len(units), number(correlation, 3)])
    table = markdown(["task", "shots", "units", "rank correlation of drops, int8 and float32"], rows)
    return f"Accuracies differ by at most {number(largest, 3)}.\n\n{table}"


def sections(runs: dict[str, Run]) -> Iterator[str]:
    """Yield the text of all sections."""
    for name, run in runs.items():
        if name.endswith("-float32"):
            continue
        yield f"## {name}\n\n`{shown_command(run.record['command'])}`"
        experiments = set(run.record["stages"])
        yield f"### Accuracy: right / shuffled / foreign labels\n\n{accuracy_table(run)}"
        yield f"### What right labels give over shuffled ones, nats\n\n{effect_table(run)}"
        if "ablate" in experiments:
            yield f"### Units\n\n{unit_table(run)}"
            if about_labels := label_table(run):
                yield f"### Units by how much of their drop is about labels\n\n{about_labels}"
        if "prune" in experiments:
            yield f"### What can go: curves\n\n{knee_table(run)}"
            yield f"### What can go: greedy search\n\n{greedy_table(run)}"
        if "induction" in experiments:
            yield f"### Induction heads\n\n{induction_text(run)}"
        if "overlap" in experiments:
            yield f"### Agreement of rankings\n\n{overlap_table(run)}"
        exact = runs.get(f"{name}-float32")
        if exact is not None:
            yield f"### 8 bits against float32\n\n{form_table(run, exact)}"
    yield f"## Time and memory\n\n{time_table(list(runs.values()))}"


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders.")],
    docs: Annotated[Path | None, typer.Option(help="File to put the tables into.")] = None,
) -> None:
    """Print the tables, or put them into a file."""
    found = sorted(path.parent for path in folder.glob("*/results.parquet"))
    read = {path.name: read_run(path) for path in found}
    runs = {name: Run(name, dict(run.record), run.results, run.masks) for name, run in read.items()}
    text = "\n\n".join(sections(runs))
    if docs is None:
        sys.stdout.write(text + "\n")
        return
    put_table(docs, "tables", Path(__file__).name, f"\n{text}\n")


if __name__ == "__main__":
    typer.run(main)
