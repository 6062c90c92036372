"""`lowmem-icl masks`: look at mask files, compare and combine them, write them out for other tools."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lowmem_icl.errors import InputError, LowmemIclError
from lowmem_icl.masks.files import MaskFile, read_mask, write_mask
from lowmem_icl.masks.mask import Mask, jaccard

masks_app = typer.Typer(
    no_args_is_help=True,
    help="List, show, compare, combine and export mask files.",
    pretty_exceptions_enable=False,
)

Files = Annotated[list[Path], typer.Argument(help="Mask files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Operation(StrEnum):
    """Ways to make one mask of several."""

    union = "union"
    intersection = "intersection"
    difference = "difference"


def _read(path: Path) -> MaskFile:
    try:
        return read_mask(path)
    except LowmemIclError as error:
        typer.echo(f"lowmem-icl: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


def _stop(error: InputError) -> None:
    typer.echo(f"lowmem-icl: {error}", err=True)
    raise typer.Exit(error.exit_code)


def _line(path: Path, mask_file: MaskFile) -> dict[str, object]:
    model = mask_file.model
    return {
        "file": str(path),
        "name": mask_file.name,
        "method": mask_file.made.get("method"),
        "tasks": mask_file.made.get("tasks", []),
        "shots": mask_file.made.get("shots", []),
        "heads_removed": len(mask_file.mask.heads),
        "of_heads": model.layers * model.heads,
        "ffns_removed": len(mask_file.mask.ffns),
        "of_ffns": model.layers,
        "model": model.id,
    }


@masks_app.command("list")
def list_masks(
    folder: Annotated[Path, typer.Argument(help="Folder of mask files.")] = Path("masks"),
    as_json: JsonOption = False,
) -> None:
    """List the masks of a folder."""
    if not folder.is_dir():
        _stop(InputError(f"{folder} is no folder; give one that holds mask files"))
    lines = [_line(path, _read(path)) for path in sorted(folder.glob("*.json")) if path.name != "schema.json"]
    if as_json:
        typer.echo(json.dumps(lines, indent=1))
        return
    table = Table()
    for column in ("name", "method", "heads", "FFNs", "model"):
        table.add_column(column)
    for line in lines:
        table.add_row(
            str(line["name"]),
            str(line["method"]),
            f"{line['heads_removed']}/{line['of_heads']}",
            f"{line['ffns_removed']}/{line['of_ffns']}",
            str(line["model"]),
        )
    Console().print(table)


@masks_app.command()
def show(path: Annotated[Path, typer.Argument(help="Mask file.")]) -> None:
    """Draw a mask: a line a layer, x for a removed head, and whether the FFN is removed."""
    mask_file = _read(path)
    for name, value in _line(path, mask_file).items():
        typer.echo(f"{name}: {value}")
    for layer in range(mask_file.model.layers - 1, -1, -1):
        removed = mask_file.mask.heads_in(layer)
        drawn = "".join("x" if head in removed else "." for head in range(mask_file.model.heads))
        typer.echo(f"L{layer:<3} {drawn} {'FFN removed' if layer in mask_file.mask.ffns else ''}".rstrip())


@masks_app.command()
def compare(paths: Files, as_json: JsonOption = False) -> None:
    """Compare every pair: units in both, in one only, and their Jaccard index."""
    read = [_read(path) for path in paths]
    if len(read) < 2:
        _stop(InputError("masks compare: expected at least two files"))
    pairs = [
        {
            "one": one.name,
            "other": other.name,
            "both": len(one.mask & other.mask),
            "only_one": len(one.mask - other.mask),
            "only_other": len(other.mask - one.mask),
            "jaccard": jaccard(one.mask, other.mask),
        }
        for place, one in enumerate(read)
        for other in read[place + 1 :]
    ]
    if as_json:
        typer.echo(json.dumps(pairs, indent=1))
        return
    table = Table(*pairs[0])
    for pair in pairs:
        table.add_row(
            *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in pair.values())
        )
    Console().print(table)


@masks_app.command()
def combine(
    paths: Files,
    out: Annotated[Path, typer.Option(help="File of the new mask; its stem is the name.")],
    operation: Annotated[
        Operation, typer.Option(help="Removed in any, in all, or in the first only.")
    ] = Operation.union,
) -> None:
    """Make one mask of several for the same shape of model."""
    read = [_read(path) for path in paths]
    if any(other.model.shape != read[0].model.shape for other in read):
        _stop(InputError("masks combine: the masks are for models of different shapes"))
    if out.exists():
        _stop(InputError(f"--out {out} exists; choose another file"))
    mask: Mask = read[0].mask
    for other in read[1:]:
        if operation is Operation.union:
            mask = mask | other.mask
        elif operation is Operation.intersection:
            mask = mask & other.mask
        else:
            mask = mask - other.mask
    made = {"method": str(operation), "from": [mask_file.name for mask_file in read]}
    write_mask(out, MaskFile(out.stem, mask, read[0].model, made))
    typer.echo(f"{out}: {len(mask.heads)} heads and {len(mask.ffns)} FFNs removed")


@masks_app.command()
def export(
    path: Annotated[Path, typer.Argument(help="Mask file.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lists of [layer, head] and of layers.")
    ] = False,
) -> None:
    """Print the removed units for other tools: a unit a line, or JSON."""
    mask = _read(path).mask
    if as_json:
        typer.echo(json.dumps({"heads": sorted(map(list, mask.heads)), "ffns": sorted(mask.ffns)}))
        return
    for unit in mask.units():
        typer.echo(str(unit))
