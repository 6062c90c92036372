"""What a run will hold, read and compute, worked out before it starts."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import psutil
import torch

from lowmem_icl.config import RunOptions
from lowmem_icl.engine.batches import MICRO_BATCH_TOKENS
from lowmem_icl.engine.waves import (
    CACHE_SHARE,
    FLOAT_BYTES,
    Job,
    SweepMemory,
    answers_read,
    layer_tokens,
    layers_read,
)
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.experiments.ablate import ablation_masks
from lowmem_icl.files import free_bytes
from lowmem_icl.machine import chosen_device, device_allowance
from lowmem_icl.masks import Mask
from lowmem_icl.measure import Rates, measure
from lowmem_icl.model.reading import PAGE_BYTES
from lowmem_icl.model.store import OUTSIDE, Store
from lowmem_icl.model.streamed import HEAD_ROWS, VOCABULARY_BLOCK, resident_layers
from lowmem_icl.prepare import Prepared
from lowmem_icl.stages.work import ABLATE_CHUNK, EVALUATE_CHUNK, chunk_jobs, chunk_starts
from lowmem_icl.tasks.packing import ROW_MULTIPLE

FREE_SHARE = 0.8
RESIDENT_SHARE = 0.4
SPILL_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is dealt out, in bytes.

    `device_bytes` is None where all lies in the machine's memory. Else `allowance_bytes` of that hold the layers being
    read and the clean cache, and all the rest is on the device. `spill_bytes` of disk take what the cache cannot hold.
    """

    allowance_bytes: int
    device_bytes: int | None
    outside_bytes: int
    streaming_bytes: int
    working_bytes: int
    resident_bytes: int
    alive_bytes: int
    cache_bytes: int
    spill_bytes: int
    layers: int

    @property
    def sweep(self) -> SweepMemory:
        """The part for residuals; rows that go together are so few that their clean cache fits memory and disk."""
        cached = self.cache_bytes + self.spill_bytes
        return SweepMemory(self.alive_bytes, self.cache_bytes, cached // self.layers)


def plan_memory(
    options: RunOptions, store: Store, longest_row_tokens: int, device_bytes: int | None = None
) -> MemoryPlan:
    """Deal out --memory and, where `device_bytes` are given, those; raise DoesNotFit with the smallest that would do."""
    skeleton = store.skeleton
    allowance = options.memory or int(psutil.virtual_memory().available * FREE_SHARE)
    outside = store.manifest.files[OUTSIDE].size_bytes
    working = _working_bytes(options, store, longest_row_tokens)
    row_bytes = longest_row_tokens * skeleton.width * FLOAT_BYTES
    # Forms that compute in float32 hold the layer in use once more, converted.
    converted = {"int8": 0, "bfloat16": 2, "float32": 1}[store.manifest.weights]
    read_ahead = 2 * (store.layer_bytes + PAGE_BYTES)
    in_use = store.layer_bytes * (converted if device_bytes is None else 1 + converted)
    spill = int(free_bytes(options.run_folder) * SPILL_SHARE)
    if row_bytes * skeleton.layers > spill:
        needed = (row_bytes * skeleton.layers - spill) / SPILL_SHARE
        raise DoesNotFit(
            f"--out {options.run_folder}: {spill / 1e9:.3g} GB of its disk may be used, and the activations of the "
            f"longest row alone take {row_bytes * skeleton.layers / 1e9:.3g} GB; free {needed / 1e9:.3g} GB there or "
            "choose another disk"
        )
    whole = store.layer_bytes * skeleton.layers
    if device_bytes is not None:
        cache = _rest("--memory", allowance, {"two layers being read": read_ahead}, PAGE_BYTES)
        fixed = {"embeddings": outside, "a layer": in_use, "working space": working}
        rest = _rest("--device-memory", device_bytes, fixed, 2 * row_bytes)
        resident = min(whole, int(rest * RESIDENT_SHARE), rest - 2 * row_bytes)
        if whole <= rest // 2:
            resident = whole
        alive = rest - resident
    else:
        fixed = {"embeddings": outside, "two layers": read_ahead + in_use, "working space": working}
        least = int(2 * row_bytes / (1 - CACHE_SHARE)) + PAGE_BYTES
        rest = _rest("--memory", allowance, fixed, least)
        resident = min(whole, int(rest * RESIDENT_SHARE), rest - least)
        split = SweepMemory.of(rest - resident)
        alive, cache = split.alive_bytes, split.cache_bytes
    return MemoryPlan(
        allowance,
        device_bytes,
        outside,
        read_ahead + in_use,
        working,
        resident,
        alive,
        cache,
        spill,
        skeleton.layers,
    )


def _rest(flag: str, allowance: int, fixed: dict[str, int], least: int) -> int:
    """Return what an allowance leaves for rows; raise DoesNotFit where that is less than one row needs."""
    needed = sum(fixed.values()) + least
    if needed > allowance:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in fixed.items())
        raise DoesNotFit(
            f"{flag} {allowance / 1e9:.3g}GB: {parts} and one row {least / 1e9:.3g} GB do not fit; "
            f"the smallest that does is {flag} {-(-needed // 10**6)}MB"
        )
    return allowance - sum(fixed.values())


