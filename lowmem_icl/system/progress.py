"""How long work tells how far it is, without knowing who looks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Progress = Callable[[str, int, str], AbstractContextManager[Advance]]
"""From a label, a total and its unit to a context that gives a function to tell what was done."""


@contextmanager
def unseen(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda done: None
