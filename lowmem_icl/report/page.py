"""One self-contained page from the tables of one run or several: its sections, in their order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.ablation import ablation_section
from lowmem_icl.report.accuracy import accuracy_section
from lowmem_icl.report.agreement import agreement_section
from lowmem_icl.report.curves import curves_section
from lowmem_icl.report.greedy import greedy_section
from lowmem_icl.report.importance import importance_section
from lowmem_icl.report.in_context import in_context_section, label_drops_section
from lowmem_icl.report.induction import induction_section
from lowmem_icl.report.labels import labels_section
from lowmem_icl.report.numbers import (
    PICKED,
    STAR,
    held_out_text,
    held_out_tops,
    mean_over_tasks,
    pruned,
    significance_mark,
    top_units,
    unit_name,
)
from lowmem_icl.report.protocol import protocol_section
from lowmem_icl.report.section import Record, Section
from lowmem_icl.session.folder import run_record
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tables.schema import read_table

MakeSection = Callable[[pl.DataFrame, Record], Section | None]

# With the headings of docs/numbers.md that say what their numbers mean.
SECTIONS: dict[MakeSection, tuple[str, ...]] = {
    accuracy_section: ("Accuracy and log-probability", "At chance", "Intervals", "Means over tasks"),
    labels_section: ("Labels",),
    importance_section: ("Importance",),
    ablation_section: ("Drops", "Stars", "Costliest units"),
    in_context_section: ("Drops", "Costliest units"),
    label_drops_section: ("Drops", "Labels", "Costliest units"),
    curves_section: ("Curves and knees", "Random masks"),
    greedy_section: ("The answer", "Greedy and certified masks"),
    induction_section: ("Induction heads", "Random masks"),
    agreement_section: ("Agreement of rankings",),
    protocol_section: (),
}
NAMED_UNITS = 3


@dataclass(frozen=True)
class RunReport:
    """What the page says of one run, in the order of its template."""

    title: str
    lead: str
    findings: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section]
    command: str
    origin: str


def write_report(folders: Sequence[Path], page: Path) -> None:
    """Write the page of one or more run folders, and each run's figures into its own folder.

    Raises InputError naming a folder that holds no run or a table that cannot be read.
    """
    reports = []
    for folder in folders:
        report = run_report(read_table(folder / "results.parquet", "results"), run_record(folder))
        for section in report.sections:
            for figure in section.figures:
                write_text_atomic(folder / "figures" / f"{figure.name}.svg", figure.svg)
        reports.append(report)
    write_text_atomic(page, render(reports))


def render(reports: Sequence[RunReport]) -> str:
    """Return the page as HTML; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowmem_icl.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja").render(runs=reports)


def run_report(results: pl.DataFrame, record: Record) -> RunReport:
    """Return what the page says of a run."""
    model = record["model"]
    sections = [
        None if (section := make_section(results, record)) is None else replace(section, meaning=headings)
        for make_section, headings in SECTIONS.items()
    ]
    return RunReport(
        title=f"{model['id']} in {model['weights']}",
        lead=_lead(record),
        findings=[*greedy_findings(results, record), *unit_findings(results)],
        warnings=record["warnings"],
        sections=[section for section in sections if section is not None],
        command=record["command"],
        origin=_origin(record),
    )


def _lead(record: Record) -> str:
    model = record["model"]
    return (
        f"{model['layers']} layers of {model['heads']} heads and an FFN each; tasks "
        f"{', '.join(dict.fromkeys(task['task'] for task in record['tasks']))}; "
        f"{', '.join(str(n_shots) for n_shots in record['shots'])} demonstrations. Accuracies are measured "
        "on the evaluation split; importance and ablations are measured, and masks chosen, on the training "
        "split. Bars and bounds are 95 % intervals over documents."
    )


def _origin(record: Record) -> str:
    machine, options = record["machine"], record["options"]
    device = f", {machine['cuda']}" if machine["cuda"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{record['started']} on {machine['processor']}, {machine['threads']} threads{device}; {versions}; "
        f"{_prompts(record['model'])}"
        f"weights {record['model']['digest'][:12]}, protocol {options['protocol']}, seed {options['seed']}."
    )


def _prompts(model: Record) -> str:
    """Say what was done to prompts and weights; nothing for runs that did not record it."""
    said = [f"prompts: {model['prompts']['sentence']}"] if "prompts" in model else []
    said += [f"weights dequantised from {model['quantisation']}"] if model.get("quantisation") else []
    return "".join(f"{text}; " for text in said)


def greedy_findings(results: pl.DataFrame, record: Record) -> list[str]:
    """Return a sentence per shot count on how many units could be removed together."""
    model = record["model"]
    searched = mean_over_tasks(pruned(results).filter(pl.col("method") == "greedy"))
    return [
        f"At {mask['shots']} shots {mask['heads_removed']} of {model['layers'] * model['heads']} heads and "
        f"{mask['ffns_removed']} of {model['layers']} FFNs could be removed together, leaving "
        + ("a mean accuracy" if mask["task"] == AGGREGATE else f"an accuracy on {mask['task']}")
        + f" of {mask['value']:.3f}."
        for mask in searched.iter_rows(named=True)
    ]


def unit_findings(results: pl.DataFrame) -> list[str]:
    """Return a sentence per shot count on the units that cost most when removed alone."""
    findings = []
    held_out = held_out_tops(results, NAMED_UNITS).to_dicts()
    for (shots,), members in top_units(results, NAMED_UNITS).group_by("shots", maintain_order=True):
        units = members.to_dicts()
        named = ", ".join(
            f"{unit_name(unit['kind'], unit['layer'], unit['head'])} "
            f"({unit['value']:.2f}{significance_mark(unit)})"
            for unit in units
        )
        findings.append(
            f"At {shots} shots the costliest units to remove alone are {named}, in nats of gold "
            f"log-probability: {held_out_text(units, held_out)}; {PICKED}. {STAR}."
        )
    return findings
