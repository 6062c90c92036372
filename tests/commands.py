"""The command line as tests call it: in this process, where a process of its own is not the point."""

import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from lowmem_icl.cli.app import app
from lowmem_icl.masks.files import MaskFile, MaskModel, write_mask
from lowmem_icl.masks.mask import Mask

# Measures the machine for a moment, not for two seconds: no result depends on it.
HASTE = "from lowmem_icl.planning import measure; measure.LAYER_SECONDS = measure.OTHER_SECONDS = 0.02"
# Ends with a page without figures, as `undrawn_runs` does.
UNDRAWN = (
    "from lowmem_icl import runner; from lowmem_icl.report.files import publish_run; "
    "runner._write_page = lambda folder, state: publish_run(folder, ends_as=state, with_figures=False)"
)
# The command line in a process of its own, whatever is installed beside this interpreter.
PROCESS = (sys.executable, "-c", f"{HASTE}; from lowmem_icl.cli.app import app; app()")
SMALL = ("--tasks", "recall,knowledge", "--shots", "0,4", "--limit", "16", "--train-limit", "8")

# A name that would be markup, were it not escaped.
NAME = "[v2] a [/b] [bold] :smile: {x}"


def invoke(*arguments: object) -> Result:
    """Run `lowmem-icl` with these arguments and return its exit code and output."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_small(out: Path, stores: Path, *more: object) -> Result:
    """Run the demo, cut to what takes seconds, into the folder `out`."""
    return invoke("run", *SMALL, "--store-dir", stores, "--out", out, "--quiet", *more)


def invoke_wide(*arguments: object) -> Result:
    """Run `lowmem-icl` in a terminal that cuts nothing."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def write_masks(folder: Path) -> tuple[Path, Path]:
    """Write two masks of a small model, whose names are NAME, and return their files."""
    model = MaskModel(id=NAME, model_type="opt", layers=2, heads=3, digest="d")
    masks = {"left": Mask(frozenset({(0, 1), (1, 2)})), "right": Mask(frozenset({(0, 1)}), frozenset({1}))}
    for name, mask in masks.items():
        write_mask(folder / f"{name}.json", MaskFile(name, mask, model, {"method": NAME}))
    return folder / "left.json", folder / "right.json"
