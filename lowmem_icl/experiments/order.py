"""The experiments in the order in which they build on each other. Adding one is a folder, a row here, and its
section of the page.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowmem_icl.experiments.ablate import stage as ablate
from lowmem_icl.experiments.evaluate import stage as evaluate
from lowmem_icl.experiments.icl_heads import stage as icl_heads
from lowmem_icl.experiments.importance import stage as importance
from lowmem_icl.experiments.induction import stage as induction
from lowmem_icl.experiments.overlap import stage as overlap
from lowmem_icl.experiments.patch import stage as patch
from lowmem_icl.experiments.prune import stage as prune
from lowmem_icl.options import Experiment, RunOptions
from lowmem_icl.session.failures import Failure, Setting, SettingsFailed, without
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.work import OutOfTime, Part, Work

Share = Literal["whole", "leftover", "stretched", "postponed"]


@dataclass(frozen=True)
class Stage:
    """One experiment's story.

    `needs`: the stages whose results it is given as parameters, None for those that were not asked for.
    `parts`: (prepared, **needs) to the work it asks for; the planner counts it, `run` does it. `run`: (work,
    **needs) to its result, as often as there is more to show. `expected`: a stand-in for its result before
    there is one, by which the planner describes later stages. `share`: what it gets of limited hours.
    `whole`: all it takes, the others build on it; `leftover`: what it takes, as far as there is time;
    `stretched`: it goes on while there is time; `postponed`: it waits, for another run if need be, until all
    it needs is finished. `rough`: how much it takes depends on what it finds. `notes`: sentences that a plan
    says of it. `early`: what of its work follows from `early_after` alone is done as soon as that is over,
    and shown; `is_early`: which of its parts these are. `builds_on`: by options, the stages without whose
    numbers of a setting it can do nothing for it; `needs_tasks`: whether it does nothing without tasks.
    """

    name: Experiment
    needs: tuple[Experiment, ...]
    parts: Callable[..., Iterable[Part]]
    run: Callable[..., Iterator[StageResult]]
    expected: Callable[[Prepared], StageResult] = lambda prepared: StageResult()
    share: Share = "leftover"
    rough: bool = False
    notes: Callable[[Prepared], Sequence[str]] = lambda prepared: ()
    early: Callable[..., Iterator[StageResult]] | None = None
    early_after: Experiment | None = None
    is_early: Callable[[Prepared, Part], bool] = lambda prepared, part: False
    builds_on: Callable[[RunOptions], tuple[Experiment, ...]] = lambda options: ()
    needs_tasks: bool = True

    def given(self, results: Mapping[str, StageResult]) -> dict[str, Any]:
        """Return what it needs of the results there are."""
        return {name: results.get(name) for name in self.needs}


STAGES = (
    Stage("evaluate", (), evaluate.parts, evaluate.run, share="whole"),
    Stage("importance", (), importance.parts, importance.run, importance.expected, share="whole"),
    Stage(
        "ablate",
        ("importance",),
        ablate.parts,
        ablate.run,
        ablate.expected,
        share="stretched",
        notes=ablate.notes,
        builds_on=lambda options: () if options.screen is None else ("importance",),
    ),
    Stage(
        "prune",
        ("importance", "ablate"),
        prune.parts,
        prune.run,
        share="postponed",
        rough=True,
        notes=prune.notes,
        early=prune.run_early,
        early_after="importance",
        is_early=prune.is_early,
        builds_on=lambda options: ("importance", "ablate"),
    ),
    Stage("patch", (), patch.parts, patch.run, needs_tasks=False),
    Stage(
        "induction",
        ("importance", "ablate", "prune"),
        induction.parts,
        induction.run,
        rough=True,
        needs_tasks=False,
    ),
    Stage(
        "icl-heads",
        ("patch", "induction"),
        icl_heads.parts,
        icl_heads.run,
        rough=True,
        builds_on=lambda options: ("patch",),
        needs_tasks=False,
    ),
    Stage("overlap", ("importance", "ablate"), overlap.parts, overlap.run, needs_tasks=False),
)


def _is_whole(work: Work, stage: Stage, results: Mapping[str, StageResult]) -> bool:
    """Tell whether the stages that a stage needs are finished; its parts depend on all they find."""
    asked = [name for name in stage.needs if name in work.prepared.options.experiments]
    return all(name in results and not results[name].unfinished for name in asked)


def run_stages(work: Work, deadlines: Mapping[str, float]) -> Iterator[tuple[Stage, StageResult, bool]]:
    """Run the experiments asked for; yields each one's result whenever it has more, and whether it is over.

    deadlines: by experiment, the time by the work's clock at which it must stop, asked for when it begins.
    What does not get done in the time there is says so in its result, and so does what values that are not
    finite leave undone.
    """
    results: dict[str, StageResult] = {}
    early: dict[str, StageResult] = {}
    for stage in STAGES:
        if stage.name not in work.prepared.options.experiments:
            continue
        latest = early.get(stage.name, StageResult())
        if stage.share == "postponed" and not _is_whole(work, stage, results):
            sentence = f"{stage.name}: waits for the ablations to finish; the same command continues"
            latest = replace(latest, unfinished=sentence)
        else:
            try:
                timed = replace(work, deadline=deadlines.get(stage.name, float("inf")), stage=stage.name)
                for latest in _without_what_fails(timed, stage, results):
                    # Also where it is cut: later stages go on with what there is.
                    results[stage.name] = latest
                    yield stage, latest, False
            except OutOfTime:
                sentence = (
                    f"{stage.name}: the time was over before it was finished; the same command continues"
                )
                latest = replace(latest, unfinished=sentence)
        yield stage, latest, True
        if not latest.unfinished:
            for later, result in _early(work, stage, deadlines, results):
                early[later.name] = result
                yield later, result, False


def _without_what_fails(
    work: Work, stage: Stage, results: Mapping[str, StageResult]
) -> Iterator[StageResult]:
    """Run a stage, and where settings fail run it again without them, which finds all others in their parts;
    what it is given stays. Where it fails for no setting of its own, what it has found so far is all.
    """
    failures = _inherited(work, stage, results)
    while True:
        settings = frozenset(failure.setting for failure in failures)
        left = replace(work, prepared=without(work.prepared, settings), everything=work.prepared)
        latest, has_any = StageResult(failures=tuple(failures)), False
        try:
            if left.prepared.evaluate or not (settings and stage.needs_tasks):
                for result in stage.run(left, **stage.given(results)):
                    latest, has_any = replace(result, failures=tuple(failures)), True
                    yield latest
        except SettingsFailed as error:
            failures += [replace(failure, stage=stage.name) for failure in error.failures]
            if {failure.setting for failure in error.failures} <= {*settings, Setting()}:
                yield replace(latest, failures=tuple(failures))
                return
        else:
            if failures and not has_any:
                yield latest
            return


def _inherited(work: Work, stage: Stage, results: Mapping[str, StageResult]) -> list[Failure]:
    """Return the settings that a stage can do nothing for, since what it builds on failed."""
    found: dict[Setting, Failure] = {}
    for needed in stage.builds_on(work.prepared.options):
        for failure in results[needed].failures if needed in results else ():
            reason = f"not done, since {needed} failed for it"
            found.setdefault(failure.setting, Failure(failure.setting, reason, stage.name))
    return list(found.values())


def _early(
    work: Work, over: Stage, deadlines: Mapping[str, float], results: Mapping[str, StageResult]
) -> Iterator[tuple[Stage, StageResult]]:
    """Do what later stages can do once a stage is over; they find it done when their turn comes."""
    for stage in STAGES:
        asked = stage.name in work.prepared.options.experiments
        if asked and stage.early is not None and stage.early_after == over.name:
            timed = replace(work, deadline=deadlines.get(stage.name, float("inf")), stage=stage.name)
            settings = frozenset(failure.setting for failure in _inherited(work, stage, results))
            left = replace(timed, prepared=without(work.prepared, settings), everything=work.prepared)
            try:
                if left.prepared.evaluate:
                    for result in stage.early(left, results[over.name]):
                        yield stage, result
            except OutOfTime:
                return
            except SettingsFailed:
                # Its own turn comes, and tells.
                continue
