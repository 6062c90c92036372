"""`lowmem-icl masks`: look at mask files, compare and combine them; `mask_export` and `mask_hub` add more."""

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_icl.cli.commands import Group as Commands
from lowmem_icl.cli.commands import command_of
from lowmem_icl.cli.echo import echo
from lowmem_icl.cli.errors import reports_errors
from lowmem_icl.cli.mask_export import OneFile, export
from lowmem_icl.cli.mask_hub import pull, push
from lowmem_icl.cli.parameters import JsonOption
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import NAME_PATTERN, MaskFile, masks_in, read_mask, write_mask
from lowmem_icl.masks.mask import Mask, all_ffns, all_heads, jaccard
from lowmem_icl.options import did_you_mean
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.wording import units_text

masks_app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    help="List, show, compare, combine, export, push and pull mask files.",
    pretty_exceptions_enable=False,
)

Files = Annotated[list[Path], typer.Argument(help="Mask files.", metavar="FILE", show_default=False)]
FilesOrFolders = Annotated[
    list[Path], typer.Argument(help="Mask files, or folders of them.", metavar="PATH", show_default=False)
]
MOST_PAIRS = 50
"""Of more pairs than these a comparison prints those most alike."""

OPERATIONS: dict[str, Callable[[Mask, Mask], Mask]] = {
    "union": operator.or_,
    "intersection": operator.and_,
    "difference": operator.sub,
}


def _summary(path: Path, mask_file: MaskFile) -> dict[str, Any]:
    model = mask_file.model
    return {
        "file": str(path),
        "name": mask_file.name,
        "method": mask_file.made.get("method"),
        "tasks": mask_file.made.get("tasks", []),
        "shots": mask_file.made.get("shots", []),
        "heads_removed": len(mask_file.mask.heads),
        "model_heads": model.layers * model.heads,
        "ffns_removed": len(mask_file.mask.ffns),
        "model_ffns": model.layers,
        "model": model.id,
        "ablation": mask_file.mask.ablation,
        **_accuracies(mask_file.scores),
    }


