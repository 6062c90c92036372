"""Stages under limited hours: how far they come, what waits, and what is shown of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pytest
from played_work import (
    DROPS,
    RATES,
    SHARED,
    NoParts,
    PlayedWork,
    described,
    is_search,
    last_results,
    played,
    prepared_for,
)

from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.experiments.order import run_stages
from lowmem_icl.planning.costs import planned_work, work_left
from lowmem_icl.planning.hours import Deadlines
from lowmem_icl.planning.measure import Rates
from lowmem_icl.planning.plan import make_plan
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.work import Part, SweepPart
from lowmem_icl.tables.unit_table import q_metric


@pytest.mark.parametrize(
    ("allowed", "more"),
    [(2, {}), (3, {}), (5, {}), (3, SHARED), (5, SHARED), (5, DROPS), (8, DROPS)],
)
def test_a_run_that_was_cut_by_its_hours_continues_with_what_the_plan_says_is_left(
    allowed: int, more: Mapping[str, Any]
) -> None:
    prepared = prepared_for(experiments=("evaluate", "importance", "ablate"), train_limit=6, **more)
    first = played(prepared, allowed=allowed)
    unfinished = [result.unfinished for _, result, is_over in run_stages(first, {}) if is_over]
    assert any(unfinished)
    left = [
        part
        for stage in work_left(planned_work(prepared), lambda name: name in first.finished)
        for part in stage.parts
    ]
    second = played(prepared, finished=set(first.finished))
    assert not any(result.unfinished for _, result, is_over in run_stages(second, {}) if is_over)
    assert [described(part) for part in left] == [described(part) for part in second.asked]


@dataclass
class PlayedClock:
    """A clock that moves by what this machine would take for each part."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(frozen=True)
class TimedWork(PlayedWork):
    """Work that takes as long as planned; a part that ends after the deadline is not finished."""

    rates: Rates = RATES

    def _ask(self, part: Part) -> np.random.Generator:
        self.check_time()
        if part.name not in self.finished:
            assert isinstance(self.clock, PlayedClock)
            cost = part.cost(self.prepared, self.limits, ())
            self.clock.seconds += self.rates.seconds(cost, self.limits.micro_batch_tokens)
            self.check_time()
        return super()._ask(part)


def timed(prepared: Prepared, limits: SweepLimits) -> TimedWork:
    nothing: Any = None
    parts: Any = NoParts()
    return TimedWork(prepared, nothing, limits, nothing, parts, nothing, clock=PlayedClock())


