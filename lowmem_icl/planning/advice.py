"""Which option would save most of a plan: alternatives are counted like the plan itself."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from lowmem_icl.errors import LowmemIclError
from lowmem_icl.experiments.ablate.sweeps import units_of
from lowmem_icl.experiments.prune import certify
from lowmem_icl.model.streamed import resident_layers
from lowmem_icl.options import DEFAULT_EXACT, RunOptions, flag_name
from lowmem_icl.planning.costs import StageWork, planned_work, work_left
from lowmem_icl.planning.machine_file import MachineFile
from lowmem_icl.planning.plan import Advice, Counting, Plan, StagePlan, memory_for, wave_tokens_of
from lowmem_icl.session.prepare import Prepared

LEAST_SAVED = 0.1
MOST_ADVICE = 3
GIGABYTE = 10**9


@dataclass(frozen=True)
class _Alternative:
    """Other options, as flags, and the run with them; `work`: that of the stages that they change;
    `deals_memory`: whether they change how memory is dealt out.
    """

    flags: str
    prepared: Prepared
    work: Sequence[StageWork]
    deals_memory: bool = False


def advice(
    prepared: Prepared,
    plan: Plan,
    prepare: Callable[[RunOptions], Prepared],
    finished: Callable[[str], bool],
    machine: MachineFile | None = None,
) -> tuple[Advice, ...]:
    """Return what would save at least a tenth of the expected time or of the reads, the best three.

    prepare: prepares a plan with other options.
    """
    before = _totals(plan.stages)
    found = []
    for other in _alternatives(prepared, plan, prepare):
        try:
            after = _totals(_stages_with(other, plan, finished, machine))
        except LowmemIclError:
            # What does not fit, or lacks documents, is no advice.
            continue
        saved = [1 - new / old if old else 0.0 for new, old in zip(after, before, strict=True)]
        found.append(Advice(other.flags, *saved))
    found = [one for one in found if one.most >= LEAST_SAVED]
    return tuple(sorted(found, key=lambda one: one.most, reverse=True)[:MOST_ADVICE])


def _alternatives(
    prepared: Prepared, plan: Plan, prepare: Callable[[RunOptions], Prepared]
) -> Iterator[_Alternative]:
    options, experiments = prepared.options, set(prepared.options.experiments)
    everything = planned_work(prepared)

    def changed(**update: object) -> Prepared:
        return replace(prepared, options=options.model_copy(update=update))

    if options.demonstrations == "per-document" and any(options.resolved_shots):
        shared = prepare(options.model_copy(update={"demonstrations": "shared"}))
        yield _Alternative("--demonstrations shared", shared, planned_work(shared))
    screens = {"importance", "ablate"} <= experiments and options.screen is None
    if screens and len(units_of(prepared)) > DEFAULT_EXACT:
        with_screen = changed(screen="attribution", experiments=("importance", "ablate"))
        ablations = [work for work in planned_work(with_screen) if work.stage.name == "ablate"]
        yield _Alternative(f"--screen attribution --exact {DEFAULT_EXACT}", with_screen, ablations)
    if prepared.certify and any(task.documents for task in prepared.certify):
        pruning = [_without_certificates(work) for work in everything if work.stage.name == "prune"]
        yield _Alternative("--certify-limit 0", prepared, pruning)
    name, given = (
        ("memory", plan.memory.allowance_bytes)
        if plan.memory.device_bytes is None
        else ("device_memory", plan.memory.device_bytes)
    )
    doubled = math.ceil(2 * given / GIGABYTE)
    yield _Alternative(
        f"{flag_name(name)} {doubled}GB", changed(**{name: doubled * GIGABYTE}), everything, deals_memory=True
    )


def _without_certificates(work: StageWork) -> StageWork:
    return replace(work, parts=tuple(part for part in work.parts if not certify.is_part(part)))


def _stages_with(
    other: _Alternative, plan: Plan, finished: Callable[[str], bool], machine: MachineFile | None
) -> list[StagePlan]:
    """Return the stages of a plan with other options; those that these do not change are the plan's own."""
    memory, wave_tokens, store = plan.memory, plan.wave_tokens, other.prepared.store
    if other.deals_memory:
        memory = memory_for(other.prepared, list(other.work), machine)
        wave_tokens = wave_tokens_of(store, plan.rates, len(resident_layers(store, memory.resident_bytes)))
    counting = Counting(other.prepared, plan.rates, memory, wave_tokens)
    stages = {stage.experiment: stage for stage in plan.stages}
    for work in work_left(other.work, finished):
        stages[work.stage.name], _ = counting.stage(work)
    return list(stages.values())


def _totals(stages: Collection[StagePlan]) -> tuple[float, float, float]:
    """Return seconds, bytes read and operations of stages."""
    return (
        sum(stage.seconds for stage in stages),
        float(sum(stage.read_bytes for stage in stages)),
        float(sum(stage.operations for stage in stages)),
    )
