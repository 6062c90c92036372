"""A run from the command line: done, or found finished, which is said without opening anything again."""

from collections.abc import Mapping
from pathlib import Path

import typer

from lowmem_icl.cli.echo import complain
from lowmem_icl.cli.terminal import Terminal
from lowmem_icl.errors import NotFinite
from lowmem_icl.masks.files import MaskFile
from lowmem_icl.options import RunOptions
from lowmem_icl.session.finished import finished_record
from lowmem_icl.session.identity import folder_beside, run_folder
from lowmem_icl.session.record import run_record
from lowmem_icl.tracking.catalogue import check_installed


def finish_or_find(
    options: RunOptions,
    terminal: Terminal,
    mask_files: Mapping[str, MaskFile] | None = None,
    *,
    fresh: bool = False,
) -> Path:
    """Run what the options ask for, unless that is finished already; return the run's folder.

    fresh: begin anew in a folder beside the one that they have.
    """
    if fresh:
        options = options.model_copy(update={"out": folder_beside(run_folder(options))})
        terminal.say(f"a fresh run in {options.out}, which --out {options.out} continues")
    check_installed(options.track)
    masks = {name: mask_file.mask for name, mask_file in (mask_files or {}).items()}
    record = finished_record(options, masks)
    if record is not None:
        folder = run_folder(options)
        date, time = record["finished"][:10], record["finished"][11:16]
        terminal.say(f"finished on {date} at {time} UTC; tables, masks and report.html in {folder}")
        return folder
    # Imports torch and transformers.
    with terminal.waiting("loading libraries"):
        from lowmem_icl.cli.audience import audience_of
        from lowmem_icl.runner import run

    return run(options, audience_of(terminal), mask_files).folder


def end_as_finished(folder: Path) -> None:
    """Where settings of a run failed, say so in a line each, and end with NotFinite's exit code."""
    failures = run_record(folder).get("failures", [])
    for failure in failures:
        complain(f"failed: {failure['sentence']}")
    if failures:
        raise typer.Exit(NotFinite.exit_code)
