"""The plan of a run: what every experiment reads and computes, how long it takes here, and what fits the
hours there are.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from lowmem_icl.engine.cost import SweepCost, operations
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.experiments.order import STAGES, Share
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import resident_layers
from lowmem_icl.planning.amounts import NOTHING, NOTHING_HELD, Amount, Held, amount_of, held_by
from lowmem_icl.planning.costs import StageWork, largest_sweeps, planned_work, row_lengths, work_left
from lowmem_icl.planning.kept_rates import Measurement, kept_or_measured, rates_key
from lowmem_icl.planning.machine_file import MachineFile
from lowmem_icl.planning.measure import Rates, measure
from lowmem_icl.planning.memory import FREE_SHARE, MemoryPlan, plan_memory
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.work import SweepPart
from lowmem_icl.system.machine import device_allowance, device_in_use, resolved_device

# A stop loses the wave in progress: longer ones are cut, unless reading would then take longer than
# computing.
WAVE_SECONDS = 900.0
COMPUTE_TO_READ = 4.0
SHORTEST_MEASURED_ROW = 16


@dataclass(frozen=True)
class StagePlan:
    """One experiment's cost: operations, layers and bytes read, expected seconds; what finished parts hold is
    left out.

    `rough`: how much it takes depends on what it finds. `documents`: how many documents per task are reached
    in time, where the experiment is cut by --hours; `postponed`: it waits for ablations that are not expected
    to be finished; `early_seconds`: what of it is done before the ablations; `amount`: how many documents are
    scored, with their tokens, and how many times one is without a unit or mask.
    """

    experiment: str
    operations: int
    layers_read: int
    read_bytes: int
    seconds: float
    rough: bool = False
    documents: int | None = None
    postponed: bool = False
    early_seconds: float = 0.0
    amount: Amount = NOTHING


@dataclass(frozen=True)
class Advice:
    """Options that would save: the shares of expected seconds, of bytes read and of operations."""

    options: str
    seconds: float
    read_bytes: float
    operations: float

    @property
    def most(self) -> float:
        """The larger of what it saves in time and in reads."""
        return max(self.seconds, self.read_bytes)


@dataclass(frozen=True)
class Plan:
    """The whole run: what is on disk and in memory, this machine's rates, and the cost of every experiment.

    `convert_bytes`: what is still to be read to make the store, 0 where it is there. `wave_tokens`: the bound
    of a wave. `notes`: what there is to say of experiments beforehand. `machine`: what machine it is for
    where not for this one; `rates_age_seconds`: how long ago this one was measured, 0 where just now; `held`:
    the residuals that are expected to be held at most; `advice`: what would save most; `exact_that_fits`: how
    many units per task and shot count may be ablated exactly within the hours, None where that was not asked.
    """

    memory: MemoryPlan
    store_bytes: int
    convert_bytes: int
    rates: Rates
    wave_tokens: int
    stages: tuple[StagePlan, ...]
    hours: float | None = None
    notes: tuple[str, ...] = ()
    machine: str = ""
    rates_age_seconds: float = 0.0
    held: Held = NOTHING_HELD
    advice: tuple[Advice, ...] = ()
    exact_that_fits: int | None = None

    @property
    def limits(self) -> SweepLimits:
        """What sweeps may use."""
        return self.memory.limits(self.wave_tokens)

    def as_record(self) -> dict[str, object]:
        """Return plain values for run.json."""
        return asdict(self)


def check_memory(prepared: Prepared) -> MemoryPlan:
    """Return how memory is dealt out; raise InputError or DoesNotFit where a run cannot be held."""
    return memory_for(prepared, planned_work(prepared))


def memory_for(
    prepared: Prepared, planned: list[StageWork], machine: MachineFile | None = None
) -> MemoryPlan:
    """Return how memory is dealt out for some work, here or on another machine; raises as `check_memory`."""
    options = prepared.options
    if machine is None:
        allowed = device_allowance(resolved_device(options.device), options.device_memory, FREE_SHARE)
    else:
        allowed = options.device_memory or machine.device_memory_bytes
    sweeps = largest_sweeps(prepared, planned)

    def layers_read(memory: MemoryPlan) -> float:
        """Count the reads of the largest sweeps, which decide."""
        resident = resident_layers(prepared.store, memory.resident_bytes)
        costs = [part.cost(prepared, memory.limits(), resident) for part in sweeps]
        return sum((cost.layers_read for cost in costs), start=0.0)

    return plan_memory(prepared, row_lengths(prepared, planned).longest, allowed, layers_read)


def make_plan(
    prepared: Prepared,
    *,
    hours: float | None = None,
    finished: Callable[[str], bool] = lambda part: False,
    machine: MachineFile | None = None,
    kept_rates: bool = False,
) -> Plan:
    """Plan all experiments of a run; takes two seconds to measure this machine, unless another is given.

    `hours`: how many there are left; `finished`: which parts are there already; `machine`: whose rates and
    memory to plan with, where the options leave memory open; `kept_rates`: whether what was measured of this
    machine in the last ten minutes will do. Raises DoesNotFit where the
    hours do not do for the experiments that all others build on.
    """
    if machine is not None and prepared.options.memory is None:
        options = prepared.options.model_copy(update={"memory": machine.memory_bytes})
        prepared = replace(prepared, options=options)
    everything = planned_work(prepared)
    store, memory = prepared.store, memory_for(prepared, everything, machine)
    resident = resident_layers(store, memory.resident_bytes)
    planned = work_left(everything, finished)
    if machine is None:
        rates, age_seconds = _measured(prepared, planned, memory, kept_rates=kept_rates)
    else:
        rates, age_seconds = machine.rates_for(store), 0.0
    wave_tokens = wave_tokens_of(store, rates, len(resident))
    counting = Counting(prepared, rates, memory, wave_tokens)
    stages: list[StagePlan] = []
    chunks: dict[str, list[Chunk]] = {}
    for work in planned:
        stage, chunks[work.stage.name] = counting.stage(work)
        stages += [stage] if stage.operations else []
    checkpoint = prepared.located.checkpoint
    to_convert = 0 if store.is_written or checkpoint is None else checkpoint.size_bytes
    notes = (
        *([prepared.sample_note] if prepared.sample_note else []),
        *(note for work in planned for note in work.stage.notes(prepared)),
    )
    plan = Plan(memory, store.size_bytes, to_convert, rates, wave_tokens, tuple(stages), notes=notes)
    parts = itertools.chain.from_iterable(work.parts for work in planned)
    held = held_by(parts, prepared, memory.limits(wave_tokens))
    plan = replace(plan, rates_age_seconds=age_seconds, held=held)
    if machine is not None:
        plan = replace(plan, machine=str(machine.machine.get("processor") or "another machine"))
    return plan if hours is None else within_hours(plan, hours, chunks)


def _measured(
    prepared: Prepared, planned: list[StageWork], memory: MemoryPlan, *, kept_rates: bool
) -> Measurement:
    device = resolved_device(prepared.options.device)
    store, limits = prepared.store, memory.limits()
    row_tokens = max(SHORTEST_MEASURED_ROW, row_lengths(prepared, planned).mean)
    backward = prepared.options.takes_gradients

    def now() -> Rates:
        with device_in_use(device, prepared.options.device_memory):
            return measure(store, row_tokens, limits, device, backward=backward)

    if not kept_rates:
        return Measurement(now(), 0.0)
    key = rates_key(store, row_tokens, limits, device, backward=backward)
    return kept_or_measured(prepared.texts.folder, key, now)


class Counting:
    """Turns work into what it costs on this machine; resident layers are read once, by whichever stage comes
    first.
    """

    def __init__(self, prepared: Prepared, rates: Rates, memory: MemoryPlan, wave_tokens: int) -> None:
        self._prepared, self._rates, self._memory = prepared, rates, memory
        self._limits = memory.limits(wave_tokens)
        self._resident = resident_layers(prepared.store, memory.resident_bytes)
        self._has_read_resident = False

    def stage(self, work: StageWork) -> tuple[StagePlan, list["Chunk"]]:
        """Return a stage's plan, and the documents and seconds of each of its sweeps."""
        store, cost, early_seconds, amount = self._prepared.store, SweepCost(), 0.0, Amount()
        chunks: list[Chunk] = []
        for part, part_cost in work.costs(self._prepared, self._limits, self._resident):
            cost += part_cost
            amount += amount_of(part, self._prepared)
            if work.stage.is_early(self._prepared, part):
                early_seconds += self.seconds(part_cost)
            if isinstance(part, SweepPart):
                seconds = self.seconds(part_cost)
                chunks.append(Chunk(part.documents_before, part.documents, seconds))
        if cost.attention_tokens and not self._has_read_resident:
            cost += SweepCost(layers_read=len(self._resident))
            self._has_read_resident = True
        plan = StagePlan(
            work.stage.name,
            operations=operations(cost, self._prepared.skeleton),
            layers_read=round(cost.layers_read),
            read_bytes=round(cost.layers_read) * store.layer_bytes
            + round(self._memory.head_read_bytes(cost.answers)),
            seconds=self.seconds(cost),
            rough=work.stage.rough,
            early_seconds=early_seconds,
            amount=amount,
        )
        return plan, chunks

    def seconds(self, cost: SweepCost) -> float:
        """Return how long this machine computes or reads, whichever is longer."""
        read_bytes = cost.layers_read * self._prepared.store.layer_bytes
        reading = (
            read_bytes + self._memory.head_read_bytes(cost.answers)
        ) / self._rates.disk_bytes_per_second
        return max(self._rates.seconds(cost, self._limits.micro_batch_tokens), reading)


