"""How far a run has got, told from its folder while it is at work or after."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_icl.report.numbers import held_out_tops, top_units
from lowmem_icl.session.folder import state_of
from lowmem_icl.session.parts import DRAFT
from lowmem_icl.session.record import run_record
from lowmem_icl.tables.schema import read_table


def status_of(folder: Path) -> dict[str, Any]:
    """Return a run's state, finished stages, parts, best units so far and how long it will still take.

    A run whose record says that it is at work, and whose lock nobody holds, was cut off. `seconds_left`: what
    the run estimated when it last wrote its record, less the time since while it is at work; 0 where that is
    over, so that it takes longer than planned.
    """
    record = run_record(folder)
    state = state_of(folder, record)
    stages = {name: stage for name, stage in record.get("stages", {}).items() if stage["finished"]}
    planned = {stage["experiment"]: stage["seconds"] for stage in record["plan"]["stages"]}
    left = sum(time for name, time in planned.items() if name not in stages)
    table = folder / "results.parquet"
    results = read_table(table, "results") if table.is_file() else None
    return {
        "folder": str(folder),
        "state": state,
        "error": record.get("error"),
        "started": record["started"],
        "ended": record["finished"],
        "experiments": record["options"]["experiments"],
        "finished": {name: stage["seconds"] for name, stage in stages.items()},
        "parts": sum(not path.name.endswith(DRAFT) for path in (folder / "parts").glob("*.npz")),
        "seconds_left_planned": round(left, 1),
        "seconds_left": round(_seconds_left(record, left, state), 1),
        "page": (folder / "report.html").is_file(),
        "best_units": [] if results is None else top_units(results).to_dicts(),
        "best_units_held_out": [] if results is None else held_out_tops(results).to_dicts(),
        "failures": record.get("failures", []),
        "warnings": record["warnings"],
    }


def _seconds_left(record: Mapping[str, Any], planned: float, state: str) -> float:
    """Return how long a run will still take; planned: what its plan says of unfinished stages."""
    outlook = record.get("outlook")
    if outlook is None or state == "out of time":
        # Its own estimate ends with its hours.
        return planned
    if state != "running":
        return float(outlook["seconds_left"])
    since = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(outlook["at"])
    return max(0.0, float(outlook["seconds_left"]) - max(0.0, since.total_seconds()))
