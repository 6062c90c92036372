"""What a run will hold, read and compute, worked out before it starts."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil
import torch

from lowmem_icl.config import RunOptions
from lowmem_icl.engine.batches import MICRO_BATCH_TOKENS
from lowmem_icl.engine.waves import CACHE_SHARE, Job, SweepMemory, layer_reads, layer_tokens
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.experiments.ablate import ablation_masks
from lowmem_icl.masks import Mask
from lowmem_icl.model.layer import DecoderLayer, Segment, whole_row
from lowmem_icl.model.reading import PAGE_BYTES, LayerReader
from lowmem_icl.model.store import OUTSIDE, Store
from lowmem_icl.model.streamed import HEAD_ROWS, VOCABULARY_BLOCK
from lowmem_icl.prepare import Prepared
from lowmem_icl.rows import longest
from lowmem_icl.tasks.packing import PackedTask

FREE_SHARE = 0.8
RESIDENT_SHARE = 0.4
MEASURED_SECONDS = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """How a memory allowance is dealt out, in bytes."""

    allowance_bytes: int
    outside_bytes: int
    streaming_bytes: int
    working_bytes: int
    resident_bytes: int
    sweep_bytes: int

    @property
    def sweep(self) -> SweepMemory:
        """The part for residuals."""
        return SweepMemory.of(self.sweep_bytes)


def plan_memory(options: RunOptions, store: Store, longest_row_tokens: int) -> MemoryPlan:
    """Deal out --memory; raise DoesNotFit with the smallest allowance that would do."""
    skeleton = store.skeleton
    allowance = options.memory or int(psutil.virtual_memory().available * FREE_SHARE)
    outside = store.manifest.files[OUTSIDE].size_bytes
    # A layer in use and the next; forms that compute in float32 hold the one in use once more, converted.
    converted = {"int8": 0, "bfloat16": 2, "float32": 1}[store.manifest.weights]
    streaming = store.layer_bytes * (2 + converted) + 2 * PAGE_BYTES
    # The widest moment of a layer: int32 products, their float32 form and the int8 input of the FFN.
    ffn_width = max(shape[0] for shape in skeleton.layer_parameters().values())
    tokens = max(MICRO_BATCH_TOKENS, longest_row_tokens)
    working = tokens * (9 * ffn_width + 24 * skeleton.width) + 2 * tokens * longest_row_tokens * 4
    working += 2 * HEAD_ROWS * VOCABULARY_BLOCK * 4 + VOCABULARY_BLOCK * skeleton.width * 4
    fixed = outside + streaming + working
    least_sweep = int(2 * longest_row_tokens * skeleton.width * 4 / (1 - CACHE_SHARE)) + PAGE_BYTES
    if fixed + least_sweep > allowance:
        raise DoesNotFit(
            f"--memory {allowance / 1e9:.3g}GB: embeddings {outside / 1e9:.3g}, two layers {streaming / 1e9:.3g}, "
            f"working space {working / 1e9:.3g} and one row {least_sweep / 1e9:.3g} GB do not fit; "
            f"the smallest that does is --memory {-(-(fixed + least_sweep) // 10**6)}MB"
        )
    rest = allowance - fixed
    whole = store.layer_bytes * skeleton.layers
    resident = min(whole, int(rest * RESIDENT_SHARE), rest - least_sweep)
    return MemoryPlan(allowance, outside, streaming, working, resident, rest - resident)


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
    """The whole run: memory and the cost of its experiments."""

    memory: MemoryPlan
    store_bytes: int
    stages: tuple[StagePlan, ...]

    def as_json(self) -> dict[str, object]:
        """Return plain values for run.json."""
        return asdict(self)


def make_plan(options: RunOptions, prepared: Prepared) -> Plan:
    """Plan all experiments of a run; takes about a second to measure this machine on a layer of the model."""
    store, skeleton = prepared.store, prepared.store.skeleton
    packed_evaluate = [prepared.pack(task) for task in prepared.evaluate]
    packed_train = [prepared.pack(task) for task in prepared.train]
    rows = [row for task in (*packed_evaluate, *packed_train) for row in task.packed.rows]
    memory = plan_memory(options, store, longest(rows))
    whole = store.layer_bytes * skeleton.layers
    streams = memory.resident_bytes < whole
    parameters = sum(torch.Size(shape).numel() for shape in skeleton.layer_parameters().values())
    typical = int(sum(map(len, rows)) / len(rows))
    rate = _layer_tokens_a_second(store, typical)
    stages = []
    for experiment in options.experiments:
        jobs = _jobs(experiment, packed_evaluate, packed_train, skeleton.layers, skeleton.heads)
        if jobs is None:
            continue
        tokens, reads = 0, 0
        for batch in jobs:
            tokens += layer_tokens(batch, skeleton.layers)
            reads += layer_reads(batch, skeleton.layers, skeleton.width, memory.sweep)
        if experiment == "importance":
            # Forward, forward again and back: the backward pass costs as much as the forward one.
            tokens, reads = 3 * tokens, 2 * reads
        streamed = reads * store.layer_bytes if streams else whole
        operations = 2 * parameters * tokens
        stages.append(
            StagePlan(experiment, tokens, reads, streamed, operations, tokens / rate, experiment == "prune")
        )
    return Plan(memory, store.size_bytes, tuple(stages))


def _jobs(
    experiment: str, evaluate: Sequence[PackedTask], train: Sequence[PackedTask], layers: int, heads: int
) -> list[list[Job]] | None:
    """Return the sweeps of an experiment; the pruner's as if it removed every head, one after the other."""
    if experiment == "evaluate":
        return [[Job(task.packed, (Mask(),)) for task in evaluate]]
    if experiment == "importance":
        return [[Job(task.packed, ()) for task in train]]
    if experiment == "ablate":
        masks = ablation_masks(layers, heads)
        return [[Job(task.packed, masks) for task in train]]
    if experiment == "prune":
        sweeps = []
        for layer in range(layers):
            for left in range(heads, 0, -1):
                masks = tuple(Mask(heads=frozenset([(layer, head)])) for head in range(left))
                # Two searches, a task's own and that of all tasks, each on half of the documents.
                sweeps.append([Job(task.packed, masks) for task in train])
        sweeps += [[Job(task.packed, (Mask(ffns=frozenset([0])),)) for task in train]] * layers
        # Its own and the shared mask of three methods each, then judged.
        deepest = (Mask(ffns=frozenset([0])),) * 6
        return [*sweeps, [Job(task.packed, deepest) for task in evaluate]]
    return None


def _layer_tokens_a_second(store: Store, row_tokens: int) -> float:
    """Return how many tokens a second go through this store's first layer here, in micro-batches as a sweep has them."""
    rows = max(1, MICRO_BATCH_TOKENS // max(1, row_tokens))
    residual = torch.randn(rows * row_tokens, store.skeleton.width)
    mask = [Segment(rows, whole_row(row_tokens).attention_mask)]
    layer = DecoderLayer(store.skeleton, store.manifest.weights, torch.device("cpu"))
    reader = LayerReader(store.layer_paths[:1])
    for _, tensors in reader.layers([0]):
        layer.fill(tensors)
        with torch.no_grad():
            layer.run(residual, mask)
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < MEASURED_SECONDS:
                layer.run(residual, mask)
                done += 1
            seconds = time.perf_counter() - start
    reader.close()
    return done * rows * row_tokens / seconds
