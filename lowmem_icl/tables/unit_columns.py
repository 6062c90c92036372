"""Blocks of result columns about units removed alone, an entry a unit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Unit
from lowmem_icl.tasks.loading import TaskRows

Values = NDArray[np.float64]


def unit_columns(
    task: TaskRows, units: Sequence[Unit], by_unit: Mapping[str, Values], /, **same: Any
) -> list[dict[str, Any]]:
    """Return blocks of result columns, one a kind of unit, from columns [U] and what is the same in all."""
    blocks = []
    for kind in ("head", "ffn"):
        places = [place for place, unit in enumerate(units) if unit.kind == kind]
        if not places:
            continue
        block = {
            "experiment": "ablate",
            "task": task.task,
            "shots": task.shots,
            "split": task.split,
            "kind": kind,
            "layer": np.array([units[place].layer for place in places]),
            "heads_removed": int(kind == "head"),
            "ffns_removed": int(kind == "ffn"),
            "documents": len(task.documents),
        }
        if kind == "head":
            block["head"] = np.array([units[place].head for place in places])
        blocks.append(block | {name: column[places] for name, column in by_unit.items()} | same)
    return blocks