def _working_bytes(options: RunOptions, store: Store, longest_row_tokens: int) -> int:
    """Return what intermediate tensors take at the widest moment."""
    skeleton = store.skeleton
    # In a layer: int32 products, their float32 form and the int8 input of the FFN.
    ffn_width = max(shape[0] for shape in skeleton.layer_parameters().values())
    tokens = max(MICRO_BATCH_TOKENS, longest_row_tokens)
    working = tokens * (9 * ffn_width + 24 * skeleton.width) + 2 * tokens * longest_row_tokens * FLOAT_BYTES
    if "importance" in options.experiments:
        # The graph of a layer and the gradients at everything in it.
        working += tokens * (16 * ffn_width + 64 * skeleton.width)
    # The unembedding comes after the layers, in the same space.
    unembedding = (2 * HEAD_ROWS + skeleton.width) * VOCABULARY_BLOCK * FLOAT_BYTES
    return max(working, unembedding)


@dataclass(frozen=True)
class StagePlan:
    """One experiment's cost: tokens that go through a layer, layers and bytes read, operations, expected seconds.

    `rough`: how much it takes depends on what it finds.
    """

    experiment: str
    layer_tokens: int
    layers_read: int
    read_bytes: int
    operations: int
    seconds: float
    rough: bool = False


@dataclass(frozen=True)
class Plan:
    """The whole run: what is on disk and in memory, this machine's rates, and the cost of every experiment.

    `convert_bytes`: what is still to be read to make the store, 0 where it is there.
    """

    memory: MemoryPlan
    store_bytes: int
    convert_bytes: int
    rates: Rates
    stages: tuple[StagePlan, ...]

    def as_json(self) -> dict[str, object]:
        """Return plain values for run.json."""
        return asdict(self)


@dataclass(frozen=True)
class Laid:
    """All documents as rows: lengths of the longest and the mean row in tokens, and seconds that laying them out took."""

    longest_tokens: int
    mean_tokens: int
    evaluate_seconds: float
    train_seconds: float


