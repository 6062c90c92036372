"""What a run's folder holds beside its tables, for people and other programs: units.parquet, masks.parquet,
summary.json and the page.
"""

import json
from pathlib import Path

from lowmem_icl.report.page.write import write_report
from lowmem_icl.report.run_tables import RunTables, read_run
from lowmem_icl.report.summary import run_summary
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tables.schema import write_table


def publish_run(folder: Path) -> None:
    """Write all of it into a run's folder.

    Raises InputError naming the folder where it holds no run, or a table or mask that cannot be read.
    """
    run = read_run(folder)
    write_tables(run)
    write_report([run], folder / "report.html")


def write_tables(run: RunTables) -> None:
    """Write units.parquet, masks.parquet and summary.json into a run's folder."""
    write_table(run.units, "units", run.folder / "units.parquet")
    write_table(run.masks, "masks", run.folder / "masks.parquet")
    text = json.dumps(run_summary(run), indent=1, ensure_ascii=False)
    write_text_atomic(run.folder / "summary.json", f"{text}\n")
