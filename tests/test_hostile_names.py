"""A name is no markup, whatever it holds: on the page, in figures, in the terminal."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console
from test_report import by_task, drops, greedy_record, record, run_of, table

from lowmem_icl.cli.evaluation import show_evaluation
from lowmem_icl.cli.status import show_status
from lowmem_icl.cli.tables import show_summary
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.page.write import render, run_page
from lowmem_icl.tables.schema import write_table

HOSTILE = "<script>alert('[v2]')</script> [/b] $x$"


def hostile_results() -> pl.DataFrame:
    clean = {"experiment": "evaluate", "metric": "acc", "mask": "clean", "documents": 9, "stderr": 0.1}
    return table(
        *by_task({HOSTILE: 0.5, "_hidden": 0.6, AGGREGATE: 0.55}, **clean),
        *by_task({HOSTILE: 0.4}, **(clean | {"mask": "[v2]", "heads_removed": 1, "ffns_removed": 0})),
        *(greedy_record(HOSTILE, HOSTILE, 0.5, method) | {"heads_removed": 1, "ffns_removed": 0}
          for method in ("greedy", "gradient")),
        *drops("head", 0, 1, {HOSTILE: 1.0}),
    )  # fmt: skip


def test_names_are_escaped_on_the_page() -> None:
    hostile = record(
        warnings=[f"warning of {HOSTILE}"], tasks=[{"task": HOSTILE}], command=f"run --tasks {HOSTILE}"
    )
    text = render(run_page(run_of(hostile_results(), hostile)))
    scripts = re.findall(r"<script[^>]*>", text)
    assert len(scripts) == 4, "three of data, one of code"
    assert text.count("&lt;script&gt;alert(") >= 4
    assert "[v2]" in text


def run_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_table(hostile_results(), "results", folder / "results.parquet")
    return folder


def printed(show: Any, *arguments: Any) -> str:
    console = Console(file=StringIO(), width=200, force_terminal=False)
    show(*arguments, console)
    output = console.file
    assert isinstance(output, StringIO)
    return output.getvalue()


def test_names_are_printed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run [v2] [/b]")
    model = {"id": "org/[v2]", "weights": "int8", "layers": 2, "heads": 2}
    monkeypatch.setattr("lowmem_icl.report.run_tables.run_record", lambda folder: record(model=model))
    summary = printed(show_summary, folder)
    assert summary.count(HOSTILE) >= 2
    assert "org/[v2] in int8: accuracy by demonstrations" in summary
    assert str(folder) in summary
    evaluation = printed(show_evaluation, folder)
    assert HOSTILE in evaluation
    assert "[v2]" in evaluation
    state = {
        "folder": "runs/[v2]", "state": "stopped", "started": "now", "parts": 1, "experiments": ["evaluate"],
        "finished": {}, "seconds_left": 2.0, "page": False, "warnings": ["a [/b] warning :smile:"],
        "best_units": [{"kind": "ffn", "layer": 1, "head": None, "shots": 4, "value": 2.0, "q_value": None}],
        "best_units_held_out": [{"shots": 4, "count": 1, "value": 1.5, "low": None, "high": None}],
    }  # fmt: skip
    status = printed(show_status, state)
    assert "folder: runs/[v2]" in status
    assert "4 shots: L1F 2.00; mean 2.00, on documents that did not pick the units 1.50" in status
    assert "single values are picked and measured on the same documents" in status
    assert "warning: a [/b] warning :smile:" in status
