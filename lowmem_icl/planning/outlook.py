"""How far a run is and how long it will still take: by its plan, corrected by what was measured."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lowmem_icl.planning.plan import Plan
from lowmem_icl.system.progress import Advance, PartProgress

# By so many seconds the plan counts as measured, so that the first moments correct little.
PRIOR_SECONDS = 3.0
# A stage that takes more than planned is not over before it says so.
MOST_BEFORE_END = 0.98


class Outlook:
    """Follows the stages of a run through its plan."""

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = {stage.experiment: stage.seconds for stage in plan.stages}
        self._operations = {stage.experiment: stage.operations for stage in plan.stages}
        self._done: dict[str, float] = {}
        self._over: set[str] = set()
        self._clock, self._began = clock, clock()
        self._end = None if plan.hours is None else self._began + plan.hours * 3600

    def advance(self, stage: str, operations: float) -> None:
        """Note operations that are done of a stage."""
        self._done[stage] = self._done.get(stage, 0.0) + operations

    def following(self, progress: PartProgress) -> PartProgress:
        """Return the same progress of parts, of which this takes note before it is told further."""

        @contextmanager
        def followed(stage: str, label: str, operations: int, ablations: int) -> Iterator[Advance]:
            with progress(stage, label, operations, ablations) as advance:

                def both(done: int) -> None:
                    self.advance(stage, done)
                    advance(done)

                yield both

        return followed

    def over(self, stage: str) -> None:
        """Note that a stage is over."""
        self._over.add(stage)

    @property
    def share(self) -> float:
        """How much of the planned time is done, from 0 to 1, which it reaches with the last stage."""
        total = sum(self._seconds.values())
        return self._planned_done() / total if total else 0.0

    @property
    def seconds_left(self) -> float:
        """How long the run will still take."""
        now, done = self._clock(), self._planned_done()
        pace = (now - self._began + PRIOR_SECONDS) / (done + PRIOR_SECONDS)
        left = pace * (sum(self._seconds.values()) - done)
        return left if self._end is None else min(left, max(0.0, self._end - now))

    def _planned_done(self) -> float:
        return sum(seconds * self._share_of(stage) for stage, seconds in self._seconds.items())

    def _share_of(self, stage: str) -> float:
        if stage in self._over:
            return 1.0
        planned = self._operations[stage]
        return min(MOST_BEFORE_END, self._done.get(stage, 0.0) / planned) if planned else 0.0
