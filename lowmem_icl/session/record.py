"""run.json as it is written and read back: checked against its form and its own digest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem_icl.errors import InputError
from lowmem_icl.session.run_form import RUN_FORMAT, RunRecord

RUN_FILE = "run.json"


class RecordDamaged(InputError):
    """A run.json is not what a run wrote."""


def run_record(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's run.json; raise InputError where there is none, and RecordDamaged
    where it is malformed or was changed since.
    """
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no run; give a run folder") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a run folder") from error
    except (ValueError, RecursionError) as error:
        raise RecordDamaged(f"{path}: not JSON ({error}); {_REMEDY}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, str) and found.startswith("lowmem-icl-run/") and found != RUN_FORMAT:
        raise InputError(
            f"{path}: a run in another version's form ({found}, this one has {RUN_FORMAT}); read it with "
            "that version, or run again with another --out"
        )
    try:
        RunRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"]) or "content"
        raise RecordDamaged(f"{path}: {field_name}: {first['msg']}; {_REMEDY}") from error
    digest = content.pop("digest", None)
    # Records of earlier versions have none.
    if digest is not None and digest != _record_digest(content):
        raise RecordDamaged(f"{path}: its digest does not match: it was changed since; {_REMEDY}")
    return dict(content)


_REMEDY = "run the same command again, which makes it again from the folder's parts"


def record_text(record: Mapping[str, Any]) -> str:
    """Return the text of run.json: the record and a digest of it."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return json.dumps({**content, "digest": _record_digest(content)}, indent=1) + "\n"


def _record_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
