"""The tasks that the tool knows by name."""

from pathlib import Path
from typing import Any

from lowmem_icl.tasks.loading import open_task
from lowmem_icl.tasks.sources import DEMO_TASKS, OUT_OF_DOMAIN_TASKS, PAPER_TASKS, task_metric


def known_tasks(data_dir: Path | None) -> list[dict[str, Any]]:
    """Return each task's name, where it is from, its metric, and its sizes by split where rows are at hand.

    Of a folder that holds some tasks the others have no sizes. Raises InputError where a folder's rows are malformed.
    """
    listed = []
    for kind, names in (("demo", DEMO_TASKS), ("paper", PAPER_TASKS), ("out of domain", OUT_OF_DOMAIN_TASKS)):
        for name in names:
            at_hand = kind == "demo" or (data_dir is not None and (data_dir / name).is_dir())
            sizes = open_task(name, data_dir).sizes if at_hand else {}
            listed.append({"task": name, "from": kind, "metric": task_metric(name), "rows": sizes})
    return listed
