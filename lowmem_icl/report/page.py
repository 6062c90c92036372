"""One self-contained page from the tables of one run or several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from matplotlib.figure import Figure

from lowmem_icl.files import write_text_atomic
from lowmem_icl.report import figures, figures_induction
from lowmem_icl.results import read_table
from lowmem_icl.summary import accuracy, pruned, run_record, top_units, unit_name


@dataclass
class Drawn:
    """A figure in the page with the sentence below it."""

    svg: str
    caption: str


@dataclass
class Section:
    """A part of the page: text, figures and a table of formatted cells."""

    title: str
    text: str = ""
    figures: list[Drawn] = field(default_factory=list)
    columns: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)


def write_report(folders: Sequence[Path], page: Path) -> None:
    """Write the page of one or more run folders, and each run's figures into its own folder.

    Raises InputError naming a folder that holds no run or a table that cannot be read.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowmem_icl.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("page.html.jinja").render(runs=[_run(folder) for folder in folders])
    write_text_atomic(page, text)


def _run(folder: Path) -> dict[str, Any]:
    record, results = run_record(folder), read_table(folder / "results.parquet", "results")
    model = record["model"]
    machine = record["machine"]
    return {
        "title": f"{model['id']} in {model['weights']}",
        "lead": (
            f"{model['layers']} layers of {model['heads']} heads and an FFN each; "
            f"tasks {', '.join(dict.fromkeys(task['task'] for task in record['tasks']))}; "
            f"{', '.join(str(count) for count in record['shots'])} demonstrations. Accuracies are of the evaluation "
            "split; importance, ablations and the choice of masks are of the training split. Bars and ± are 95 % "
            "intervals and standard errors over documents."
        ),
        "findings": _findings(results, model),
        "warnings": record["warnings"],
        "sections": _sections(results, record, folder),
        "command": record["command"],
        "made": (
            f"{record['started']} on {machine['processor']}, {machine['threads']} threads"
            f"{', ' + machine['cuda'] if machine['cuda'] else ''}; "
            + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
            + f"; weights {model['digest'][:12]}, protocol {record['options']['protocol']}, "
            f"seed {record['options']['seed']}."
        ),
    }


def _findings(results: pl.DataFrame, model: dict[str, Any]) -> list[str]:
    found = []
    for row in (
        pruned(results).filter((pl.col("method") == "greedy") & (pl.col("task") == "aggregate")).to_dicts()
    ):
        found.append(
            f"At {row['shots']} shots {row['heads_removed']} of {model['layers'] * model['heads']} heads and "
            f"{row['ffns_removed']} of {model['layers']} FFNs could go together, leaving a mean accuracy of "
            f"{row['value']:.3f}."
        )
    for (shots,), units in top_units(results, 3).group_by("shots", maintain_order=True):
        named = ", ".join(
            f"{unit_name(unit['kind'], unit['layer'], unit['head'])} ({unit['value']:.2f})"
            for unit in units.to_dicts()
        )
        found.append(
            f"At {shots} shots the costliest units to lose alone are {named}, in nats of gold log-probability."
        )
    return found


