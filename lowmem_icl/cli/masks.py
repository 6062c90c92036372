"""`lowmem-icl masks`: look at mask files, compare and combine them, write them out for other tools."""

import json
import operator
import re
from collections.abc import Callable
from enum import StrEnum
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_icl.cli.errors import reports_errors
from lowmem_icl.cli.parameters import JsonOption
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import NAME_PATTERN, MaskFile, read_mask, write_mask
from lowmem_icl.masks.mask import Mask, all_ffns, all_heads, jaccard
from lowmem_icl.report.wording import units_text

masks_app = typer.Typer(
    no_args_is_help=True,
    help="List, show, compare, combine and export mask files.",
    pretty_exceptions_enable=False,
)

OneFile = Annotated[Path, typer.Argument(help="Mask file.", show_default=False)]
Files = Annotated[list[Path], typer.Argument(help="Mask files.", show_default=False)]


class Operation(StrEnum):
    """Ways to make one mask of several."""

    union = "union"
    intersection = "intersection"
    difference = "difference"


OPERATIONS: dict[Operation, Callable[[Mask, Mask], Mask]] = {
    Operation.union: operator.or_,
    Operation.intersection: operator.and_,
    Operation.difference: operator.sub,
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
    }


@masks_app.command("list")
@reports_errors
def list_masks(
    folder: Annotated[Path, typer.Argument(help="Folder of mask files.")] = Path("masks"),
    as_json: JsonOption = False,
) -> None:
    """List the masks of a folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that holds mask files")
    paths = sorted(path for path in folder.glob("*.json") if path.name != "schema.json")
    masks = [_summary(path, read_mask(path)) for path in paths]
    if as_json:
        typer.echo(json.dumps(masks, indent=1))
        return
    rows = [
        (
            mask["name"],
            mask["method"],
            f"{mask['heads_removed']}/{mask['model_heads']}",
            f"{mask['ffns_removed']}/{mask['model_ffns']}",
            mask["model"],
        )
        for mask in masks
    ]
    _print_table(("name", "method", "heads removed", "FFNs removed", "model"), rows)


@masks_app.command()
@reports_errors
def show(path: OneFile) -> None:
    """Draw a mask: a line per layer, x for a removed head, and whether the FFN is removed."""
    mask_file = read_mask(path)
    for name, value in _summary(path, mask_file).items():
        typer.echo(f"{name}: {value}")
    typer.echo(f"kept: {_kept_text(mask_file)}")
    for layer in range(mask_file.model.layers - 1, -1, -1):
        removed = mask_file.mask.heads_in(layer)
        heads = "".join("x" if head in removed else "." for head in range(mask_file.model.heads))
        ffn = " FFN removed" if layer in mask_file.mask.ffns else ""
        typer.echo(f"L{layer:<3} {heads}{ffn}")


def _kept_text(mask_file: MaskFile) -> str:
    model, removed = mask_file.model, set(mask_file.mask.units())
    units = [*all_heads(model.layers, model.heads), *all_ffns(model.layers)]
    return units_text([str(unit) for unit in units if unit not in removed])


@masks_app.command()
@reports_errors
def compare(paths: Files, as_json: JsonOption = False) -> None:
    """Compare every pair: units in both, in one only, and their Jaccard index."""
    if len(paths) < 2:
        raise InputError(f"masks compare: expected two files or more, got {len(paths)}; add another")
    pairs = [
        {
            "left": left.name,
            "right": right.name,
            "both": len(left.mask & right.mask),
            "only_left": len(left.mask - right.mask),
            "only_right": len(right.mask - left.mask),
            "jaccard": jaccard(left.mask, right.mask),
        }
        for left, right in combinations([read_mask(path) for path in paths], 2)
    ]
    if as_json:
        typer.echo(json.dumps(pairs, indent=1))
        return
    rows = [(*list(pair.values())[:-1], f"{pair['jaccard']:.3f}") for pair in pairs]
    _print_table(("left", "right", "in both", "only left", "only right", "Jaccard"), rows)


@masks_app.command()
@reports_errors
def combine(
    paths: Files,
    out: Annotated[
        Path, typer.Option(help="File of the new mask; its stem is the name.", show_default=False)
    ],
    operation: Annotated[
        Operation, typer.Option(help="Removed in any, in all, or in the first only.")
    ] = Operation.union,
) -> None:
    """Make one mask of several for the same shape of model."""
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
    mask = reduce(OPERATIONS[operation], [mask_file.mask for mask_file in masks])
    made = {"method": str(operation), "from": [mask_file.name for mask_file in masks]}
    write_mask(out, MaskFile(out.stem, mask, masks[0].model, made))
    typer.echo(f"{out}: {len(mask.heads)} heads and {len(mask.ffns)} FFNs removed")


@masks_app.command()
@reports_errors
def export(
    path: OneFile,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lists of [layer, head] and of layers.")
    ] = False,
) -> None:
    """Print the removed units for other tools: one per line, or as JSON."""
    mask = read_mask(path).mask
    if as_json:
        typer.echo(json.dumps({"heads": sorted(map(list, mask.heads)), "ffns": sorted(mask.ffns)}))
        return
    for unit in mask.units():
        typer.echo(str(unit))


def _print_table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.table import Table

    from lowmem_icl.cli.terminal import plain_console

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    plain_console().print(table)
