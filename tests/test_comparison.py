"""The page of several runs: what is compared where they share only some tasks, or no unit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SyntheticRun

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.page.comparison import accuracy_rows, common, comparison_data
from lowmem_icl.report.page.write import comparison_page
from lowmem_icl.report.run_tables import RunTables, read_run


def runs_of(folder: Path, *sizes: dict[str, Any]) -> Sequence[RunTables]:
    """Return small runs of these sizes."""
    same: dict[str, Any] = {"layers": 2, "heads": 3, "shots": (0, 4)}
    return [
        read_run(SyntheticRun(**(same | size)).write(folder / f"run{number}"))
        for number, size in enumerate(sizes)
    ]


def test_means_are_compared_only_where_they_are_of_the_same_tasks(tmp_path: Path) -> None:
    first, same, other = runs_of(
        tmp_path, {"tasks": ("copa", "wic")}, {"tasks": ("wic", "copa")}, {"tasks": ("copa", "rte")}
    )
    assert AGGREGATE in {task for task, _ in common([first, same])}
    assert common([first, other]) == [("copa", 0), ("copa", 4)]
    assert {row[0] for row in accuracy_rows([first, other])} == {"copa"}


@pytest.mark.parametrize("layers", [1, 3])
def test_of_models_of_other_shapes_accuracies_are_compared_and_no_units(tmp_path: Path, layers: int) -> None:
    runs = runs_of(tmp_path, {"tasks": ("copa", "wic")}, {"tasks": ("copa", "wic"), "layers": layers})
    page = comparison_page(runs)
    assert [section.id for section in page.sections] == ["accuracy"]
    assert comparison_data(runs)["units"]["metrics"] == {}


def test_runs_without_a_common_setting_are_refused_by_name(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"tasks": ("copa", "wic")}, {"tasks": ("rte", "boolq")})
    with pytest.raises(InputError, match=r"in common, got none in .*run0, .*run1; give others"):
        comparison_page(runs)