def cut_stages() -> Iterator[Any]:
    """Yield shares of the ablations that hours allow, with stages behind them, or label drops; of the last
    two, shares between others are for the long run.
    """
    for postponed, label_drops in ((False, False), (True, False), (False, True)):
        for share in (0.05, 0.2, 0.5, 0.8, 1.1):
            is_slow = (postponed or label_drops) and share in (0.05, 0.5)
            yield pytest.param(share, postponed, label_drops, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize(("share", "postponed", "label_drops"), tuple(cut_stages()))
def test_hours_reach_the_documents_that_the_plan_names(
    share: float, postponed: bool, label_drops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_icl.planning.plan.measure", lambda *_, **__: RATES)
    pruned = ("prune",) if postponed else ()
    experiments = ("evaluate", "importance", "ablate", *pruned)
    prepared = prepared_for(experiments=experiments, train_limit=12, label_drops=label_drops)
    seconds = {stage.experiment: stage.seconds for stage in make_plan(prepared).stages}
    hours = (seconds["evaluate"] + seconds["importance"] + share * seconds["ablate"]) / 3600
    plan = make_plan(prepared, hours=hours)
    (ablate,) = (stage for stage in plan.stages if stage.experiment == "ablate")
    work = timed(prepared, plan.limits)
    results: dict[str, StageResult] = {}
    for stage, result, _ in run_stages(work, Deadlines(plan, 0.0)):
        results[stage.name] = result
    sweeps = [part for part in work.asked if isinstance(part, SweepPart)]
    reached = [part.documents for part in sweeps if part.name.startswith("ablate-")]
    assert ablate.documents == (None if share > 1 else max(reached, default=0))
    assert bool(results["ablate"].unfinished) == (share < 1)
    waiting = {stage.experiment for stage in plan.stages if stage.postponed}
    assert waiting == ({"prune"} if postponed and share < 1 else set())
    assert share > 1 or not any(is_search(part) for part in work.asked)


def test_curves_that_ablations_do_not_rank_are_there_before_these() -> None:
    prepared = prepared_for(screen="attribution", exact=5)
    work = played(prepared)
    stages = [(stage.name, is_over) for stage, _, is_over in run_stages(work, {})]
    assert stages.index(("prune", False)) < stages.index(("ablate", False))
    names = [part.name for part in work.asked]
    assert names.index("curves-000000") < names.index("ablate-000000") < names.index("prune-00000")
    assert len(names) == len(set(names)), "nothing is done twice"
    cut = last_results(played(prepared, no_time_for="ablate"))["prune"]
    assert "waits" in cut.unfinished
    assert set(cut.results["procedure"]) >= {"curve-heads", "curve-ffns"}, "they stay on the page"
    exact = played(prepared_for())
    list(run_stages(exact, {}))
    names = [part.name for part in exact.asked]
    assert names.index("ablate-000000") < names.index("curves-000000"), "by what these find FFNs are ranked"


def test_curves_stay_as_they_were_drawn_where_a_few_ablations_hold_all_ffns() -> None:
    prepared = prepared_for(screen="attribution", exact=35)
    work = played(prepared)
    results = {stage.name: result for stage, result, _ in run_stages(work, {})}
    assert any(key.method == "ablation" for key in results["ablate"].rankings.ffns)
    curves = results["prune"].results.filter(procedure="curve-ffns")
    assert set(curves["method"]) == {"gradient"}


def test_a_stage_that_waits_asks_for_nothing_and_says_so() -> None:
    work = played(prepared_for(), no_time_for="ablate")
    results = last_results(work)
    waiting = "prune: waits for the ablations to finish; the same command continues"
    assert {name: result.unfinished for name, result in results.items() if result.unfinished} == {
        "ablate": "ablate: the time was over after 0 of 3 documents per task; the same command continues",
        "prune": waiting,
    }
    assert not [part.name for part in work.asked if part.name.startswith(("prune", "curves"))]
    assert results["prune"].results.is_empty()
    # Those behind it go on with what there is.
    induction = results["induction"].results
    assert len(induction.filter(pl.col("procedure") == "capacity"))
    assert induction.filter((pl.col("procedure") == "capacity") & pl.col("mask").is_not_null()).is_empty()
    assert len(results["overlap"].results)


def test_without_what_screens_nothing_is_ablated() -> None:
    prepared = prepared_for(
        experiments=("evaluate", "importance", "ablate", "overlap"), screen="attribution", exact=5
    )
    work = played(prepared, allowed=1)
    results = last_results(work)
    assert [part.name for part in work.asked] == ["evaluate-000000"]
    assert set(results["evaluate"].results["labels"]) == {None, "right"}, "the controls come second"
    for name in ("evaluate", "importance", "ablate"):
        assert results[name].unfinished.startswith(f"{name}: the time was over before it was finished")
        assert results[name].results.is_empty() == (name != "evaluate")
    assert results["overlap"].warnings == (), "they are asked for, and will come"


def test_ablations_that_are_cut_tell_how_far_they_came_and_show_it() -> None:
    prepared = prepared_for(experiments=("evaluate", "importance", "ablate", "overlap"), train_limit=6)
    results = last_results(played(prepared, allowed=5))
    sentence = "ablate: the time was over after 2 of 6 documents per task; the same command continues"
    assert results["ablate"].unfinished == sentence
    singles = results["ablate"].results.filter(pl.col("procedure") == "single")
    assert set(singles.filter(pl.col("task") != "aggregate")["documents"]) == {2}
    assert results["ablate"].effects["document"].n_unique() > 1
    methods = set(results["overlap"].results["method"])
    assert methods >= {"gradient", "ablation"}, "later stages have the rankings there are"


def test_label_effects_are_of_the_documents_that_both_passes_have() -> None:
    prepared = prepared_for(
        experiments=("importance", "ablate"), labels="right", train_limit=6, shots=(0, 1, 4), label_drops=True
    )
    assert {control.shots for control in prepared.train_controls} == {4}
    names = [part.name for work in planned_work(prepared) for part in work.parts]
    chunks = ["000000", "000001", "000002", "000004"]
    assert names[1:] == [f"{name}-{chunk}" for name in ("ablate", "ablate-labels") for chunk in chunks]
    results = last_results(played(prepared, allowed=1 + 4 + 2))["ablate"]
    assert results.unfinished == (
        "ablate: the time was over after 2 of 6 documents per task with shuffled labels; the same command "
        "continues"
    )
    effects = results.results.filter(pl.col("procedure") == "label-effect")
    measured = {"label_effect", "label_effect_acc"}
    assert set(effects["metric"]) == measured | {q_metric(metric) for metric in measured}
    assert set(effects["labels"]) == {"shuffled"}
    in_nats = effects.filter(pl.col("metric") == "label_effect")
    counts = dict(in_nats.group_by("task").agg(pl.col("documents").max()).rows())
    assert counts == {"recall": 2, "knowledge": 2, "repeat": 2, "aggregate": 6}
    keys = ["metric", "kind", "layer", "head"]
    # q-values of a mean are no means of q-values.
    effects = effects.filter(pl.col("metric").is_in(measured))
    of_tasks = effects.filter(pl.col("task") != "aggregate").group_by(keys).agg(pl.col("value").mean())
    both = effects.filter(pl.col("task") == "aggregate").join(of_tasks, on=keys, nulls_equal=True)
    assert len(both) == 2 * 36
    np.testing.assert_allclose(both["value"], both["value_right"])
    singles = results.results.filter(pl.col("procedure") == "single", pl.col("task") != "aggregate")
    assert set(singles["documents"]) == {6}
    assert set(singles["labels"]) == {None, "right"}
    # A pass that has not begun leaves no effect.
    before = last_results(played(prepared, allowed=3))["ablate"].results
    assert before.filter(pl.col("procedure") == "label-effect").is_empty()


def test_curves_are_for_later_stages_where_the_searches_behind_them_are_cut() -> None:
    prepared = prepared_for(curves=("heads",))
    whole = played(prepared)
    last_results(whole)
    first_step = next(number for number, part in enumerate(whole.asked) if part.name == "prune-00000")
    cut = played(prepared, allowed=first_step + 1, finished={"induction", "induction-evaluate"})
    results = last_results(cut)
    assert results["prune"].unfinished.startswith("prune: the time was over")
    assert not results["induction"].unfinished
    curves = {made.name for made in results["prune"].masks}
    assert curves
    induction = results["induction"].results
    of_masks = induction.filter((pl.col("procedure") == "capacity") & pl.col("mask").is_not_null())
    assert set(of_masks["mask"]) == curves
