"""Several runs on one page: what may be compared, and how far a change can be trusted."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SyntheticRun
from test_report import by_task, drops, record, run_of, table

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.page.comparison import (
    accuracy_rows,
    change_bounds,
    common,
    comparison_data,
    comparison_sections,
    have_one_shape,
    run_labels,
)
from lowmem_icl.report.page.write import comparison_page
from lowmem_icl.report.run_tables import RunTables, read_run

CLEAN: dict[str, Any] = {"experiment": "evaluate", "metric": "acc", "mask": "clean", "low": 0.4, "high": 0.8}


def run(folder: str, values: dict[str, float], **more: Any) -> RunTables:
    """Return a run of these tasks with these accuracies and drops."""
    tasks = [{"task": task, "shots": 4} for task in values if task != AGGREGATE]
    made = run_of(
        table(*by_task(values, **CLEAN), *drops("head", 0, 1, values)),
        record(tasks=tasks, **more) | {"versions": {"lowmem_icl": "0.2.0"}},
    )
    return replace(made, folder=Path(folder))


def test_means_over_other_tasks_are_not_compared() -> None:
    both = {"piqa": 0.5, "copa": 0.7, AGGREGATE: 0.6}
    left, right = run("a", both), run("b", {"piqa": 0.6, "rte": 0.8, AGGREGATE: 0.7})
    assert common([left, right]) == [("piqa", 4)]
    assert common([left, run("c", both)]) == [("piqa", 4), ("copa", 4), (AGGREGATE, 4)]
    rows = list(accuracy_rows([left, right]))
    assert [row[:4] for row in rows] == [["piqa", "4", "a", "0.500"], ["piqa", "4", "b", "0.600"]]
    assert rows[0][5:] == ["", ""]
    assert rows[1][5] == "+0.100"


def test_a_change_is_as_uncertain_as_both_runs_together() -> None:
    first, other = {"value": 0.5, "low": 0.4, "high": 0.6}, {"value": 0.9, "low": 0.8, "high": 0.95}
    low, high = change_bounds(first, other)
    assert low == pytest.approx(0.4 - (0.1**2 + 0.1**2) ** 0.5)
    assert high == pytest.approx(0.4 + (0.05**2 + 0.1**2) ** 0.5)
    assert change_bounds(first, other | {"low": None}) == (None, None)


def test_runs_have_names_that_tell_them_apart() -> None:
    values = {"piqa": 0.5}
    assert run_labels([run("runs/a", values), run("runs/b", values)]) == ["a", "b"]
    assert run_labels([run("x/a", values), run("y/a", values)]) == ["x/a", "y/a"]
    other = record()["model"] | {"id": "opt"}
    assert run_labels([run("a", values), run("b", values, model=other)]) == ["demo int8", "opt int8"]


def test_models_of_other_shapes_have_no_common_map() -> None:
    values = {"piqa": 0.5}
    wide = record()["model"] | {"heads": 4}
    runs = [run("a", values), run("b", values, model=wide)]
    assert not have_one_shape(runs)
    assert [section.id for section in comparison_sections(runs)] == ["accuracy", "runs"]
    alike = [run("a", values), run("b", values)]
    assert "map" in [section.id for section in comparison_sections(alike)]


def test_maps_show_every_run_and_what_it_has_more_than_the_first() -> None:
    metrics = comparison_data([run("a", {"piqa": 0.5}), run("b", {"piqa": 0.75})])["units"]["metrics"]
    assert [metric["short"] for metric in metrics.values()] == ["a", "b", "b less a"]
    assert len({(metric["linear"], metric["largest"]) for metric in metrics.values()}) == 1, "one scale"


def runs_of(folder: Path, *sizes: dict[str, Any]) -> Sequence[RunTables]:
    """Return small runs of these sizes."""
    same: dict[str, Any] = {"layers": 2, "heads": 3, "shots": (0, 4)}
    return [
        read_run(SyntheticRun(**(same | size)).write(folder / f"run{number}"))
        for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("layers", [1, 3])
def test_of_models_of_other_shapes_accuracies_are_compared_and_no_units(tmp_path: Path, layers: int) -> None:
    runs = runs_of(tmp_path, {"tasks": ("copa", "wic")}, {"tasks": ("copa", "wic"), "layers": layers})
    page = comparison_page(runs)
    assert [section.id for section in page.sections] == ["accuracy", "runs"]
    assert comparison_data(runs)["units"]["metrics"] == {}


def test_runs_without_a_common_setting_are_refused_by_name(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"tasks": ("copa", "wic")}, {"tasks": ("rte", "boolq")})
    with pytest.raises(InputError, match=r"in common, got none in .*run0, .*run1; give others"):
        comparison_page(runs)
