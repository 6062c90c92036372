"""What a run's folder holds beside its tables, for people and other programs: units.parquet, masks.parquet,
summary.json, figures and the page.
"""

import json
from dataclasses import replace
from pathlib import Path

from lowmem_icl.report.figures.files import write_page_figures
from lowmem_icl.report.page.write import write_report
from lowmem_icl.report.run_tables import RunTables, read_run
from lowmem_icl.report.summary import run_summary
from lowmem_icl.session.run_form import State
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tables.schema import write_table


def publish_run(folder: Path, *, ends_as: State | None = None, with_figures: bool = True) -> None:
    """Write all of it into a run's folder, without figures a page without images.

    ends_as: the state that a run is about to end in, where run.json does not say so yet.

    Raises InputError naming the folder where it holds no run, or a table or mask that cannot be read.
    """
    run = read_run(folder)
    if ends_as is not None:
        run = replace(run, record={**run.record, "state": ends_as})
    write_tables(run)
    images = write_page_figures(run) if with_figures else {}
    write_report([run], folder / "report.html", images)


def write_tables(run: RunTables) -> None:
    """Write units.parquet, masks.parquet and summary.json into a run's folder."""
    write_table(run.units, "units", run.folder / "units.parquet")
    write_table(run.masks, "masks", run.folder / "masks.parquet")
    text = json.dumps(run_summary(run), indent=1, ensure_ascii=False)
    write_text_atomic(run.folder / "summary.json", f"{text}\n")
