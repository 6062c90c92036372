"""One self-contained page from the tables of one run or several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from matplotlib.figure import Figure

from lowmem_icl.protocols import DIFFERENCES, REFERENCE
from lowmem_icl.report import agreement, curves, figures, figures_induction
from lowmem_icl.report.numbers import CLAIMED_Q, accuracy, claim_mark, pruned, top_units, unit_name
from lowmem_icl.session.folder import run_record
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tables.schema import read_table


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
            f"{unit_name(unit['kind'], unit['layer'], unit['head'])} ({unit['value']:.2f}{claim_mark(unit)})"
            for unit in units.to_dicts()
        )
        found.append(
            f"At {shots} shots the costliest units to lose alone are {named}, in nats of gold log-probability; "
            f"*: other than 0 at a false discovery rate of {CLAIMED_Q:.0%} among all units."
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
                columns=("task", "shots", "metric", "value", "± stderr", "chance", "majority", "documents"),
                rows=[
                    [
                        row["task"], str(row["shots"]), row["metric"], f"{row['value']:.3f}", _number(row["stderr"]),
                        _number(row["chance"]), _number(row["majority"]), str(row["documents"]),
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
    if len(results.filter(pl.col("metric") == "icl_effect")):
        drawn = draw(
            "in-context",
            lambda: figures.head_maps(ablate, "icl_effect", layers, heads, "in-context effect, nats"),
            "Each panel has its own scale; the shot count is compared with none.",
        )
        sections.append(
            Section(
                "In-context effect",
                agreement.IN_CONTEXT_NOTE,
                drawn,
                agreement.IN_CONTEXT_COLUMNS,
                agreement.in_context_table(results),
            )
        )
    if len(curves.curve_rows(results)):
        drawn = draw(
            "heads",
            lambda: curves.pruning_curves(results, "head"),
            "The least important heads go first; bars: 95 % intervals; dotted: chance.",
        )
        drawn += draw("ffn-curves", lambda: curves.pruning_curves(results, "ffn"), "The same for FFNs.")
        drawn += draw(
            "grid",
            lambda: curves.combined_grid(results),
            "Accuracy with heads and FFNs removed together, mean over tasks.",
        )
        sections.append(
            Section(
                "Pruning curves",
                "One ranking of the intact model, ever more of its least important units removed; on the first evaluation "
                "documents. A knee is the largest level whose drop of accuracy is at most one point and one standard error "
                "on training documents; what it costs is of evaluation documents.",
                drawn,
                curves.KNEE_COLUMNS,
                curves.knee_table(results),
            )
        )
    if len(pruned(results)):
        sections.append(
            Section(
                "Greedy pruning",
                f"Greedy layerwise masks that may lose {record['options']['tolerance']:g} of "
                f"{record['options']['objective']} on training documents, beside the lowest units by gradient and a "
                "random draw of equal size; all judged on the evaluation split."
                + curves.replaced_note(record.get("greedy", [])),
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
                agreement.agreement_note(results),
                draw(
                    "overlap",
                    lambda: figures.overlap_matrix(results),
                    "Gradient scores. 1: the same order of heads; 0: unrelated.",
                ),
                agreement.AGREEMENT_COLUMNS,
                agreement.agreement_table(results),
            )
        )
    if record["options"]["protocol"] == REFERENCE.name:
        sections.append(
            Section(
                "Protocol",
                "The reference protocol does what the paper's code does, so that its numbers can be compared.",
                columns=("what the code does", "plain bug", "done here"),
                rows=[
                    [one.sentence, *("yes" if flag else "no" for flag in (one.plain_bug, one.imitated))]
                    for one in DIFFERENCES
                ],
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
