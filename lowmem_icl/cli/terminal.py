"""What a person sees: messages and progress on stderr, results on stdout, and amounts as short texts.

Every console of the tool is made here and prints texts as they are: a name or path is never markup.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from lowmem_icl.system.visible import visible

SECONDS_BETWEEN_LINES = 15.0
SECONDS_OF_SILENCE = 2.0


class _Rate(ProgressColumn):
    """What is done per second, in its own unit."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Return the rate, or a dash before there is one."""
        speed = task.finished_speed or task.speed
        return Text("-" if speed is None else rate_text(speed, self._unit), style="progress.data.speed")


class PlainConsole(Console):
    """A console that shows what its texts hold of control characters instead of sending them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is printed; the console's own codes stand beside the texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints every text as it is, without markup, emoji codes or colours of its own."""
    return PlainConsole(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


class Terminal:
    """Progress and messages on stderr, results on stdout; `quiet` leaves out all but results and errors."""

    def __init__(self, quiet: bool = False) -> None:
        self.out = plain_console()
        self.err = plain_console(stderr=True, quiet=quiet)
        self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """Print a message for people."""
        self.err.print(text, soft_wrap=True)

    @contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Say what is being done, once, where it takes more than a moment."""
        timer = threading.Timer(SECONDS_OF_SILENCE, self.say, [f"{doing} …"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show how much of some work is done: a bar, or, where stderr is no terminal, a line now and then."""
        if not self.err.is_terminal:
            yield self._lines(label, total, unit)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
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
            self.say(f"{label}: {done / max(total, 1):.0%}, {rate_text(rate, unit)}, {left} left")

        return advance


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
