"""How far long work is, for people who call functions: bars, nothing, or whatever a caller shows."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from lowmem_icl.system.progress import Advance, Progress, unseen

Shown = bool | Progress
"""True: a bar, in a terminal or a notebook; False: nothing; else a function from a label, a total and its
unit to a context that gives a function to tell what was done.
"""
SECONDS_BEFORE_A_BAR = 2.0


def progress_of(shown: Shown) -> Progress:
    """Return what work tells how far it is."""
    if shown is True:
        return _bar
    return unseen if shown is False else shown


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Show a bar once work has taken more than a moment, to people: a log would only fill with it."""
    is_seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    with tqdm(
        total=total,
        desc=label,
        unit=f" {unit}",
        unit_scale=True,
        delay=SECONDS_BEFORE_A_BAR,
        leave=False,
        disable=not is_seen,
    ) as bar:
        yield lambda amount: bar.update(amount)