def lay_out(prepared: Prepared) -> Laid:
    """Pack all documents once, to know their rows before anything is decided."""
    lengths: list[int] = []
    seconds = []
    for tasks in (prepared.evaluate, prepared.train):
        start = time.perf_counter()
        lengths += [len(row) for task in tasks for row in prepared.pack(task).packed.rows]
        seconds.append(time.perf_counter() - start)
    return Laid(max(lengths), sum(lengths) // len(lengths), *seconds)


def check_memory(options: RunOptions, prepared: Prepared, laid: Laid) -> MemoryPlan:
    """Return how memory is dealt out; raise InputError or DoesNotFit where a run cannot be held."""
    device = chosen_device(options.device)
    allowed = device_allowance(device, options.device_memory, FREE_SHARE)
    return plan_memory(options, prepared.store, laid.longest_tokens, allowed)


@dataclass
class _Cost:
    """What sweeps add up to."""

    layer_tokens: float = 0
    layers_read: float = 0
    answers: float = 0

    def add(
        self, times: float, jobs: list[Job], store: Store, memory: SweepMemory, resident: frozenset[int]
    ) -> None:
        layers, width = store.skeleton.layers, store.skeleton.width
        self.layer_tokens += times * layer_tokens(jobs, layers)
        self.layers_read += times * layers_read(jobs, layers, width, memory, resident)
        self.answers += times * answers_read(jobs)


def make_plan(options: RunOptions, prepared: Prepared, laid: Laid, *, only_evaluate_under: int = 0) -> Plan:
    """Plan all experiments of a run; takes two seconds to measure this machine.

    `only_evaluate_under`: the number of masks given to `evaluate`, each counted as if it touched the first layer.
    """
    store, skeleton = prepared.store, prepared.store.skeleton
    memory = check_memory(options, prepared, laid)
    resident = resident_layers(store, memory.resident_bytes)
    rates = measure(
        store,
        max(ROW_MULTIPLE, laid.mean_tokens // ROW_MULTIPLE * ROW_MULTIPLE),
        memory.alive_bytes,
        chosen_device(options.device),
        backward="importance" in options.experiments,
    )
    parameters = sum(torch.Size(shape).numel() for shape in skeleton.layer_parameters().values())
    stages: list[StagePlan] = []
    for experiment in options.experiments:
        masks = (Mask(ffns=frozenset([0])),) * only_evaluate_under
        cost = _Cost()
        for times, jobs in _sweeps(experiment, prepared, masks):
            cost.add(times, jobs, store, memory.sweep, resident)
        if not cost.layer_tokens:
            continue
        work = _seconds(cost, rates)
        operations = 2 * parameters * cost.layer_tokens
        if experiment == "importance":
            # Forward, and back: every layer forward again, then its products transposed.
            work += cost.layer_tokens * rates.backward_token_seconds
            operations *= 3
            cost.layer_tokens, cost.layers_read = 2 * cost.layer_tokens, 2 * cost.layers_read
        # Documents are laid out for the sweeps and once more for the tables.
        work += 2 * (laid.evaluate_seconds if experiment in ("evaluate", "prune") else laid.train_seconds)
        # Resident layers are read once, by whichever experiment comes first.
        reads = round(cost.layers_read) + (0 if stages else len(resident))
        stages.append(
            StagePlan(
                experiment,
                layer_tokens=round(cost.layer_tokens),
                layers_read=reads,
                read_bytes=reads * store.layer_bytes,
                operations=round(operations),
                seconds=max(work, reads * store.layer_bytes / rates.disk_bytes_per_second),
                rough=experiment == "prune",
            )
        )
    checkpoint = prepared.located.checkpoint
    to_convert = 0 if store.is_written or checkpoint is None else checkpoint.size_bytes
    return Plan(memory, store.size_bytes, to_convert, rates, tuple(stages))


def _seconds(cost: _Cost, rates: Rates) -> float:
    calls = cost.layer_tokens / MICRO_BATCH_TOKENS + cost.layers_read
    layers = calls * rates.call_seconds + cost.layer_tokens * rates.token_seconds
    return layers + cost.answers * rates.answer_seconds


def _sweeps(
    experiment: str, prepared: Prepared, masks: tuple[Mask, ...]
) -> Iterator[tuple[float, list[Job]]]:
    """Yield the sweeps of an experiment and how often each is done.

    The pruner's are those of removing every head, one after the other, so that a layer's sweeps try all its heads, one
    less, …, one: that many times the mean of the first and the last.
    """
    skeleton = prepared.store.skeleton
    layers, heads = skeleton.layers, skeleton.heads
    if experiment == "evaluate":
        for start in chunk_starts(prepared.evaluate, EVALUATE_CHUNK):
            under = [(Mask(), *masks)] * len(prepared.evaluate)
            yield 1, chunk_jobs(prepared, prepared.evaluate, under, start, EVALUATE_CHUNK)
    elif experiment == "importance":
        yield 1, [Job(prepared.pack(task, gold_only=True).packed, ()) for task in prepared.train]
    elif experiment == "ablate":
        under = [ablation_masks(layers, heads)] * len(prepared.train)
        for start in chunk_starts(prepared.train, ABLATE_CHUNK):
            yield 1, chunk_jobs(prepared, prepared.train, under, start, ABLATE_CHUNK)
    elif experiment == "prune":
        packed = [prepared.pack(task).packed for task in prepared.train]
        for layer in range(layers):
            for tried in (heads, 1):
                # Two searches, a task's own and that of all tasks, each on half of the documents.
                of_layer = tuple(Mask(heads=frozenset([(layer, head)])) for head in range(tried))
                yield heads / 2, [Job(rows, of_layer) for rows in packed]
        first_ffn = (Mask(ffns=frozenset([0])),)
        yield layers, [Job(rows, first_ffn) for rows in packed]
        # Its own and the shared mask of three methods each, then judged.
        yield 1, [Job(prepared.pack(task).packed, first_ffn * 6) for task in prepared.evaluate]
