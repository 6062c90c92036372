"""From run folders to one page: sections in their order, and the numbers and code of its script."""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bokeh
import jinja2
from bokeh.embed import json_item

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.answer import Chip, answer
from lowmem_icl.report.findings.wording import task_text
from lowmem_icl.report.page.comparison import (
    common,
    comparison_data,
    comparison_sections,
    run_labels,
    shots_text,
)
from lowmem_icl.report.page.encoding import encode_bytes
from lowmem_icl.report.page.payload import payload
from lowmem_icl.report.page.section import Record, Section
from lowmem_icl.report.page.sections.accuracy import accuracy_section
from lowmem_icl.report.page.sections.agreement import agreement_section
from lowmem_icl.report.page.sections.given_masks import given_masks_section
from lowmem_icl.report.page.sections.icl_heads import icl_heads_section
from lowmem_icl.report.page.sections.induction import induction_section
from lowmem_icl.report.page.sections.labels import labels_section
from lowmem_icl.report.page.sections.masks import masks_section
from lowmem_icl.report.page.sections.method import method_section
from lowmem_icl.report.page.sections.patching import patching_section
from lowmem_icl.report.page.sections.pruning import pruning_section
from lowmem_icl.report.page.sections.units import atlas_section, map_section, ranking_section
from lowmem_icl.report.run_tables import RunTables
from lowmem_icl.system.files import write_text_atomic

MakeSection = Callable[[RunTables], Section | None]

# With the headings of docs/numbers.md that say what their numbers mean.
SECTIONS: dict[MakeSection, tuple[str, ...]] = {
    map_section: ("Drops", "Stars", "Importance"),
    atlas_section: (),
    ranking_section: ("Costliest units", "Stars"),
    given_masks_section: ("Intervals",),
    accuracy_section: ("Accuracy and log-probability", "At chance", "Intervals", "Means over tasks"),
    labels_section: ("Labels",),
    pruning_section: ("Curves and knees", "Random masks"),
    masks_section: ("The answer", "Greedy and certified masks"),
    patching_section: ("Patching", "Function vectors", "Stars"),
    induction_section: ("Induction heads", "Random masks"),
    icl_heads_section: ("Which heads carry learning in context", "Function vectors", "Induction heads"),
    agreement_section: ("Agreement of rankings",),
    method_section: (),
}
PNG = b"\x89PNG"
MOST_IMAGE_BYTES = 700_000
NO_IMAGES: Mapping[str, bytes] = MappingProxyType({})
SCRIPTS = ("data.js", "state.js", "map.js", "units.js", "curves.js", "main.js")


@dataclass(frozen=True)
class Page:
    """What the template shows: texts, sections, and the JSON and code for its script."""

    title: str
    lead: str
    sentences: Sequence[str]
    chips: Sequence[Chip]
    notes: Sequence[str]
    warnings: Sequence[str]
    failures: Sequence[str]
    sections: Sequence[Section]
    images: Mapping[str, str]
    """What stands in a plot's place without JavaScript: data URLs by the names of figures."""
    data: str
    plot_items: str
    library: str
    script: str
    style: str


def write_report(runs: Sequence[RunTables], page: Path, images: Mapping[str, bytes] = NO_IMAGES) -> None:
    """Write the page of one run, or of several compared.

    images: figures by name as PNG or SVG, for readers without JavaScript; if heavy the last are left out.
    """
    whole = run_page(runs[0], images) if len(runs) == 1 else comparison_page(runs)
    write_text_atomic(page, render(whole))


def run_page(run: RunTables, images: Mapping[str, bytes] = NO_IMAGES) -> Page:
    """Return what the page says of a run."""
    record = run.record
    found = answer(run.results, run.units, run.masks, record)
    sections = [
        replace(section, meaning=headings)
        for make, headings in SECTIONS.items()
        if (section := make(run)) is not None
    ]
    return Page(
        title=_title(run, sections),
        lead=_lead(run),
        sentences=found.sentences,
        chips=found.chips,
        notes=found.notes,
        warnings=record["warnings"],
        failures=[failure["sentence"] for failure in record.get("failures", [])],
        sections=sections,
        images=embedded(images),
        data=_json(payload(run)),
        **_script_of(sections),
    )


