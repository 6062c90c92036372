"""Deadlines of experiments under limited hours: what was measured corrects what was planned."""

from typing import Any

import pytest

from lowmem_icl.planning.hours import Deadlines
from lowmem_icl.planning.plan import Plan, StagePlan

HOUR = 3600.0
SECONDS = {
    "evaluate": HOUR, "importance": HOUR, "ablate": 20 * HOUR, "prune": 4 * HOUR, "induction": HOUR,
    "overlap": HOUR / 2,
}  # fmt: skip


def planned(hours: float | None) -> Plan:
    stages = tuple(StagePlan(name, 1, 1, 1, seconds) for name, seconds in SECONDS.items())
    nothing: Any = None
    return Plan(nothing, 1, 0, nothing, 1, stages, hours=hours)


def test_without_hours_nothing_has_to_stop() -> None:
    assert dict(Deadlines(planned(None), 100.0)) == {}


def test_what_goes_on_leaves_the_others_as_much_as_they_are_planned_to_take() -> None:
    deadlines = dict(Deadlines(planned(10.0), 100.0))
    assert deadlines == {
        "evaluate": 100 + 10 * HOUR,
        "importance": 100 + 10 * HOUR,
        "ablate": 100 + 8.5 * HOUR,
        "prune": 100 + 8.5 * HOUR,
        "induction": 100 + 10 * HOUR,
        "overlap": 100 + 10 * HOUR,
    }


@pytest.mark.parametrize(("times", "kept"), [(0.5, 0.75), (2.0, 3.0), (1e-6, 1.5), (1000.0, 30.0)])
def test_a_plan_that_was_off_is_corrected_by_what_was_measured(times: float, kept: float) -> None:
    deadlines = Deadlines(planned(40.0), 0.0)
    for name in ("evaluate", "importance"):
        deadlines.learn(name, times * SECONDS[name])
    # What takes no time was there already and says nothing; nothing is believed beyond a factor of 20.
    assert deadlines["ablate"] == pytest.approx((40 - kept) * HOUR)
    assert deadlines["evaluate"] == 40 * HOUR


def test_a_plan_is_not_corrected_by_what_was_not_planned() -> None:
    deadlines = Deadlines(planned(40.0), 0.0)
    deadlines.learn("overlap", 3 * HOUR / 2)
    assert deadlines.times_planned == pytest.approx(3.0)
    deadlines.learn("something else", 1000 * HOUR)
    assert deadlines.times_planned == pytest.approx(3.0)
    assert deadlines["prune"] == pytest.approx((40 - 3) * HOUR), "the overlap is over, induction is to come"
