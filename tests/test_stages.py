"""A stage describes its work once: what the planner counts is what a run does, whatever the options."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import polars as pl
import pytest

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.head_scores import HeadScores
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.experiments.order import STAGES, run_stages
from lowmem_icl.options import EXPERIMENTS, RunOptions
from lowmem_icl.planning.costs import largest_sweeps, planned_work, row_lengths, work_left
from lowmem_icl.planning.hours import Deadlines
from lowmem_icl.planning.measure import Rates
from lowmem_icl.planning.memory import backward_bytes
from lowmem_icl.planning.plan import make_plan
from lowmem_icl.session.prepare import Prepared, prepare
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.work import GradientsPart, HeadScoresPart, OutOfTime, Part, SweepPart, Work

RATES = Rates(
    call_seconds=0,
    attention_seconds=1e-6,
    projection_seconds=1e-6,
    ffn_seconds=2e-6,
    backward_seconds=1e-5,
    answer_seconds=1e-6,
    disk_bytes_per_second=1e12,
)
ALL_CURVES = ("heads", "ffns", "combined", "transfer", "cross-shot", "random")
SMALL = {"limit": 3, "train_limit": 3, "random_draws": 2, "shots": (0, 4)}
SHARED = {"demonstrations": "shared", "demonstration_sets": 3}
DROPS = {"label_drops": True}


@dataclass(frozen=True)
class PlayedWork(Work):
    """Work that answers every part with arbitrary numbers of the right shapes,
    and notes what it was asked.
    """

    asked: list[Part] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    allowed: int = 10**9
    no_time_for: str = "nothing"

    def _ask(self, part: Part) -> np.random.Generator:
        for earlier in (earlier for earlier in self.asked if earlier.name == part.name):
            assert content_of(part) == content_of(earlier), f"{part.name} would be read from another's file"
        if part.name not in self.finished:
            if len(self.asked) >= self.allowed or part.name.startswith(self.no_time_for):
                raise OutOfTime
            self.asked.append(part)
            self.finished.add(part.name)
        return np.random.default_rng(sum(part.name.encode()))

    def sweep(self, part: SweepPart) -> list[Scores]:
        rng, scores = self._ask(part), []
        for job in part.jobs:
            shape = (len(job.masks), self.prepared.outline(job.task, job.documents).option_count)
            scores.append(
                Scores(rng.normal(size=shape), rng.random(shape) < 0.5, np.ones(shape, dtype=np.bool_))
            )
        return scores

    def gradients(self, part: GradientsPart) -> list[UnitGradients]:
        rng, skeleton = self._ask(part), self.prepared.skeleton
        found = []
        for task in part.tasks:
            options = self.prepared.outline(task, gold_only=True).option_count
            empty = UnitGradients.empty(len(task.documents), options, skeleton.layers, skeleton.heads)
            values: dict[str, Any] = {
                name: rng.random(array.shape) for name, array in empty.arrays().items() if name != "finished"
            }
            found.append(replace(empty, **values))
        return found

    def head_scores(self, part: HeadScoresPart) -> HeadScores:
        rng, skeleton = self._ask(part), self.prepared.skeleton
        empty = HeadScores.empty(len(part.questions.base_tokens), skeleton.layers, skeleton.heads)
        values: dict[str, Any] = {
            name: rng.random(array.shape) for name, array in empty.arrays().items() if name != "finished"
        }
        return replace(empty, **values)


class _NoParts:
    def has(self, name: str) -> bool:
        return False


def played(prepared: Prepared, **changes: Any) -> PlayedWork:
    nothing: Any = None
    parts: Any = _NoParts()
    return PlayedWork(prepared, nothing, SweepLimits.of(1 << 30), nothing, parts, nothing, **changes)


def prepared_for(**changes: Any) -> Prepared:
    return prepare(RunOptions.model_validate({"tasks": ("recall", "knowledge", "repeat")} | SMALL | changes))


def described(part: Part) -> tuple[Any, ...]:
    """What a part is: its name, and for every job the documents and how many masks they are under."""
    if isinstance(part, SweepPart):
        jobs = [(job.task.task, job.task.shots, job.documents, len(job.masks)) for job in part.jobs]
        return part.name, tuple(map(str, jobs))
    if isinstance(part, GradientsPart):
        return part.name, tuple((task.task, task.shots) for task in part.tasks)
    return (part.name,)


def content_of(part: Part) -> Any:
    """What the file of a part depends on, of those that have masks."""
    if isinstance(part, SweepPart):
        return [(job.task.documents, job.documents, job.masks) for job in part.jobs]
    return [(task.documents, part.masks) for task in part.tasks] if isinstance(part, GradientsPart) else None


def documents_of(part: Part) -> tuple[Any, ...]:
    """As `described`, without the number of masks."""
    if isinstance(part, SweepPart):
        return part.name, tuple(str((job.task.task, job.task.shots, job.documents)) for job in part.jobs)
    return described(part)


def is_curve(part: Part) -> bool:
    return part.name.startswith("curves")


def is_search(part: Part) -> bool:
    return part.name == "" or part.name.startswith(("prune-0", "prune-compared", "prune-certify"))


def all_options() -> Iterator[Mapping[str, Any]]:
    for screen, protocol, curves, shared in product(
        (None, "attribution"), ("corrected", "reference"), ((), ALL_CURVES), (False, True)
    ):
        demonstrations = {"demonstrations": "shared", "demonstration_sets": 2} if shared else {}
        exact = 5 if screen else None
        yield {"screen": screen, "exact": exact, "protocol": protocol, "curves": curves} | demonstrations
    for n_experiments in range(1, len(EXPERIMENTS)):
        yield {"experiments": EXPERIMENTS[:n_experiments]}
        yield {"experiments": EXPERIMENTS[-n_experiments:]}
    yield {"rescore": True}
    yield {"label_drops": True}
    yield {"label_drops": True, "labels": "right", "experiments": ("importance", "ablate"), **SHARED}
    yield {"label_drops": True, "screen": "attribution", "exact": 5}
    yield {"labels": "right"}
    yield {"labels": ("right", "foreign"), "limit": 130, "experiments": ("evaluate",)}
    yield {"experiments": ("importance", "prune")}
    yield {"experiments": ("ablate", "prune", "overlap")}
    yield {"tasks": ("recall",), "shots": (4,)}
    yield {"direction": "up", "order": "joint"}
    yield {"search": "nested"}
    yield {"search": "nested", "experiments": ("prune",), "screen": "attribution", "exact": 8}
    yield {"search": "nested", "screen": "attribution", "exact": 8, "direction": "up"}


def with_slow_ones() -> Iterator[Any]:
    """What differs by shared demonstrations alone is for the long run."""
    for changes in all_options():
        marks = [pytest.mark.slow] if "demonstrations" in changes and changes.get("protocol") else []
        yield pytest.param(changes, marks=marks, id=str(changes))


@pytest.mark.parametrize("changes", tuple(with_slow_ones()))
def test_the_plan_describes_what_a_run_does(changes: Mapping[str, Any]) -> None:
    prepared = prepared_for(**{name: value for name, value in changes.items() if value is not None})
    planned = [part for work in planned_work(prepared) for part in work.parts]
    work = played(prepared)
    results: dict[str, StageResult] = {}
    for stage, result, _ in run_stages(work, {}):
        results[stage.name] = result
    asked = [part for part in work.asked if not is_search(part)]
    if prepared.options.screen is not None:
        # Nothing is ranked by a few ablations: curves come before these.
        asked.sort(key=lambda part: [part.name for part in planned].index(part.name))
    assert [documents_of(part) for part in planned if not is_search(part)] == [
        documents_of(part) for part in asked
    ]
    certain = ("evaluate-", "importance", "ablate-", "rescore-", "curves-ffns-")
    for expected, actual in zip([part for part in planned if not is_search(part)], asked, strict=True):
        if expected.name.startswith(certain):
            assert described(expected) == described(actual)
    # With the results of the stages before it, a stage describes exactly what it did.
    for stage in STAGES:
        if stage.name in results and not stage.rough:
            again = [part for part in stage.parts(prepared, **stage.given(results)) if not is_search(part)]
            names = {part.name for part in again}
            assert [part for part in asked if part.name in names] == again
    if "prune" in results and prepared.options.protocol == "corrected" and not prepared.options.rescore:
        prune = next(stage for stage in STAGES if stage.name == "prune")
        again = [part for part in prune.parts(prepared, **prune.given(results)) if is_curve(part)]
        assert [part for part in asked if is_curve(part)] == again


def test_curves_are_counted_with_about_as_many_masks_as_there_are() -> None:
    prepared = prepared_for(curves=ALL_CURVES, experiments=("importance", "ablate", "prune"))
    work = played(prepared)
    list(run_stages(work, {}))

    def n_masks(parts: list[Part]) -> int:
        return sum(
            len(job.masks)
            for p in parts
            if isinstance(p, SweepPart) and p.name.startswith("curves")
            for job in p.jobs
        )

    planned = [part for stage in planned_work(prepared) for part in stage.parts]
    # Rankings may happen to remove the same.
    assert n_masks(planned) == pytest.approx(n_masks(work.asked), rel=0.1)


@pytest.mark.parametrize("search", ["exact", "nested"])
def test_searches_are_counted_about_as_they_go(search: str) -> None:
    prepared = prepared_for(experiments=("prune",), curves=(), search=search)
    work = played(prepared)
    list(run_stages(work, {}))

    def variants(parts: list[Part]) -> float:
        return sum(
            p.times * len(job.masks)
            for p in parts
            if isinstance(p, SweepPart) and is_search(p)
            for job in p.jobs
        )

    planned = [part for stage in planned_work(prepared) for part in stage.parts]
    assert variants(work.asked) / 3 < variants(planned) < 3 * variants(work.asked)


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
    parts: Any = _NoParts()
    return TimedWork(prepared, nothing, limits, nothing, parts, nothing, clock=PlayedClock())


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8, 1.1])
@pytest.mark.parametrize(("postponed", "label_drops"), [(False, False), (True, False), (False, True)])
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


def last_results(work: PlayedWork) -> dict[str, StageResult]:
    """What every stage ends with."""
    return {stage.name: result for stage, result, is_over in run_stages(work, {}) if is_over}


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
    assert set(effects["metric"]) == {"label_effect", "label_effect_acc"}
    assert set(effects["labels"]) == {"shuffled"}
    in_nats = effects.filter(pl.col("metric") == "label_effect")
    counts = dict(in_nats.group_by("task").agg(pl.col("documents").max()).rows())
    assert counts == {"recall": 2, "knowledge": 2, "repeat": 2, "aggregate": 6}
    keys = ["metric", "kind", "layer", "head"]
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


def test_the_lengths_that_memory_is_planned_for_are_those_of_the_rows() -> None:
    prepared = prepared_for(experiments=("evaluate", "importance", "ablate", "induction"))
    planned = planned_work(prepared)
    packed = {
        (task.task, task.shots, name): prepared.pack(task, gold_only=name == "importance").packed
        for name in ("evaluate", "train", "importance")
        for task in getattr(prepared, name)
    }
    in_sweeps = [row for rows in packed.values() for row in rows.rows]
    longest = max(len(row) + (0 if row.stem is None else len(row.stem)) for row in in_sweeps)
    lengths = row_lengths(prepared, planned)
    sequences = [len(tokens) for tokens in prepared.random_sequences.repeated]
    assert lengths.longest == max(longest, *sequences)
    assert min(map(len, in_sweeps)) <= lengths.mean <= longest
    without = [work for work in planned if work.stage.name != "induction"]
    assert row_lengths(prepared, without).longest <= longest
    # Where nothing is left to do, by a row of the clean evaluation.
    assert 0 < row_lengths(prepared, []).longest <= longest


def test_memory_is_dealt_out_by_the_largest_sweep_of_every_stage_that_is_known() -> None:
    prepared = prepared_for(train_limit=6)
    planned = planned_work(prepared)
    sweeps = {part.name for part in largest_sweeps(prepared, planned)}
    ablate = [part for work in planned if work.stage.name == "ablate" for part in work.parts]
    documents = {
        part.name: sum(len(job.task.documents[job.documents]) for job in part.jobs)
        for part in ablate
        if isinstance(part, SweepPart)
    }
    most = max(documents.values())
    assert sweeps - {"evaluate-labels-000000"} <= {name for name, n in documents.items() if n == most}
    assert len(sweeps) == 2, "what searches and induction ask for is not known beforehand"


@pytest.mark.parametrize(
    "changes",
    [{"experiments": ("prune",), "screen": "attribution", "exact": 8, "search": "nested"}, {}],
    ids=str,
)
def test_a_run_that_goes_back_through_layers_has_the_memory_and_the_rates_for_that(
    changes: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_for(**changes)
    parts = [part for stage in planned_work(prepared) for part in stage.parts]
    assert any(isinstance(part, GradientsPart) for part in parts)
    asked: list[bool] = []

    def measured(*_: Any, backward: bool) -> Rates:
        asked.append(backward)
        return RATES

    monkeypatch.setattr("lowmem_icl.planning.plan.measure", measured)
    plan = make_plan(prepared)
    assert asked == [True]
    back = backward_bytes(prepared.skeleton, plan.memory.micro_batch_tokens, 1)
    assert plan.memory.working_bytes >= back
