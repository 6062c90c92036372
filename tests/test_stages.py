"""A stage describes its work once: what the planner counts is what a run does, whatever the options."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import pytest
from played_work import (
    ALL_CURVES,
    RATES,
    SHARED,
    PatchingPart,
    described,
    is_search,
    played,
    prepared_for,
)

from lowmem_icl.experiments.order import STAGES, run_stages
from lowmem_icl.options import EXPERIMENTS
from lowmem_icl.planning.costs import largest_sweeps, planned_work, row_lengths
from lowmem_icl.planning.measure import Rates
from lowmem_icl.planning.memory import backward_bytes
from lowmem_icl.planning.plan import make_plan
from lowmem_icl.session.patch_parts import PatchEstimatesPart, PatchPart, PromptMeansPart
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.work import GradientsPart, Part, SweepPart


def documents_of(part: Part) -> tuple[Any, ...]:
    """As `described`, without the number of masks."""
    if isinstance(part, SweepPart):
        return part.name, tuple(str((job.task.task, job.task.shots, job.documents)) for job in part.jobs)
    return described(part)


def as_asked(part: Part) -> Any:
    """Parts that patch hold arrays, which are not compared."""
    return (
        PatchingPart(part.name)
        if isinstance(part, PatchPart | PromptMeansPart | PatchEstimatesPart)
        else part
    )


def is_curve(part: Part) -> bool:
    return part.name.startswith("curves")


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


QUICK = (
    {"screen": None, "protocol": "corrected", "curves": ALL_CURVES},
    {"screen": None, "protocol": "reference", "curves": ()},
    {"screen": "attribution", "protocol": "reference", "curves": ALL_CURVES},
    {"screen": "attribution", "protocol": "corrected", "curves": ()},
)
"""Every two of a screen, a protocol and curves, as they go together."""


def is_for_the_long_run(changes: Mapping[str, Any]) -> bool:
    """Whether others have every two of these options; or all experiments but one at an end, where others
    have fewer of the first, or all of the last.
    """
    if "protocol" in changes:
        return "demonstrations" in changes or not any(changes.items() >= quick.items() for quick in QUICK)
    return set(changes) == {"experiments"} and changes["experiments"] in (
        EXPERIMENTS[:4], EXPERIMENTS[:5], EXPERIMENTS[-5:],
    )  # fmt: skip


def with_slow_ones() -> Iterator[Any]:
    for changes in all_options():
        marks = [pytest.mark.slow] if is_for_the_long_run(changes) else []
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
            expected_again = [as_asked(part) for part in again]
            assert [part for part in asked if part.name in names] == expected_again
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
