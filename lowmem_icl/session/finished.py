"""Whether a run is finished already, told without opening its model or its tasks."""

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_icl.masks.mask import Mask
from lowmem_icl.options import DEMO, PACKAGED_MODEL_NAMES, RunOptions
from lowmem_icl.session.folder import check_output
from lowmem_icl.session.identity import masks_digest
from lowmem_icl.session.record import RUN_FILE, RecordDamaged, run_record

# What people open; where one is gone the run goes on and writes it again.
SHOWN_FILES = ("results.parquet", "report.html")


def finished_record(options: RunOptions, masks: Mapping[str, Mask]) -> dict[str, Any] | None:
    """Return run.json of the run that these options name where it is finished and nothing of it is missing;
    None where there is something to do. What failed is tried again.

    A local model or a task's file that was changed since is opened and compared, so None too. Raises as
    `check_output`.
    """
    folder = check_output(options)
    if not (folder / RUN_FILE).is_file():
        return None
    try:
        record = run_record(folder)
    except RecordDamaged:
        return None
    if record["state"] != "finished" or record["finished"] is None:
        return None
    if record["identity"]["masks"] != masks_digest(masks):
        return None
    if record.get("failures") or not all((folder / name).is_file() for name in SHOWN_FILES):
        return None
    if options.masks_dir is not None and record["options"].get("masks_dir") != str(options.masks_dir):
        return None
    if not all(record.get("tracked", {}).get(name, {}).get("finished") for name in options.track):
        return None
    began = datetime.datetime.fromisoformat(record["sessions"][-1]["started"]).timestamp()
    return None if any(path.stat().st_mtime > began for path in _own_files(options)) else record


def _own_files(options: RunOptions) -> Iterator[Path]:
    """Yield the files of the user's that a run was made from."""
    tasks = [Path(name) for name in options.tasks or ()]
    folders = [] if options.data_dir is None else [options.data_dir]
    if options.model not in (DEMO, *PACKAGED_MODEL_NAMES):
        folders.append(Path(options.model).expanduser())
    for path in tasks + folders:
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from (each for each in (*path.glob("*"), *path.glob("*/*.jsonl")) if each.is_file())
