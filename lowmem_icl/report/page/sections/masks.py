"""The page's section on masks: what greedy searches keep, compared with masks of equal size, and transfer."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_icl.options import RunOptions, flag_name
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.circuits import kept_texts
from lowmem_icl.report.losses import SearchMask, greedy_losses, searches_without_certificate
from lowmem_icl.report.numbers import clean_accuracy, pruned
from lowmem_icl.report.page.plots.matrices import matrix_plot
from lowmem_icl.report.page.section import Record, Section, interval_text, number_text
from lowmem_icl.report.run_tables import RunTables, Setting

AXES = ("task judged", "mask of")
COMPARED = ("gradient", "random")
# Options that say on what a mask is judged, where they are not the defaults.
REPEATED = (
    "revision", "weights", "store_dir", "data_dir", "limit", "demonstrations", "demonstration_sets",
    "protocol", "bos", "seed",
)  # fmt: skip
TRANSFER_CAPTION = (
    "Greedy masks (rows) on every task (columns) at the chosen shot count, on the first documents that "
    "curves are judged on, so that the diagonal may differ from the table. The number is the accuracy gained "
    "or lost (-) against the clean model; its interval stands where the pointer is."
)


@dataclass(frozen=True)
class MaskRow:
    """What the page says of one greedy mask; accuracies as text."""

    task: str
    shots: int
    name: str
    removed: str
    kept: str
    clean: str
    greedy: str
    certified: str
    compared: Sequence[str]
    loss: str
    verdict: str
    command: str
    """Empty where the mask's file is not in the folder."""
    stands_alone: bool
    """Whether the file is there, and needs no table of means beside it."""


def masks_section(run: RunTables) -> Section | None:
    """Return what greedy masks keep and the accuracy they leave; None where nothing was searched."""
    if pruned(run.results).is_empty():
        return None
    options = run.record["options"]
    transferred = (run.results["procedure"] == "greedy-transfer").any()
    return Section(
        "masks",
        "Masks",
        f"Greedy layerwise masks that may lose {options['tolerance']:g} of {options['objective']} on the "
        "documents that they are searched on, compared with the lowest units by gradient and a random "
        "draw of equal size. Certified: the largest mask on a search's path that is shown, with 95 % "
        "confidence, to keep the tolerance, on training documents that the search did not see. All are "
        f"judged on the evaluation split; loss: of {options['objective']} there, paired with the clean "
        "model. The tolerance holds where the whole interval of the loss is within it, fails where none "
        "of it is."
        + replacement_note(run.record.get("greedy", []))
        + certificate_note(run.record),
        [matrix_plot("transfer", len(run.tasks), TRANSFER_CAPTION, (), AXES)] if transferred else [],
        data=list(mask_rows(run)),
    )  # fmt: skip


def mask_rows(run: RunTables) -> Iterator[MaskRow]:
    """Yield a row per greedy search, in the order of tasks and shot counts."""
    table, losses = pruned(run.results), greedy_losses(run.masks)
    by_mask = {(row["task"], row["shots"], row["method"]): row for row in table.iter_rows(named=True)}
    clean = {
        (row["task"], row["shots"]): row["value"] for row in clean_accuracy(run.results).iter_rows(named=True)
    }
    searched = [
        (task, shots)
        for task, shots in run.settings
        if shots is not None and (task, shots, "greedy") in by_mask
    ]
    kept = kept_texts(run.masks, run.record["model"])
    uncertified = searches_without_certificate(run.record)
    for setting in searched:
        row, loss = by_mask[*setting, "greedy"], losses.get(SearchMask(*setting, "greedy"))
        certified = by_mask.get((*setting, "certified"))
        yield MaskRow(
            *setting,
            name=row["mask"],
            removed=f"{row['heads_removed']}H {row['ffns_removed']}F",
            kept=kept.get(setting, ""),
            clean=number_text(clean.get(setting)),
            greedy=number_text(row["value"]),
            certified="none" if setting in uncertified else ""
            if certified is None else f"{certified['heads_removed']}H {certified['ffns_removed']}F",
            compared=[
                number_text(by_mask[*setting, method]["value"]) if (*setting, method) in by_mask else ""
                for method in COMPARED
            ],
            loss="" if loss is None else f"{number_text(loss.value)} {_in_brackets(loss.low, loss.high)}",
            verdict="" if loss is None else loss.verdict,
            command=_command(run, setting) if setting in run.greedy_masks else "",
            stands_alone=setting in run.greedy_masks and run.greedy_masks[setting].mask.fill is None,
        )  # fmt: skip


def _in_brackets(low: float | None, high: float | None) -> str:
    bounds = interval_text(low, high)
    return f"[{bounds.replace(' to ', ', ')}]" if bounds else ""


def _command(run: RunTables, setting: Setting) -> str:
    """Return the command that judges a mask as the run did: on the same documents of the same model."""
    path, options = f"{run.greedy_masks[setting].name}.json", run.record["options"]
    task, shots = setting
    named = options.get("tasks") or ()
    if task != AGGREGATE:
        # A file is known by its name, and found by its path.
        named = [given for given in named if Path(given).name == task] or [task]
    words = ["lowmem-icl", "evaluate", "--mask", str(path)]
    words += ["--model", options.get("model") or run.record["model"]["id"]]
    words += [*(["--tasks", ",".join(named)] if named else []), "--shots", str(shots)]
    for name in REPEATED:
        value = options.get(name)
        if value is not None and value != RunOptions.model_fields[name].default:
            no_value = isinstance(value, bool)
            flag = flag_name(name)
            words.append(flag.replace("--", "--no-", 1) if value is False else flag)
            words += [] if no_value else [str(value)]
    return shlex.join(words)


def certificate_note(record: Record) -> str:
    """Return for which of the searches that were tested nothing is certified."""
    empty = [f"{task} at {shots}" for task, shots in sorted(searches_without_certificate(record))]
    return f" No mask is certified for {', '.join(empty)} shots." if empty else ""


def replacement_note(losses: Sequence[Mapping[str, Any]]) -> str:
    """Return for which searches the gradient ranking's mask of equal size was better and is returned instead.

    losses: what run.json says of the greedy searches and of the masks compared with them.
    """
    by_search = {(loss["task"], loss["shots"], loss["method"]): loss["check_loss"] for loss in losses}
    replaced = [
        f"{task} at {shots}"
        for (task, shots, method), lost in by_search.items()
        if method == "greedy" and by_search.get((task, shots, "gradient"), lost) < lost
    ]
    if not replaced:
        return ""
    return (
        " The gradient ranking's mask of equal size lost less on the checking half, and is returned "
        f"instead, for {', '.join(replaced)} shots."
    )
