"""What a person sees while a run goes on: plan, progress with rate and time left, and tables."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lowmem_icl.planning.plan import Plan, StagePlan

SECONDS_BETWEEN_LINES = 15.0


class _Rate(ProgressColumn):
    """What is done a second, in its own unit."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Return the rate, or a dash before there is one."""
        speed = task.finished_speed or task.speed
        return Text("-" if speed is None else rate_text(speed, self._unit), style="progress.data.speed")


class Terminal:
    """Progress and messages on stderr, results on stdout; `quiet` leaves out all but results and errors."""

    def __init__(self, quiet: bool = False) -> None:
        self.out = Console()
        self.err = Console(stderr=True, quiet=quiet)
        self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """Print a message for people."""
        self.err.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show how far work is done: a bar, or, where nobody sees one, a line now and then."""
        if not self.err.is_terminal:
            yield self._lines(label, total, unit)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True) as shown:
            task = shown.add_task(label, total=total)
            yield lambda amount: shown.advance(task, amount)

    def _lines(self, label: str, total: int, unit: str) -> Callable[[int], None]:
        started, done = time.monotonic(), 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            now = time.monotonic()
            if now - self._last_line < SECONDS_BETWEEN_LINES:
                return
            self._last_line = now
            rate = done / max(now - started, 1e-3)
            left = duration((total - done) / rate)
            self.say(f"{label}: {done / total:.0%}, {rate_text(rate, unit)}, {left} left")

        return advance


def show_plan(plan: Plan, console: Console) -> None:
    """Print what a run will hold, read and compute, and what this machine does."""
    memory, rates = plan.memory, plan.rates
    lines = [
        f"on disk: store {size(plan.store_bytes)}"
        + (f", made first from {size(plan.convert_bytes)}" if plan.convert_bytes else "")
        + f"; activations that memory cannot hold, at most {size(memory.spill_bytes)}",
        f"memory {size(memory.allowance_bytes)}"
        + (f", on the device {size(memory.device_bytes)}" if memory.device_bytes else "")
        + f": embeddings {size(memory.outside_bytes)}, "
        f"layers in use {size(memory.streaming_bytes)}, working space {size(memory.working_bytes)}, "
        f"layers kept {size(memory.resident_bytes)}, residuals {size(memory.alive_bytes)}, their cache {size(memory.cache_bytes)}",
        f"measured here: {size(rates.disk_bytes_per_second)}/s from disk, "
        f"{1 / (rates.attended_seconds + rates.projected_seconds + rates.fed_seconds):,.0f} tokens/s through a layer, "
        f"{1 / rates.answer_seconds:,.0f}/s through the vocabulary",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    console.print(plan_table(plan))


def plan_table(plan: Plan) -> Table:
    """Return the plan's experiments as a table."""
    hours = "" if plan.hours is None else f" for {plan.hours:.3g} hours"
    table = Table(title=f"plan{hours}", title_justify="left")
    for column in ("experiment", "operations", "layers read", "from disk", "expected"):
        table.add_column(column, justify="left" if column == "experiment" else "right")
    for stage in plan.stages:
        about = "~" if stage.rough else ""
        table.add_row(
            stage.experiment,
            f"{about}{count(stage.operations)}",
            f"{about}{count(stage.layers_read)}",
            size(stage.read_bytes),
            f"{about}{_expected(stage)}",
        )
    return table


def _expected(stage: StagePlan) -> str:
    if stage.skipped:
        return f"{duration(stage.seconds)}: waits for another run"
    if stage.documents is not None:
        return f"{duration(stage.seconds)}: {stage.documents} documents a task"
    return duration(stage.seconds)


def rate_text(rate: float, unit: str) -> str:
    """Return a rate as a short text."""
    return f"{size(rate)}/s" if unit == "bytes" else f"{count(rate)} {unit}/s"


def size(amount: float) -> str:
    """Return bytes as a short text in decimal units."""
    return _short(amount, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(amount: float) -> str:
    """Return a number as a short text: 950, 38.9 k, 1.24 T."""
    return _short(amount, ("", "k", "M", "G", "T", "P", "E")).rstrip()


def _short(amount: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} {units[-1]}"


def duration(seconds: float) -> str:
    """Return a time as a short text."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"
