"""The tasks that the tool knows by name."""

from pathlib import Path
from typing import Any

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import OUT_OF_DOMAIN_TASKS
from lowmem_icl.tasks.catalogue import (
    DEMO_TASKS,
    PAIR_TASKS,
    PAPER_TASKS,
    bundled_folder,
    definition,
    member_names,
    split_files,
    task_metric,
)
from lowmem_icl.tasks.row_files import count_rows

ORIGINS = {
    "demo": DEMO_TASKS,
    "pairs": PAIR_TASKS,
    "paper": PAPER_TASKS,
    "out of domain": OUT_OF_DOMAIN_TASKS,
}


def check_data_dir(data_dir: Path | None) -> None:
    """Raise InputError where --data-dir names no folder."""
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} does not exist; give the folder that holds <task>/*.jsonl")


def known_tasks(data_dir: Path | None) -> list[dict[str, Any]]:
    """Return each task's name, where it is from, its metric, and its sizes by split where rows are at hand.

    Of a folder that holds some tasks the others have no sizes. Rows are counted, not read. Raises InputError
    where a task's folder lacks a split or holds a file that is no text.
    """
    listed = []
    for kind, names in ORIGINS.items():
        for name in names:
            bundled = bundled_folder(name)
            folder = bundled or data_dir
            at_hand = bundled is not None or (folder is not None and (folder / name).is_dir())
            sizes = _sizes(name, folder) if folder is not None and at_hand else {}
            listed.append({"task": name, "from": kind, "metric": task_metric(name), "rows": sizes})
    return listed


def _sizes(name: str, folder: Path) -> dict[str, int]:
    """Return the sizes of the splits that a task uses: train, if it has one, and the evaluated split."""
    members = member_names(name)
    fields = definition(members[0])
    used = [fields.get("training_split"), fields.get("test_split") or fields["validation_split"]]
    sizes: dict[str, int] = {}
    for member in members:
        paths = split_files(folder / member, fields)
        for split in used:
            if split is not None:
                sizes[split] = sizes.get(split, 0) + count_rows(paths[split])
    return sizes
