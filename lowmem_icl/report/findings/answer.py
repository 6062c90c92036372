"""The answer of a run in up to three sentences, with what a reader needs to judge them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.above_chance import Settings, settings_of
from lowmem_icl.report.findings.circuits import circuit_sentence, removable_sentence
from lowmem_icl.report.findings.given_masks import given_mask_sentences
from lowmem_icl.report.findings.headline import MATTERS, units_sentence
from lowmem_icl.report.findings.patching import MEANS, patch_sentence, patched_units
from lowmem_icl.report.findings.removal import removal_sentence
from lowmem_icl.report.findings.wording import listed, setting_text, span_text
from lowmem_icl.report.numbers import clean_accuracy

Level = Literal["plain", "warning"]
Record = Mapping[str, Any]
MOST_SENTENCES = 3
IN_PLACE = {"mean": "their mean output", "resample": "another document's output"}
MOST_SETTINGS_NAMED = 4


@dataclass(frozen=True)
class Chip:
    """A short fact beside the answer: what it is of, and whether it calls for caution."""

    label: str
    value: str
    level: Level = "plain"


@dataclass(frozen=True)
class Answer:
    """What a run has found: up to three sentences, facts beside them, and notes on what they rest on."""

    sentences: tuple[str, ...]
    chips: tuple[Chip, ...]
    notes: tuple[str, ...]


def answer(results: pl.DataFrame, units: pl.DataFrame, masks: pl.DataFrame, record: Record) -> Answer:
    """Return the answer of a run from its tables and its run.json.

    First the smallest circuit that keeps a task, then what induction heads are for, then how much can go;
    where one of them was not measured, which units matter, which restore and break the right answer when
    patched, and how well the clean model does stand in its place.
    Settings at chance have no part in any of it.
    """
    settings = settings_of(results, masks)
    return Answer(
        tuple(_sentences(results, units, masks, record, settings)),
        tuple(_chips(results, units, record, settings)),
        tuple(_notes(units, record, settings)),
    )


def _sentences(
    results: pl.DataFrame, units: pl.DataFrame, masks: pl.DataFrame, record: Record, settings: Settings
) -> list[str]:
    if settings.every and not settings.above:
        return [
            f"The clean model is at chance in {_all_text(len(settings.every))}: it does no better than "
            "guessing, so there is nothing that a mask could keep, and removing units shows nothing."
        ]
    given = given_mask_sentences(results, masks, settings, MOST_SENTENCES)
    if given:
        return given
    found = [
        circuit_sentence(masks, units, settings, record),
        removal_sentence(results, masks, settings),
        removable_sentence(results, masks, settings, record),
    ]
    instead = [
        units_sentence(units, settings),
        patch_sentence(units, settings),
        _accuracy_sentence(results, settings),
    ]
    said = [sentence for sentence in found if sentence]
    return [*said, *(sentence for sentence in instead if sentence)][:MOST_SENTENCES]


def _all_text(count: int) -> str:
    return "the only setting" if count == 1 else f"all {count} settings (tasks at shot counts)"


def _accuracy_sentence(results: pl.DataFrame, settings: Settings) -> str:
    """Return how many settings are above chance, and which tasks demonstrations teach."""
    accuracies = clean_accuracy(results).filter(pl.col("task") != AGGREGATE)
    values = {(row["task"], row["shots"]): row["value"] for row in accuracies.iter_rows(named=True)}
    if not values:
        return ""
    above = sum(setting in values for setting in settings.above)
    where = "the only setting" if len(values) == 1 else f"{above} of {len(values)} settings"
    text = f"The clean model is above chance in {where}"
    rises = {
        task: (values[task, 0], max(values[name, shots] for name, shots in settings.credible if name == task))
        for task, _ in sorted(settings.credible)
        if (task, 0) in values
    }
    if rises:
        named = [f"{task} ({low:.3f} to {high:.3f})" for task, (low, high) in rises.items()]
        shown = named if len(named) <= MOST_SETTINGS_NAMED else [*named[:MOST_SETTINGS_NAMED], "others"]
        text += f"; demonstrations credibly raise {listed(shown)}"
    return f"{text}."


def _chips(results: pl.DataFrame, units: pl.DataFrame, record: Record, settings: Settings) -> Iterator[Chip]:
    accuracies = clean_accuracy(results).filter(pl.col("task") != AGGREGATE)
    if len(accuracies):
        yield Chip("documents per task", _numbers_text(accuracies["documents"].to_list()))
        known = accuracies["chance"].drop_nulls().to_list()
        if known:
            yield Chip("chance", span_text(known, "{:.2f}".format))
    drops = units.filter(pl.col("drop").is_not_null() & (pl.col("task") != AGGREGATE))
    if len(drops):
        share = 100 * float(drops["exact"].cast(pl.Float64).to_numpy().mean())
        # 99.9 % must not read as all.
        exact = "all" if drops["exact"].all() else f"{min(share, 99.9):.1f} %"
        yield Chip("drops measured exactly", exact, "plain" if drops["exact"].all() else "warning")
    if settings.every:
        count = len(settings.every) - len(settings.above)
        unknown = len(set(settings.every) - settings.known)
        level: Level = "warning" if count or unknown else "plain"
        text = f"{count} of {len(settings.every)}" + (f", {unknown} unknown" if unknown else "")
        yield Chip("settings at chance", text, level)
    ablation = record["options"].get("ablation", "zero")
    if ablation in IN_PLACE:
        yield Chip("in removed units' place", IN_PLACE[ablation])
    if record["options"]["protocol"] != "corrected":
        yield Chip("protocol", record["options"]["protocol"], "warning")
    if record["state"] != "finished":
        yield Chip("run", record["state"], "warning")
    if failures := len(record.get("failures", [])):
        yield Chip("failed", str(failures), "warning")
    warnings = len(record["warnings"])
    yield Chip("warnings", str(warnings), "warning" if warnings else "plain")


def _numbers_text(counts: Sequence[int]) -> str:
    return span_text(counts, "{:,}".format)


def _notes(units: pl.DataFrame, record: Record, settings: Settings) -> Iterator[str]:
    at_chance = [setting for setting in settings.every if setting in settings.at_chance]
    if at_chance:
        named = [setting_text(*setting) for setting in at_chance[:MOST_SETTINGS_NAMED]]
        more = len(at_chance) - len(named)
        also = [f"{more} more"] if more else []
        left_out = "is" if len(at_chance) == 1 else "are"
        yield (
            f"{len(at_chance)} of {len(settings.every)} settings {left_out} at chance and left out of these "
            f"sentences and their means: {'; '.join([*named, *also])}."
        )
    unknown = [setting for setting in settings.every if setting not in settings.known]
    if unknown:
        yield (
            f"In {len(unknown)} of {len(settings.every)} settings the clean model was not evaluated; they "
            "count as above chance, and need not be."
        )
    drops = units.filter(pl.col("drop").is_not_null())
    if not settings.above:
        drops = drops.clear()
    if len(drops) and drops["q_value"].null_count() < len(drops):
        yield f"{MATTERS[0].upper()}{MATTERS[1:]}."
    if len(patched_units(units)):
        yield f"{MEANS[0].upper()}{MEANS[1:]}."
    if len(drops) and not drops["exact"].all():
        yield "Drops that screening left out are estimates to first order, without interval or significance."
    if record["options"]["protocol"] != "corrected":
        yield (
            f"Protocol {record['options']['protocol']}: the choices of the paper's code, some of which are "
            "errors; for comparison with its figures."
        )
