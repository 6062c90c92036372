"""`lowmem-icl masks export`: a mask as units, as a checkpoint without them, or for other libraries."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowmem_icl.cli.echo import echo
from lowmem_icl.cli.errors import reports_errors
from lowmem_icl.cli.parameters import QuietOption
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskFile, read_mask
from lowmem_icl.options import did_you_mean, environment_options, run_options

if TYPE_CHECKING:
    from lowmem_icl.export.folder import ExportedFolder, Sizes

OneFile = Annotated[Path, typer.Argument(help="Mask file.", metavar="FILE", show_default=False)]
UNITS, CHECKPOINT = "units", "hf"
FILES = ("torch", "transformerlens", "nnsight")
FORMATS = (UNITS, CHECKPOINT, *FILES)


Form = Annotated[
    str,
    typer.Option(
        "--format",
        help="units: printed, one per line. hf: a checkpoint that transformers loads. torch: tensors of what "
        "is kept. transformerlens, nnsight: a Python file that removes the units there.",
        metavar="NAME",
        autocompletion=lambda incomplete: [name for name in FORMATS if name.startswith(incomplete)],
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="For hf: the weights, as a checkpoint folder, a .gguf file, a hub id or `demo`.",
        metavar="NAME",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder to write for hf, else the file.", metavar="PATH", show_default=False),
]


@reports_errors
def export(
    path: OneFile,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON: lists of [layer, head] and of layers; of hf the sizes.")
    ] = False,
    form: Form = UNITS,
    model: Source = None,
    revision: Revision = None,
    out: Out = None,
    structural: Annotated[
        bool,
        typer.Option(
            "--structural", help="With hf: layers and heads are gone where the architecture allows it."
        ),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a mask for other tools: its units, a checkpoint without them, or hooks of other libraries.

    lowmem-icl masks export mask.json --format hf --model demo --out without
    """
    _check(form, {"--model": model, "--revision": revision, "--structural": structural or None}, out)
    mask_file = read_mask(path)
    if form == UNITS:
        _print_units(mask_file, as_json=as_json)
        return
    assert out is not None, "checked above"
    if form == CHECKPOINT:
        _export_checkpoint(
            mask_file, (str(model), revision), out, structural=structural, shown=(as_json, quiet)
        )
        return
    if out.exists():
        raise InputError(f"--out {out} exists; choose another file")
    _writer(form)(mask_file, out)
    echo(str(out))


def _check(form: str, given: dict[str, Any], out: Path | None) -> None:
    """Raise InputError where the flags do not belong together."""
    if form not in FORMATS:
        raise InputError(
            f"--format: expected one of {', '.join(FORMATS)}, got '{form}'{did_you_mean(form, FORMATS)}"
        )
    if form != CHECKPOINT:
        for flag, value in given.items():
            if value is not None:
                raise InputError(f"{flag} belongs to --format hf, got --format {form}; leave it out")
    elif given["--model"] is None:
        raise InputError(
            "--model: expected where the weights are, since --format hf writes them; give a checkpoint "
            "folder, a .gguf file, a hub id or demo"
        )
    if (out is None) != (form == UNITS):
        hint = "leave it out" if form == UNITS else "say where to write"
        raise InputError(f"--out goes with every format but units, got --format {form}; {hint}")


def _print_units(mask_file: MaskFile, *, as_json: bool) -> None:
    mask = mask_file.mask
    if as_json:
        echo(json.dumps({"heads": sorted(map(list, mask.heads)), "ffns": sorted(mask.ffns)}))
        return
    for unit in mask.units():
        echo(str(unit))


def _writer(form: str) -> Callable[[MaskFile, Path], None]:
    from lowmem_icl.export import formats

    return {
        "torch": formats.write_keep_tensors,
        "transformerlens": formats.write_transformer_lens,
        "nnsight": formats.write_nnsight,
    }[form]


def _export_checkpoint(
    mask_file: MaskFile,
    source: tuple[str, str | None],
    out: Path,
    *,
    structural: bool,
    shown: tuple[bool, bool],
) -> None:
    """Write a checkpoint without a mask's units; print what it became, or its record as JSON."""
    from lowmem_icl.cli.terminal import Terminal
    from lowmem_icl.export.folder import export_folder, open_source

    as_json, quiet = shown
    terminal = Terminal(quiet)
    cache = run_options({}, None, environment_options()).resolved_store_dir
    with terminal.waiting(f"opening {source[0]}"):
        checkpoint = open_source(*source, cache, terminal.progress)
    said = list(checkpoint.notes)
    for note in said:
        terminal.say(note)
    made = export_folder(mask_file, checkpoint, out, structural=structural, progress=terminal.progress)
    for note in made.notes[len(said) :]:
        terminal.say(note)
    if as_json:
        echo(json.dumps(asdict(made) | {"folder": str(made.folder)}, indent=1))
    else:
        _show(made)


def _show(made: "ExportedFolder") -> None:
    from lowmem_icl.cli.terminal import size

    def told(sizes: "Sizes") -> str:
        return (
            f"{sizes.parameters:,} parameters, {size(sizes.size_bytes)}, {sizes.layers} layers of "
            f"{sizes.heads} heads"
        )

    echo(f"{made.folder}")
    echo(f"before: {told(made.before)}")
    echo(f"after:  {told(made.after)}")
    echo(f"zeros:  {made.zeroed_heads} heads and {made.zeroed_ffns} FFNs of these are there and do nothing")