def embedded(images: Mapping[str, bytes]) -> dict[str, str]:
    """Return images as data URLs, the first ones up to MOST_IMAGE_BYTES in all."""
    found, left = {}, MOST_IMAGE_BYTES
    for name, content in images.items():
        left -= len(content)
        if left >= 0:
            kind = "png" if content.startswith(PNG) else "svg+xml"
            found[name] = f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")
    return found


def comparison_page(runs: Sequence[RunTables]) -> Page:
    """Return the page of several runs: what changed from the first to each other.

    Raises InputError where they have no task at a shot count in common.
    """
    settings = [task for task, _ in common(runs) if task != AGGREGATE]
    if not settings:
        raise InputError(
            f"report: expected runs with a task and a shot count in common, got none in "
            f"{', '.join(str(run.folder) for run in runs)}; give others, or make a page of each"
        )
    labels = run_labels(runs)
    sections = comparison_sections(runs)
    return Page(
        title=f"{' and '.join(labels)}, compared",
        lead=f"{len(settings)} {'setting' if len(settings) == 1 else 'settings'} (tasks at shot counts) in "
        "common; each run has a page of its own.",
        sentences=[
            f"{label}: {sentence}"
            for label, run in zip(labels, runs, strict=True)
            for sentence in answer(run.results, run.units, run.masks, run.record).sentences[:1]
        ],
        chips=[],
        notes=[],
        warnings=[
            f"{label}: {warning}"
            for label, run in zip(labels, runs, strict=True)
            for warning in run.record["warnings"]
        ],
        failures=[
            f"{label}: {failure['sentence']}"
            for label, run in zip(labels, runs, strict=True)
            for failure in run.record.get("failures", [])
        ],
        sections=sections,
        images={},
        data=_json(comparison_data(runs)),
        **_script_of(sections),
    )


def _script_of(sections: Sequence[Section]) -> dict[str, str]:
    """Return what the page needs to draw its sections."""
    plots = {plot.id: plot for section in sections for plot in section.plots}
    return {
        "plot_items": _json({name: json_item(plot.plot) for name, plot in plots.items()}),
        "library": _library(),
        "script": "\n".join(_asset(name) for name in SCRIPTS),
        "style": _asset("page.css"),
    }


def _title(run: RunTables, sections: Sequence[Section]) -> str:
    model = run.record["model"]
    name = f"{model['id']} in {model['weights']}"
    if any(section.id == "given-masks" for section in sections):
        return f"{name}: what masks cost"
    if not run.record["tasks"]:
        return f"{name}: what heads and FFNs carry from prompt to prompt"
    return f"{name}: which heads and FFNs does in-context learning need?"


def _lead(run: RunTables) -> str:
    model, tasks = run.record["model"], {task["task"] for task in run.record["tasks"]}
    given = [task for task, n_shots in run.settings if n_shots is None]
    named = [f"{len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}; {shots_text(run)} demonstrations"]
    named = (named if tasks else []) + ([f"prompts given: {', '.join(given)}"] if given else [])
    splits = (
        "Accuracies are measured on the evaluation split; importance, ablations and patches, and what masks "
        "are chosen by, on the training split. "
    )
    return (
        f"{'; '.join([_units_text(model), *named])}. {splits if tasks else ''}Bounds are 95 % intervals over "
        "documents."
    )


def _units_text(model: Record) -> str:
    return f"{model['layers']} layers of {model['heads']} heads and an FFN each"


def render(page: Page) -> str:
    """Return the page as HTML; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowmem_icl.report.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["task_text"] = task_text
    return environment.get_template("page.html.jinja").render(page=page)


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element whatever the names in it."""
    text = json.dumps(_without_nan(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _without_nan(value: Any) -> Any:
    """Return a value with null for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@cache
def _library() -> str:
    """Return Bokeh's script, deflated: the Python package brings it."""
    path = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
    return encode_bytes(path.read_bytes())


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text("utf-8")
