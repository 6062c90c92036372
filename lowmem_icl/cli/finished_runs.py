"""`status` and `report`: commands on the folders of runs that are there."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lowmem_icl.cli.echo import echo
from lowmem_icl.cli.errors import reports_errors
from lowmem_icl.cli.parameters import JsonOption
from lowmem_icl.errors import InputError


@reports_errors
def status(
    folder: Annotated[Path, typer.Argument(help="Run folder.", metavar="FOLDER", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show how far a run has got: whether it is at work, its stages, the time left, the best units so far.

    lowmem-icl status runs/demo-1ba4e60239fc
    """
    from lowmem_icl.cli.status import show_status
    from lowmem_icl.cli.terminal import plain_console
    from lowmem_icl.report.status import status_of

    state = status_of(folder)
    if as_json:
        echo(json.dumps(state, indent=1, ensure_ascii=False))
    else:
        show_status(state, plain_console())


@reports_errors
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="FOLDER", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="The page.", metavar="FILE", show_default="report.html in the only folder"),
    ] = None,
    figures: Annotated[
        str | None,
        typer.Option(help="Formats of figures to add: svg, pdf, png.", metavar="LIST", show_default="svg"),
    ] = None,
    figure_width: Annotated[
        str | None, typer.Option(help="Their widths in inches.", metavar="LIST", show_default="6.75")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Their task; can be given several times.", metavar="NAME", show_default="all in one figure"
        ),
    ] = None,
) -> None:
    """Write the page of a run again, or one page of several runs, and the tables of units and masks; and
    figures for papers.

    lowmem-icl report runs/demo --figures pdf --figure-width 3.25 --task recall
    """
    from lowmem_icl.report.figures.files import asked_files, write_figures
    from lowmem_icl.report.files import publish_run
    from lowmem_icl.report.page.write import write_report
    from lowmem_icl.report.run_tables import read_run

    if out is None and len(folders) > 1:
        raise InputError("--out: expected a file for the page of several runs; give --out PAGE.html")
    files = asked_files(figures, figure_width, task or ())
    if files is not None:
        for path in [path for folder in folders for path in write_figures(read_run(folder), files)]:
            echo(str(path))
    if out is None:
        publish_run(folders[0])
    else:
        write_report([read_run(folder) for folder in folders], out)
    echo(str(out or folders[0] / "report.html"))
