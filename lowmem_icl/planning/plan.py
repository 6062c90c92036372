"""The plan of a run: what every experiment reads and computes, how long it takes here, and what fits the hours there are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from lowmem_icl.engine.cost import SweepCost, gradients_cost, operations, sweep_cost
from lowmem_icl.engine.schedule import BlockRow, SweepLimits, head_blocks, row_blocks
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.experiments.induction.stage import PART, questions_cost
from lowmem_icl.experiments.prune.rescoring import RESCORED_LEVELS, rescoring_part
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.families import Skeleton
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import resident_layers
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.costs import Laid, planned_sweeps
from lowmem_icl.planning.measure import Rates, measure
from lowmem_icl.planning.memory import FREE_SHARE, MemoryPlan, plan_memory
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.system.machine import chosen_device, device_allowance

# A stop loses the wave in work: longer ones are cut, unless reading would then take longer than computing.
WAVE_SECONDS = 900.0
COMPUTE_TO_READ = 4.0
# Of the time left for ablations and pruning, pruning may take so much; else it waits until the ablations are done.
PRUNE_SHARE = 0.5
ROUGH_MARGIN = 1.3
SHORTEST_MEASURED_ROW = 16


@dataclass(frozen=True)
class StagePlan:
    """One experiment's cost: operations, layers and bytes read, expected seconds; what finished parts hold is left out.

    `rough`: how much it takes depends on what it finds. `documents`: how many documents a task are reached in time, where
    the experiment is cut by --hours; `skipped`: it waits for another run of the same command.
    """

    experiment: str
    operations: int
    layers_read: int
    read_bytes: int
    seconds: float
    rough: bool = False
    documents: int | None = None
    skipped: bool = False


@dataclass(frozen=True)
class Plan:
    """The whole run: what is on disk and in memory, this machine's rates, and the cost of every experiment.

    `convert_bytes`: what is still to be read to make the store, 0 where it is there. `wave_tokens`: the bound of a wave.
    `stop_after`: seconds from the start after which an experiment must stop, by --hours.
    """

    memory: MemoryPlan
    store_bytes: int
    convert_bytes: int
    rates: Rates
    wave_tokens: int
    stages: tuple[StagePlan, ...]
    hours: float | None = None
    stop_after: dict[str, float] = field(default_factory=dict)

    @property
    def limits(self) -> SweepLimits:
        """What sweeps may use."""
        return self.memory.limits(self.wave_tokens)

    @property
    def skipped(self) -> frozenset[str]:
        """Experiments that wait for another run."""
        return frozenset(stage.experiment for stage in self.stages if stage.skipped)

    def as_json(self) -> dict[str, object]:
        """Return plain values for run.json."""
        return asdict(self)


def check_memory(options: RunOptions, prepared: Prepared, laid: Laid) -> MemoryPlan:
    """Return how memory is dealt out; raise InputError or DoesNotFit where a run cannot be held."""
    device = chosen_device(options.device)
    allowed = device_allowance(device, options.device_memory, FREE_SHARE)
    skeleton = prepared.store.skeleton

    def layers_read(memory: MemoryPlan) -> float:
        """Count the reads of the largest chunks, which decide."""
        total = 0.0
        resident = resident_layers(prepared.store, memory.resident_bytes)
        for experiment in ("evaluate", "ablate"):
            sweeps = list(planned_sweeps(experiment, options, prepared, laid, ()))
            largest = max(
                sweeps, key=lambda sweep: sum(job.packed.token_count for job in sweep.jobs), default=None
            )
            if largest is not None:
                total += sweep_cost(
                    largest.jobs, skeleton.width, skeleton.layers, memory.limits(), resident
                ).layers_read
        return total

    return plan_memory(options, prepared.store, laid.longest_tokens, allowed, layers_read)


def make_plan(
    options: RunOptions,
    prepared: Prepared,
    laid: Laid,
    *,
    masks: Sequence[Mask] = (),
    hours: float | None = None,
    finished: Callable[[str], bool] = lambda part: False,
) -> Plan:
    """Plan all experiments of a run; takes two seconds to measure this machine.

    `masks`: those given to `evaluate`; `hours`: how many there are left; `finished`: which parts are there already. Raises
    DoesNotFit where the hours do not do for the experiments that all others build on.
    """
    store, skeleton = prepared.store, prepared.store.skeleton
    memory = check_memory(options, prepared, laid)
    resident = resident_layers(store, memory.resident_bytes)
    rates = measure(
        store,
        max(SHORTEST_MEASURED_ROW, laid.mean_tokens),
        memory.alive_bytes,
        memory.micro_batch_tokens,
        chosen_device(options.device),
        backward="importance" in options.experiments,
    )
    wave_tokens = _wave_tokens(store, rates, len(resident))
    limits = memory.limits(wave_tokens)
    whole = SweepCost()
    stages: list[StagePlan] = []
    chunk_seconds: list[tuple[int, float]] = []

    def seconds_of(cost: SweepCost) -> float:
        reading = cost.layers_read * store.layer_bytes / rates.disk_bytes_per_second
        return max(rates.seconds(cost, memory.micro_batch_tokens), reading)

    for experiment in options.experiments:
        cost, laying_out = SweepCost(), laid.train_seconds
        if experiment == "importance":
            if finished("importance"):
                continue
            cost = _one_backward(laid, skeleton, limits, len(resident))
        else:
            for sweep in planned_sweeps(experiment, options, prepared, laid, masks):
                if sweep.part and finished(sweep.part):
                    continue
                one = (
                    sweep_cost(
                        sweep.jobs, skeleton.width, skeleton.layers, limits, resident, cached=sweep.cached
                    )
                    * sweep.times
                )
                cost += one
                if experiment == "ablate":
                    chunk_seconds.append((sweep.documents, seconds_of(one)))
            if experiment == "prune" and options.rescore:
                again = sum(not finished(rescoring_part(level)) for level in RESCORED_LEVELS)
                cost += _one_backward(laid, skeleton, limits, len(resident)) * again
            if experiment == "induction" and not finished(PART):
                cost += _head_scores_cost(laid, prepared, limits, len(resident))
            if experiment in ("evaluate", "prune"):
                laying_out = laid.evaluate_seconds
        if not cost.attention_tokens:
            continue
        if not whole.attention_tokens:
            # Resident layers are read once, by whichever experiment comes first.
            cost += SweepCost(layers_read=len(resident))
        whole += cost
        stages.append(
            StagePlan(
                experiment,
                operations=operations(cost, skeleton),
                layers_read=round(cost.layers_read),
                read_bytes=round(cost.layers_read) * store.layer_bytes,
                seconds=seconds_of(cost) + laying_out,
                rough=experiment in ("prune", "induction"),
            )
        )
    checkpoint = prepared.located.checkpoint
    to_convert = 0 if store.is_written or checkpoint is None else checkpoint.size_bytes
    plan = Plan(memory, store.size_bytes, to_convert, rates, wave_tokens, tuple(stages))
    return plan if hours is None else within_hours(plan, hours, chunk_seconds)


def _one_backward(laid: Laid, skeleton: Skeleton, limits: SweepLimits, resident: int) -> SweepCost:
    """Return what one pass forward and back over all training documents costs."""
    members = [BlockRow(number, row) for number, rows in enumerate(laid.gold) for row in rows.rows]
    blocks = row_blocks(members, skeleton.width, skeleton.layers, limits, keeps_clean=True)
    cost = gradients_cost(laid.gold, skeleton.layers)
    return replace(cost, layers_read=2 * (skeleton.layers - resident) * len(blocks))


def _head_scores_cost(laid: Laid, prepared: Prepared, limits: SweepLimits, resident: int) -> SweepCost:
    """Return what scoring heads takes: one read of the weights, or as many as there are blocks that fit."""
    skeleton = prepared.store.skeleton
    assert laid.questions is not None
    rows = [BlockRow(place, row) for place, row in enumerate(laid.questions.rows)]
    blocks = head_blocks(rows, skeleton.width, skeleton.layers, limits)
    layers_read = len(blocks) * (skeleton.layers - resident)
    return questions_cost(laid.questions, skeleton, limits.micro_batch_tokens, layers_read)


def _wave_tokens(store: Store, rates: Rates, resident: int) -> int:
    """Return how many layer-tokens a wave may take."""
    per_token = rates.attended_seconds + rates.projected_seconds + rates.fed_seconds
    reading = (store.skeleton.layers - resident) * store.layer_bytes / rates.disk_bytes_per_second
    return max(1, round(max(WAVE_SECONDS, COMPUTE_TO_READ * reading) / per_token))


def within_hours(plan: Plan, hours: float, chunk_seconds: Sequence[tuple[int, float]]) -> Plan:
    """Return the plan with the largest programme that fits: ablations take what the others leave."""
    total = hours * 3600
    seconds = {stage.experiment: stage.seconds for stage in plan.stages}
    first = seconds.get("evaluate", 0.0) + seconds.get("importance", 0.0)
    if first > total:
        raise DoesNotFit(
            f"--hours {hours:g}: evaluate and importance alone take about {first / 3600:.2g} hours; give --hours "
            f"{math.ceil(10 * first / 3600) / 10:g} or more, or fewer documents (--limit, --train-limit)"
        )
    left = max(0.0, total - first - seconds.get("induction", 0.0))
    pruning = ROUGH_MARGIN * seconds.get("prune", 0.0)
    ablating = seconds.get("ablate", 0.0)
    skip_prune = bool(ablating) and pruning > left - ablating and pruning > PRUNE_SHARE * left
    for_ablations = left - (0.0 if skip_prune else min(pruning, left))
    reached, used = 0, 0.0
    for documents, needed in chunk_seconds:
        used += needed
        if used > for_ablations:
            break
        reached = documents
    stages = []
    for stage in plan.stages:
        if stage.experiment == "ablate" and used > for_ablations:
            stage = replace(stage, documents=reached, seconds=min(stage.seconds, for_ablations))
        if stage.experiment == "prune" and skip_prune:
            stage = replace(stage, skipped=True)
        stages.append(stage)
    stop_after = dict.fromkeys(seconds, total) | {"ablate": first + for_ablations}
    return replace(plan, stages=tuple(stages), hours=hours, stop_after=stop_after)
