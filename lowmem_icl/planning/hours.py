"""When experiments must stop so that all fit the hours there are, by what has been measured on the way."""

from collections.abc import Iterator, Mapping

from lowmem_icl.experiments.order import STAGES
from lowmem_icl.planning.plan import Plan

# A plan made while the machine was busy is off by up to so much.
MOST_OFF = 20.0
# Below, the time is that of starting and stopping.
LEAST_SECONDS = 1.0


class Deadlines(Mapping[str, float]):
    """By experiment, the time by a clock at which it must stop; empty without hours.

    What goes on while there is time leaves to the others what these are planned to take, times how much
    longer than planned the experiments took that are finished.
    """

    def __init__(self, plan: Plan, started: float) -> None:
        self._plan = plan
        self._end = None if plan.hours is None else started + plan.hours * 3600
        self._planned = {stage.experiment: stage.seconds for stage in plan.stages}
        self._taken: dict[str, float] = {}

    def learn(self, experiment: str, seconds: float) -> None:
        """Take note of how long an experiment took that is finished."""
        self._taken[experiment] = seconds

    @property
    def times_planned(self) -> float:
        """How many times as long as planned the finished experiments took; 1 before there are any."""
        planned = sum(self._planned.get(name, 0.0) for name in self._taken)
        taken = sum(seconds for name, seconds in self._taken.items() if name in self._planned)
        if min(planned, taken) < LEAST_SECONDS:
            return 1.0
        return min(MOST_OFF, max(1 / MOST_OFF, taken / planned))

    def __getitem__(self, experiment: str) -> float:
        if self._end is None:
            raise KeyError(experiment)
        share = next(stage.share for stage in STAGES if stage.name == experiment)
        if share not in ("stretched", "postponed"):
            return self._end
        kept = sum(
            self._planned.get(stage.name, 0.0)
            for stage in STAGES
            if stage.share == "leftover" and stage.name not in self._taken
        )
        return self._end - self.times_planned * kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._planned if self._end is not None else ())

    def __len__(self) -> int:
        return len(self._planned) if self._end is not None else 0
