"""One display for a whole run: which stage it is in, how far, how fast and for how long yet.

On a terminal a line that stays below all others; elsewhere the same words, a line now and then.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from lowmem_icl.cli import terminal as texts
from lowmem_icl.planning.outlook import Outlook
from lowmem_icl.system.progress import Advance

BAR_WIDTH = 12


class RunDisplay:
    """Shows a run by its outlook, which others keep; a context in which the stages are shown.

    experiments: the stages in their order.
    """

    def __init__(self, console: Console, outlook: Outlook, experiments: Sequence[str]) -> None:
        self._console, self._experiments = console, experiments
        self._outlook = outlook
        self._stage = self._label = ""
        self._operations = self._ablations = 0.0
        self._part_operations = 0.0
        self._part_began = time.monotonic()
        self._part_ablations = 0.0
        self._ended = threading.Event()
        self._bar: Progress | None = None

    def __enter__(self) -> "RunDisplay":
        if self._console.is_terminal and not self._console.quiet:
            column = Column(no_wrap=True, overflow="ellipsis")
            self._bar = Progress(
                BarColumn(bar_width=BAR_WIDTH),
                _Words(self, table_column=column),
                console=self._console,
                transient=True,
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0)
        elif not self._console.quiet:
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def part(self, stage: str, label: str, operations: int, ablations: int) -> Iterator[Advance]:
        """Show a part of a stage while it is done."""
        if stage != self._stage:
            self._ablations = 0.0
        self._stage, self._label = stage, label
        self._part_operations = self._part_ablations = 0.0
        self._part_began = time.monotonic()

        def advance(done: int) -> None:
            share = done / operations if operations else 0.0
            self._part_operations += done
            self._part_ablations += ablations * share
            self._ablations += ablations * share
            if self._bar is not None:
                self._bar.update(self._task, completed=self._outlook.share)

        yield advance
        self._label = ""

    def over(self, stage: str, seconds: float, found: str) -> None:
        """Leave a line for a stage that is over, with its first result."""
        said = f"{stage} {texts.duration(seconds)}" + (f": {found}" if found else "")
        self._console.print(Text(said), soft_wrap=True)

    def words(self) -> str:
        """Return the stage of the stages, what is done of the run, the time left, and what is being done."""
        if not self._stage:
            return "starting"
        number = self._experiments.index(self._stage) + 1 if self._stage in self._experiments else 0
        said = [
            f"{self._stage} ({number} of {len(self._experiments)}): {self._outlook.share:.0%} of the run",
            f"{texts.duration(self._outlook.seconds_left)} left",
        ]
        taken = max(time.monotonic() - self._part_began, 1e-3)
        if self._ablations:
            rate = texts.count(self._part_ablations / taken)
            said.append(f"{texts.count(self._ablations)} ablations, {rate}/s")
        elif self._part_operations:
            said.append(f"{texts.count(self._part_operations / taken)} operations/s")
        detail = self._label.removeprefix(self._stage).lstrip(", ")
        if detail:
            said.append(detail)
        return ", ".join(said)

    def _print_lines(self) -> None:
        while not self._ended.wait(texts.SECONDS_BETWEEN_LINES):
            self._console.print(Text(self.words()), soft_wrap=True)


class _Words(ProgressColumn):
    """The words of a display; asked for again at every refresh."""

    def __init__(self, display: RunDisplay, table_column: Column) -> None:
        self._display = display
        super().__init__(table_column)

    def render(self, task: Task) -> Text:
        """Return them."""
        return Text(self._display.words(), no_wrap=True, overflow="ellipsis")
