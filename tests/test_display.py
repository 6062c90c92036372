"""What is told while a run goes on: at once, stage by stage, on a terminal and in a pipe."""

import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import polars as pl
import pytest
from commands import SMALL
from rich.console import Console

from lowmem_icl.cli.display import RunDisplay
from lowmem_icl.cli.terminal import Terminal
from lowmem_icl.options import EXPERIMENTS
from lowmem_icl.planning.outlook import PRIOR_SECONDS, Outlook
from lowmem_icl.planning.plan import Plan, StagePlan
from lowmem_icl.report.findings.first_results import first_result
from lowmem_icl.tables.schema import empty_frame, read_table


def plan_of(hours: float | None = None, **seconds: float) -> Plan:
    stages = tuple(StagePlan(name, 100, 1, 1, each) for name, each in seconds.items())
    return Plan(None, 0, 0, None, 1, stages, hours=hours)  # type: ignore[arg-type]


def test_time_left_is_the_plans_corrected_by_what_was_measured() -> None:
    now = [0.0]
    outlook = Outlook(plan_of(evaluate=100.0, prune=300.0), lambda: now[0])
    assert (outlook.share, outlook.seconds_left) == (0.0, 400.0)
    # Twice as long as planned.
    now[0] = 100.0
    outlook.advance("evaluate", 50)
    assert outlook.share == 50 / 400
    assert outlook.seconds_left == 350 * (100 + PRIOR_SECONDS) / (50 + PRIOR_SECONDS)
    # A stage that needs less than planned, or more, is over when it says so.
    outlook.over("evaluate")
    assert outlook.share == 100 / 400
    outlook.advance("prune", 1000)
    assert outlook.share < 1
    outlook.over("prune")
    assert (outlook.share, outlook.seconds_left) == (1.0, 0.0)


def test_hours_bound_the_time_left_and_an_empty_plan_is_done() -> None:
    now = [0.0]
    outlook = Outlook(plan_of(hours=0.01, prune=300.0), lambda: now[0])
    assert outlook.seconds_left == pytest.approx(36.0)
    assert Outlook(plan_of()).seconds_left == 0.0


def shown(*, terminal: bool) -> str:
    output = StringIO()
    console = Console(file=output, width=100, force_terminal=terminal)
    outlook = Outlook(plan_of(evaluate=10.0, ablate=20.0))
    with RunDisplay(console, outlook, EXPERIMENTS) as display:
        with display.part("evaluate", "evaluate labels", 100, 0) as advance:
            advance(100)
        display.over("evaluate", 14.2, "recall 0.25 → 0.98 at 16 shots")
        with outlook.following(display.part)("ablate", "ablate, chunk 1 of 2", 100, 3000) as advance:
            advance(50)
            time.sleep(0.4)
            words = display.words()
        display.over("ablate", 7.0, "")
    assert words.startswith("ablate (3 of 6): ")
    assert ": 33% of the run, " in words
    assert " left, 1.5 k ablations, " in words
    assert words.endswith("/s, chunk 1 of 2")
    return output.getvalue()


def test_the_same_words_stand_on_a_terminal_and_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_icl.cli.terminal.SECONDS_BETWEEN_LINES", 0.1)
    for output in (shown(terminal=False), shown(terminal=True)):
        assert "evaluate 14.2 s: recall 0.25 → 0.98 at 16 shots" in output
        assert "ablate (3 of 6): " in output
        assert "1.5 k ablations" in output
        assert "ablate 7.0 s\n" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1, "the cursor is there again"


def test_a_quiet_display_shows_nothing() -> None:
    output = StringIO()
    console = Console(file=output, quiet=True, force_terminal=True)
    with RunDisplay(console, Outlook(plan_of(evaluate=1.0)), EXPERIMENTS) as display:
        display.over("evaluate", 1.0, "found")
    assert output.getvalue() == ""


def test_what_takes_more_than_a_moment_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal().waiting("counting"):
        pass
    monkeypatch.setattr("lowmem_icl.cli.terminal.SECONDS_OF_SILENCE", 0.01)
    with Terminal().waiting("loading"):
        time.sleep(0.3)
    with Terminal(quiet=True).waiting("loading"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "loading …\n"


def test_a_line_stands_there_before_anything_slow_is_imported(tmp_path: Path) -> None:
    code = """
import os, sys
class Stderr:
    def __init__(self, under): self.under = under
    def write(self, text):
        if text.strip():
            seen = {"torch", "transformers", "lm_eval", "polars"} & set(sys.modules)
            print(sorted(seen), text.strip(), flush=True)
            os._exit(0)  # What follows is no matter here.
        return self.under.write(text)
    def __getattr__(self, name): return getattr(self.under, name)
sys.stderr = Stderr(sys.stderr)
from lowmem_icl.cli.app import app
app()
"""
    arguments = [*SMALL, "--experiments", "evaluate", "--store-dir", str(tmp_path / "stores")]
    for command, doing in {"run": "running evaluate with", "plan": "planning a run with"}.items():
        told = subprocess.run(
            [sys.executable, "-c", code, command, *arguments], capture_output=True, text=True, check=False
        )
        assert told.stdout.splitlines()[0] == f"[] {doing} demo in int8 …", told.stderr


def test_every_stage_has_a_first_result_that_the_table_holds(small_run: Path) -> None:
    results = read_table(small_run / "results.parquet", "results")
    found = {name: first_result(name, results.filter(pl.col("experiment") == name)) for name in EXPERIMENTS}
    accuracies = results.filter(
        (pl.col("experiment") == "evaluate")
        & (pl.col("metric") == "acc")
        & (pl.col("labels").fill_null("right") == "right")
        & pl.col("task").is_in(["recall", "knowledge"])
    )
    values = {(row["task"], row["shots"]): row["value"] for row in accuracies.to_dicts()}
    best = max(("recall", "knowledge"), key=lambda task: values[task, 4] - values[task, 0])
    assert found["evaluate"] == f"{best} {values[best, 0]:.2f} → {values[best, 4]:.2f} at 4 shots"
    assert found["importance"].startswith("largest gradients L")
    assert found["ablate"].startswith("36 units × 4 settings; costliest L")
    assert "removed leave the mean over tasks at" in found["prune"]
    assert found["induction"].startswith("prefix matching is highest in L")
    assert found["overlap"].endswith("pairs of rankings")
    for name in EXPERIMENTS:
        assert first_result(name, empty_frame("results")) == ""
