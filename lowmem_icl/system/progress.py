"""How long work tells how far it is, without knowing who looks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
Progress = Callable[[str, int, str], AbstractContextManager[Advance]]
"""From a label, a total and its unit to a context that gives a function to tell what was done."""

PartProgress = Callable[[str, str, int, int], AbstractContextManager[Advance]]
"""From a stage, a label, the operations and the ablations of a part of it to a context that gives a function
to tell which operations were done."""


class RunView(Protocol):
    """Whom a run tells how far it is: its parts, and every stage that is over."""

    def part(
        self, stage: str, label: str, operations: int, ablations: int
    ) -> AbstractContextManager[Advance]:
        """Show a part of a stage while it is done."""

    def over(self, stage: str, seconds: float, found: str) -> None:
        """Say that a stage is over, how long it took, and its first result."""


class NoView:
    """Shows nothing."""

    def part(
        self, stage: str, label: str, operations: int, ablations: int
    ) -> AbstractContextManager[Advance]:
        """Show nothing."""
        return unseen(label, operations, "operations")

    def over(self, stage: str, seconds: float, found: str) -> None:
        """Say nothing."""


@contextmanager
def unwatched() -> Iterator[RunView]:
    """Watch a run without showing anything."""
    yield NoView()


@contextmanager
def unseen(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda done: None
