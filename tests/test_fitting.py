"""How many units may be ablated exactly so that everything fits the hours."""

from dataclasses import replace
from pathlib import Path

import pytest

from lowmem_icl.options import RunOptions
from lowmem_icl.planning.fitting import exact_that_fits
from lowmem_icl.planning.measure import Rates
from lowmem_icl.planning.plan import Chunk, Plan, StagePlan, make_plan, within_hours
from lowmem_icl.session.prepare import Prepared, prepare

HOUR = 3600.0
SLOW = Rates(
    call_seconds=0.0, attention_seconds=1e-3, projection_seconds=1e-3, ffn_seconds=1e-3,
    backward_seconds=6e-3, answer_seconds=1e-3, disk_bytes_per_second=1e9,
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(stores: Path) -> Prepared:
    """The demo's tasks, screened."""
    asked = {
        "tasks": ("recall", "knowledge"), "shots": (0, 4), "limit": 8, "train_limit": 8, "certify_limit": 0,
        "screen": "attribution", "exact": 10, "search": "nested", "curves": ("heads",), "store_dir": stores,
    }  # fmt: skip
    return prepare(RunOptions.model_validate(asked))


def plan_of(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, hours: float | None = None) -> Plan:
    monkeypatch.setattr("lowmem_icl.planning.plan.measure", lambda *_, **__: SLOW)
    return make_plan(prepared, hours=hours)


def test_what_fits_is_the_most_that_a_plan_of_it_says_fits(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(exact: int) -> float:
        changed = replace(prepared, options=prepared.options.model_copy(update={"exact": exact}))
        return sum(stage.seconds for stage in plan_of(changed, monkeypatch).stages)

    for wanted in (3, 7, 20):
        plan = plan_of(prepared, monkeypatch, hours=1.001 * seconds(wanted) / 3600)
        fits = exact_that_fits(prepared, plan, lambda part: False)
        assert fits is not None
        assert seconds(fits) <= 1.001 * seconds(wanted)
        assert fits == wanted or seconds(fits) >= 0.95 * seconds(wanted)


def test_nothing_is_chosen_where_nothing_is_screened_or_there_are_no_hours(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(prepared, monkeypatch)
    assert exact_that_fits(prepared, plan, lambda part: False) is None
    first = sum(s.seconds for s in plan.stages if s.experiment in ("evaluate", "importance"))
    least = plan_of(prepared, monkeypatch, hours=1.01 * first / 3600)
    assert exact_that_fits(prepared, least, lambda part: False) == 0


def test_curves_take_their_hours_before_the_ablations(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {stage.experiment: stage for stage in plan_of(prepared, monkeypatch).stages}
    assert 0 < stages["prune"].early_seconds < stages["prune"].seconds
    assert not any(stage.early_seconds for name, stage in stages.items() if name != "prune")
    early = StagePlan("prune", 1, 1, 1, 10 * HOUR, early_seconds=3 * HOUR)
    plan = Plan(None, 0, 0, None, 1, (StagePlan("ablate", 1, 1, 1, 8 * HOUR), early))  # type: ignore[arg-type]
    chunks = {"ablate": [Chunk(0, 1, HOUR), Chunk(1, 2, HOUR), Chunk(2, 4, 2 * HOUR), Chunk(4, 8, 4 * HOUR)]}
    assert within_hours(plan, 5, chunks).stages[0].documents == 2, "two of the five hours are left"