def _sections(results: pl.DataFrame, record: dict[str, Any], folder: Path) -> list[Section]:
    layers, heads = record["model"]["layers"], record["model"]["heads"]
    sections: list[Section] = []

    def draw(name: str, make: Callable[[], Figure | None], caption: str) -> list[Drawn]:
        figure = make()
        if figure is None:
            return []
        text = figures.svg(figure)
        write_text_atomic(folder / "figures" / f"{name}.svg", text)
        return [Drawn(text, caption)]

    rows = accuracy(results)
    if len(rows):
        sections.append(
            Section(
                "Accuracy",
                figures=draw(
                    "accuracy",
                    lambda: figures.accuracy_by_shots(results),
                    "Clean accuracy of every task; dotted: chance.",
                ),
                columns=("task", "shots", "metric", "value", "± stderr", "chance", "documents"),
                rows=[
                    [
                        row["task"], str(row["shots"]), row["metric"], f"{row['value']:.3f}", _number(row["stderr"]),
                        _number(row["chance"]), str(row["documents"]),
                    ]
                    for row in rows.to_dicts()
                ],
            )
        )  # fmt: skip
    importance = results.filter(pl.col("experiment") == "importance")
    if len(importance):
        sections.append(
            Section(
                "Importance",
                "The paper's gradient score of every head: how much the loss of the gold continuation would change, "
                "to first order, summed in absolute value over tokens.",
                draw(
                    "importance",
                    lambda: figures.head_maps(importance, "gradient", layers, heads, "gradient importance"),
                    "Each panel has its own scale; layer 0 is at the bottom.",
                ),
            )
        )
    ablate = results.filter(pl.col("experiment") == "ablate")
    if len(ablate):
        drawn = draw(
            "ablation",
            lambda: figures.head_maps(
                ablate, "gold_logprob_drop", layers, heads, "drop of gold log-probability, nats"
            ),
            "Red: the answer becomes less likely without the head; blue: more likely.",
        )
        drawn += draw(
            "ffns", lambda: figures.ffn_bars(results), "What each FFN's removal costs, mean over tasks."
        )
        drawn += draw(
            "estimate",
            lambda: figures.estimate_against_exact(results),
            "First-order attribution against the exact drop; on the line they agree.",
        )
        sections.append(Section("Units removed alone", _how_exact(ablate), drawn))
    if len(results.filter(pl.col("experiment") == "prune")):
        sections.append(
            Section(
                "Pruning",
                f"Greedy layerwise masks that may lose {record['options']['tolerance']:g} of "
                f"{record['options']['objective']} on training documents, beside the lowest units by gradient and a "
                "random draw of equal size; all judged on the evaluation split.",
                draw(
                    "pruning",
                    lambda: figures.pruning_bars(results),
                    "Line: the clean model. Above: heads (H) and FFNs (F) removed.",
                ),
                ("task", "shots", "method", "heads removed", "FFNs removed", "accuracy", "95 %"),
                [
                    [
                        row["task"], str(row["shots"]), row["method"], str(row["heads_removed"]),
                        str(row["ffns_removed"]), f"{row['value']:.3f}",
                        f"{_number(row['low'])} to {_number(row['high'])}",
                    ]
                    for row in pruned(results).to_dicts()
                ],
            )
        )  # fmt: skip
    induction = results.filter(pl.col("experiment") == "induction")
    if len(induction):
        drawn = draw(
            "induction",
            lambda: figures_induction.score_maps(induction, layers, heads),
            "Heads by layer, layer 0 at the bottom. Copying by eigenvalues: −1 to 1, from the weights alone.",
        )
        drawn += draw(
            "capacity",
            lambda: figures_induction.capacity_curves(induction),
            "What is left of the summed scores when heads go, least important first; grey: 95 % of random orders.",
        )
        told = figures_induction.told(induction, record.get("induction", {}))
        sections.append(Section("Induction heads", told, drawn))
    if len(results.filter(pl.col("experiment") == "overlap")):
        sections.append(
            Section(
                "Agreement between tasks",
                "Spearman's rank correlation of gradient head scores.",
                draw(
                    "overlap",
                    lambda: figures.overlap_matrix(results),
                    "1: the same order of heads; 0: unrelated.",
                ),
            )
        )
    return sections


def _how_exact(ablate: pl.DataFrame) -> str:
    """Say which drops are exact and, where units were screened, how far the estimates of the others can be trusted."""
    drops = ablate.filter(pl.col("metric") == "gold_logprob_drop")
    exactly = drops.filter(pl.col("exact"))
    documents = int(exactly["documents"].cast(pl.Int64).to_numpy().max(initial=0))
    if drops["exact"].all():
        return f"Every unit, exactly, on {documents} training documents a task."
    estimated = drops.filter(~pl.col("exact"))
    exact, units = len(exactly), len(drops)
    text = (
        f"{exact:,} of {units:,} drops are exact, on {documents} training documents a task; the others are estimated by "
        "attribution, to first order, on all of them, and only for gold log-probability."
    )
    agreement = (
        ablate.filter(pl.col("metric") == "estimate_spearman").group_by("method").agg(pl.col("value").mean())
    )
    named = {"attribution": "all exact units", "attribution-drawn": "those that chance chose"}
    told = [f"{value:.2f} over {named[method]}" for method, value in sorted(agreement.iter_rows())]
    return text + (f" Rank correlation of estimate and exact drop: {', '.join(told)}." if told else "")


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"
