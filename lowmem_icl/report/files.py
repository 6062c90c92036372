"""What a run's folder holds for people and other programs beside its page: units.parquet, masks.parquet and
summary.json.
"""

import json
from pathlib import Path

from lowmem_icl.report.summary import run_summary
from lowmem_icl.report.tables import run_tables
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tables.schema import write_table


def write_tables(folder: Path) -> None:
    """Write units.parquet, masks.parquet and summary.json into a run's folder.

    Raises InputError naming the folder where it holds no run, or a table or mask that cannot be read.
    """
    tables = run_tables(folder)
    write_table(tables.units, "units", folder / "units.parquet")
    write_table(tables.masks, "masks", folder / "masks.parquet")
    text = json.dumps(run_summary(folder, tables), indent=1, ensure_ascii=False)
    write_text_atomic(folder / "summary.json", f"{text}\n")
