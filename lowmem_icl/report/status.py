"""How far a run has got, told from its folder while it is at work or after."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_icl.report.numbers import held_out_tops, top_units
from lowmem_icl.session.folder import run_record, state_of
from lowmem_icl.tables.schema import read_table


def status_of(folder: Path) -> dict[str, Any]:
    """Return a run's state, finished stages, parts, best units so far and how long it will still take.

    `seconds_left`: what was planned, times how much longer than planned the finished stages took, less what
    the stage in work has taken.
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
        "started": record["started"],
        "ended": record["finished"],
        "experiments": record["options"]["experiments"],
        "finished": {name: stage["seconds"] for name, stage in stages.items()},
        "parts": len(list((folder / "parts").glob("*.npz"))),
        "seconds_left_planned": round(left, 1),
        "seconds_left": round(_corrected(record, left, running=state == "running"), 1),
        "page": (folder / "report.html").is_file(),
        "best_units": [] if results is None else top_units(results).to_dicts(),
        "best_units_held_out": [] if results is None else held_out_tops(results).to_dicts(),
        "warnings": record["warnings"],
    }


def _corrected(record: Mapping[str, Any], left: float, *, running: bool) -> float:
    """Return how long is left by what the stages took that this session has finished."""
    session = record["sessions"][-1]
    over = [stage for stage in session["stages"].values() if stage["finished"] and stage["planned_seconds"]]
    planned = sum(stage["planned_seconds"] for stage in over)
    taken = sum(stage["seconds"] for stage in over)
    corrected = left * (taken / planned if planned >= 1 else 1.0)
    if not running:
        return corrected
    began = datetime.datetime.fromisoformat(session["started"])
    elapsed = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
    in_work = elapsed - sum(stage["seconds"] for stage in session["stages"].values())
    return max(0.0, corrected - max(0.0, in_work))