def wave_tokens_of(store: Store, rates: Rates, n_resident: int) -> int:
    """Return how many layer-tokens a wave may take."""
    per_token = rates.attention_seconds + rates.projection_seconds + rates.ffn_seconds
    reading = (store.skeleton.layers - n_resident) * store.layer_bytes / rates.disk_bytes_per_second
    return max(1, round(max(WAVE_SECONDS, COMPUTE_TO_READ * reading) / per_token))


def within_hours(plan: Plan, hours: float, chunks: Mapping[str, Sequence["Chunk"]]) -> Plan:
    """Return the plan with the largest programme that fits: stretched stages take what the others leave.

    chunks: by experiment, the documents and seconds of each of its sweeps.
    """
    total = hours * 3600
    seconds = {stage.experiment: stage.seconds for stage in plan.stages}

    def taken(share: Share) -> float:
        return sum(seconds.get(stage.name, 0.0) for stage in STAGES if stage.share == share)

    first = taken("whole")
    if first > total:
        named = " and ".join(
            stage.name for stage in STAGES if stage.share == "whole" and stage.name in seconds
        )
        raise DoesNotFit(
            f"--hours: {hours:.2g} hours are left; {named} alone take about {first / 3600:.2g}; give --hours "
            f"{math.ceil(10 * first / 3600) / 10:g} or more, or fewer documents (--limit, --train-limit)"
        )
    left = max(0.0, total - first - taken("leftover"))
    early = min(left, sum(stage.early_seconds for stage in plan.stages))
    postpones = taken("stretched") > left - early
    stages = []
    for stage in plan.stages:
        share = next(known.share for known in STAGES if known.name == stage.experiment)
        if share == "stretched":
            documents, is_cut = _reached(chunks[stage.experiment], left - early)
            if is_cut:
                stage = replace(stage, documents=documents, seconds=min(stage.seconds, left - early))
        elif share == "postponed" and not postpones:
            stage = replace(stage, seconds=min(stage.seconds, left - taken("stretched")))
        stages.append(replace(stage, postponed=share == "postponed" and postpones))
    return replace(plan, stages=tuple(stages), hours=hours)


class Chunk(NamedTuple):
    """A sweep of some documents per task: from `first` on until `documents` are done, in so many seconds."""

    first: int
    documents: int
    seconds: float


def _reached(chunks: Sequence[Chunk], seconds: float) -> tuple[int, bool]:
    """Return how many documents are done in so many seconds, and whether these are not all."""
    used = 0.0
    for chunk in chunks:
        used += chunk.seconds
        if used > seconds:
            return chunk.first, True
    return chunks[-1].documents if chunks else 0, False