def _accuracies(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy without and with a mask, null where its file does not say, and the verdict."""
    sides = {"before": scores.get("acc_clean"), "after": scores.get("acc")}
    for side in sides:
        if isinstance(told := scores.get(side), dict):
            sides[side] = next((told[metric] for metric in ("acc", "em") if metric in told), None)
    known = {
        f"accuracy_{side}": value if isinstance(value, int | float) else None for side, value in sides.items()
    }
    return known | {"verdict": scores.get("verdict")}


@command_of(masks_app, "list")
@reports_errors
def list_masks(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of mask files, or a run folder.", metavar="FOLDER", show_default=True),
    ] = Path("masks"),
    task: Annotated[
        str | None,
        typer.Option(
            help="Only masks made for this task, or with aggregate those for several.",
            metavar="TASK",
            show_default=False,
        ),
    ] = None,
    shots: Annotated[
        str | None, typer.Option(help="Only masks made at so many shots.", metavar="N", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Only masks made in this way.", metavar="NAME", show_default=False)
    ] = None,
    with_empty: Annotated[
        bool, typer.Option("--all", help="Also masks that remove nothing, which --json lists anyway.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the masks of a folder: what they remove, what for, and the accuracy they leave.

    lowmem-icl masks list runs/demo-1ba4e60239fc --method greedy --task recall
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder here; give a run's folder, or one of mask files")
    masks = [_summary(path, read_mask(path)) for path in _in_order(masks_in(folder))]
    if not masks:
        raise InputError(f"{folder} holds no mask files; give a run's folder, or one of mask files")
    wanted = {"--task": ("tasks", task), "--shots": ("shots", shots), "--method": ("method", method)}
    for flag, (field, value) in wanted.items():
        if value is not None:
            masks = _only(masks, flag, field, value)
    if as_json:
        echo(json.dumps(masks, indent=1))
    else:
        _show_list(masks, with_empty=with_empty)


def _only(masks: list[dict[str, Any]], flag: str, field: str, value: str) -> list[dict[str, Any]]:
    """Return the masks with a value; raise InputError where none has it."""

    def values(mask: dict[str, Any]) -> list[str]:
        held = mask[field]
        if field == "tasks" and len(held) > 1:
            return [AGGREGATE]
        return [str(item) for item in (held if isinstance(held, list) else [held])]

    found = [mask for mask in masks if value in values(mask)]
    if not found:
        known = list(dict.fromkeys(each for mask in masks for each in values(mask)))
        hint = did_you_mean(value, known) or f"; expected one of {', '.join(known)}"
        raise InputError(f"{flag}: no mask has '{value}'{hint}")
    return found


def _show_list(masks: list[dict[str, Any]], *, with_empty: bool) -> None:
    from lowmem_icl.cli.mask_tables import print_list

    removing = [mask for mask in masks if mask["heads_removed"] + mask["ffns_removed"]]
    listed = masks if with_empty else removing
    if listed:
        print_list(listed)
    for model, mask in {mask["model"]: mask for mask in listed}.items():
        heads, ffns = mask["model_heads"], mask["model_ffns"]
        count = sum(each["model"] == model for each in listed)
        many = "mask" if count == 1 else "masks"
        echo(f"{count} {many} of {model}, which has {heads} heads (H) and {ffns} FFNs (F)")
    if len(listed) < len(masks):
        empty = len(masks) - len(listed)
        if empty == 1:
            echo("1 mask that removes nothing is left out; --all lists it")
        else:
            echo(f"{empty} masks that remove nothing are left out; --all lists them")


@command_of(masks_app)
@reports_errors
def show(path: OneFile) -> None:
    """Draw a mask: a line per layer, x for a removed head, and whether the FFN is removed."""
    mask_file = read_mask(path)
    for name, value in _words(_summary(path, mask_file)).items():
        if value:
            echo(f"{name}: {value}")
    echo(f"kept: {_kept_text(mask_file)}")
    for layer in range(mask_file.model.layers - 1, -1, -1):
        removed = mask_file.mask.heads_in(layer)
        heads = "".join("x" if head in removed else "." for head in range(mask_file.model.heads))
        ffn = " FFN removed" if layer in mask_file.mask.ffns else ""
        echo(f"L{layer:<3} {heads}{ffn}")


def _words(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return what is known of a mask as texts, empty where it is not known."""
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    accuracy = [] if after is None else [f"{after:.3f} under the mask"]
    return {
        "file": summary["file"],
        "name": summary["name"],
        "method": summary["method"] or "",
        "tasks": ", ".join(summary["tasks"]),
        "shots": ", ".join(map(str, summary["shots"])),
        "removed": f"{summary['heads_removed']} of {summary['model_heads']} heads, "
        f"{summary['ffns_removed']} of {summary['model_ffns']} FFNs",
        "model": summary["model"],
        "accuracy": ", ".join([*accuracy, *([] if before is None else [f"{before:.3f} clean"])]),
        "verdict": summary["verdict"] or "",
    }


def _kept_text(mask_file: MaskFile) -> str:
    model, removed = mask_file.model, set(mask_file.mask.units())
    units = [*all_heads(model.layers, model.heads), *all_ffns(model.layers)]
    return units_text([str(unit) for unit in units if unit not in removed])


@command_of(masks_app)
@reports_errors
def compare(paths: FilesOrFolders, as_json: JsonOption = False) -> None:
    """Compare every pair: units removed in both, in one only, and their Jaccard index.

    lowmem-icl masks compare masks/demo/greedy-re*-16shot.json
    """
    masks = [mask_file for path in paths for mask_file in _masks_of(path)]
    if len(masks) < 2:
        raise InputError(f"masks compare: expected two masks or more, got {len(masks)}; add another")
    pairs = [
        {
            "left": left.name,
            "right": right.name,
            "both": len(left.mask & right.mask),
            "only_left": len(left.mask - right.mask),
            "only_right": len(right.mask - left.mask),
            "jaccard": jaccard(left.mask, right.mask),
        }
        for left, right in combinations(masks, 2)
    ]
    if as_json:
        echo(json.dumps(pairs, indent=1))
        return
    from lowmem_icl.cli.mask_tables import print_table

    shown = pairs
    if len(pairs) > MOST_PAIRS:
        shown = sorted(pairs, key=itemgetter("jaccard"), reverse=True)[:MOST_PAIRS]
    rows = [
        (
            f"{pair['left']}\n{pair['right']}",
            f"{pair['both']}",
            f"{pair['only_left']}\n{pair['only_right']}",
            f"{pair['jaccard']:.3f}",
        )
        for pair in shown
    ]
    print_table(("masks", "in both", "in one only", "Jaccard"), rows)
    if len(shown) < len(pairs):
        echo(f"the {len(shown)} pairs most alike of {len(pairs):,}; --json prints all")


def _masks_of(path: Path) -> list[MaskFile]:
    """Return a mask, or those of a folder that remove anything."""
    if not path.is_dir():
        return [read_mask(path)]
    found = [read_mask(each) for each in _in_order(masks_in(path))]
    if not found:
        raise InputError(f"{path} holds no mask files; give a run's folder")
    return [mask_file for mask_file in found if mask_file.mask]


def _in_order(paths: Sequence[Path]) -> list[Path]:
    """Return files by their names, numbers in these by size: 4shot before 16shot."""

    def pieces(path: Path) -> list[str | int]:
        # Digits alone, which alternate with text, so that like is compared with like.
        return [
            int(piece) if number % 2 else piece
            for number, piece in enumerate(re.split(r"([0-9]+)", str(path)))
        ]

    return sorted(paths, key=pieces)


@command_of(masks_app)
@reports_errors
def combine(
    paths: Files,
    out: Annotated[
        Path,
        typer.Option(help="File of the new mask; its stem is the name.", metavar="FILE", show_default=False),
    ],
    operation: Annotated[
        str,
        typer.Option(
            help="union, intersection or difference: removed in any, in all, or in the first only.",
            metavar="NAME",
            autocompletion=lambda incomplete: [name for name in OPERATIONS if name.startswith(incomplete)],
        ),
    ] = "union",
) -> None:
    """Make one mask of several for the same shape of model.

    lowmem-icl masks combine one.json two.json --out both.json
    """
    if operation not in OPERATIONS:
        hint = did_you_mean(operation, OPERATIONS)
        raise InputError(f"--operation: expected one of {', '.join(OPERATIONS)}, got '{operation}'{hint}")
    if out.suffix != ".json" or not re.fullmatch(NAME_PATTERN, out.stem):
        raise InputError(
            f"--out {out}: expected NAME.json, NAME of at most 200 letters, digits and . _ + - and beginning "
            "with a letter or digit; choose another name"
        )
    if out.exists():
        raise InputError(f"--out {out} exists; choose another file")
    masks = [read_mask(path) for path in paths]
    for path, mask_file in zip(paths, masks, strict=True):
        if mask_file.model.shape != masks[0].model.shape:
            raise InputError(
                f"masks combine: {path} and {paths[0]} are for models of different shapes; leave one out"
            )
        if mask_file.mask.fill != masks[0].mask.fill:
            raise InputError(
                f"masks combine: {path} and {paths[0]} put other things in place of what they remove "
                f"({mask_file.mask.ablation}, {masks[0].mask.ablation}); leave one out"
            )
    mask = reduce(OPERATIONS[operation], [mask_file.mask for mask_file in masks])
    made = {"method": operation, "from": [mask_file.name for mask_file in masks]}
    write_mask(out, MaskFile(out.stem, mask, masks[0].model, made, means=masks[0].means))
    echo(f"{out}: {len(mask.heads)} heads and {len(mask.ffns)} FFNs removed")


command_of(masks_app)(export)
command_of(masks_app)(push)
command_of(masks_app)(pull)
