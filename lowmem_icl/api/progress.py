"""How far long work is, for people who call functions: bars, nothing, or whatever a caller shows."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from lowmem_icl.system.progress import Advance, Progress, unseen

Shown = bool | Progress
"""True: a bar, in a terminal, a notebook or a log; False: nothing; else a function from a label, a total and
its unit to a context that gives a function to tell what was done.
"""
SECONDS_BEFORE_A_BAR = 2.0
SECONDS_BETWEEN_LINES = 15.0


def progress_of(shown: Shown) -> Progress:
    """Return what work tells how far it is."""
    if shown is True:
        return _bar
    return unseen if shown is False else shown


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Show a bar once work has taken more than a moment."""
    interval = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    with tqdm(
        total=total,
        desc=label,
        unit=f" {unit}",
        unit_scale=True,
        delay=SECONDS_BEFORE_A_BAR,
        mininterval=interval,
        leave=False,
    ) as bar:
        yield lambda amount: bar.update(amount)
