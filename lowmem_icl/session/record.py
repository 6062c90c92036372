"""What a finished run says on the terminal, and how far an unfinished one is."""

import json
from pathlib import Path
from typing import Any

from lowmem_icl.errors import InputError


def run_record(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder's run.json; raise InputError where there is none."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no run (run.json cannot be read); give a run folder") from error
    if not isinstance(record, dict) or record.get("format") != "lowmem-icl-run/1":
        raise InputError(f"{folder / 'run.json'}: expected a run of format lowmem-icl-run/1")
    return record
