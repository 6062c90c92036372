"""The sides of the sweep's benchmarks, as they run in processes of their own: this project,
and its peers' passes.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from bench_common import (
    OPT_1_3B,
    OPT_125M,
    Products,
    bytes_from_disk,
    drop_from_cache,
    plain_row,
    real_task,
)
from bench_peers import DiskOffload, HuggingFace, LmEval, TransformerLens

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost, operations, sweep_cost
from lowmem_icl.engine.passes import PassSetup, sweep
from lowmem_icl.engine.schedule import BlockRow, Job, PlannedWave, SweepLimits, Variant, Variants
from lowmem_icl.engine.wave import Wave
from lowmem_icl.masks.mask import Mask, all_heads
from lowmem_icl.model.store import NON_LAYER, Store, open_store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import PackedRows
from lowmem_icl.system.machine import peak_resident_bytes
from lowmem_icl.tasks.packing import PackedTask

DOCUMENTS = 32
WAVES = 4
PLENTY = SweepLimits.of(8 << 30)
CPU = torch.device("cpu")

Row = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Where things are: the folder models are built in, rows and tokenizer; and what the real case takes."""

    folder: Path
    data_dir: Path
    tokenizer: Path
    model: str = "smollm2"
    peer_units: int = 12
    documents: int = DOCUMENTS

    def task(self, name: str, width: int, documents: int, shots: int = 0) -> PackedTask:
        """Return a task's documents, not packed yet; with demonstrations, one set for all."""
        return real_task(name, self.data_dir, self.tokenizer, width, documents=documents, shots=shots)


@dataclass(frozen=True)
class BenchTask:
    """What all sides score: the first documents of a task at a shot count, here by OPT-125M's shape."""

    inputs: Inputs
    name: str
    shots: int
    documents: int = DOCUMENTS

    BATCH_SIZES: ClassVar[tuple[int, ...]] = (1, 4, 8, 16)
    # The share of the documents on which a peer's batch size is chosen.
    TUNING_SHARE: ClassVar[int] = 4

    @property
    def label(self) -> str:
        """The task as results name it."""
        return self.name

    def store(self) -> Store:
        """Return the weights of our side."""
        return open_store(self.inputs.folder / "opt-125m-float32")

    def packed_task(self) -> PackedTask:
        """Return the documents, not packed yet."""
        return self.inputs.task(self.name, OPT_125M.hidden_size, self.documents, self.shots)

    def peer(self, kind: str) -> Any:
        """Return a peer with the same weights."""
        return _peer(kind, self.inputs.folder / "opt-125m", self.inputs.tokenizer)


@cache
def _hugging_face(checkpoint: Path) -> Any:
    from transformers import OPTForCausalLM

    return OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@cache
def _peer(kind: str, checkpoint: Path, tokenizer: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if kind == "HuggingFace":
        return HuggingFace(_hugging_face(checkpoint))
    if kind == "TransformerLens":
        return TransformerLens(checkpoint, _hugging_face(checkpoint), loaded)
    return LmEval(_hugging_face(checkpoint), loaded)


def peer_scores(
    kind: str, task: BenchTask, masks: Sequence[Mask], batch_size: int
) -> tuple[float, list[list[float]]]:
    """Return the seconds of scoring a task under some masks, one pass each, and the scores."""
    peer = task.peer(kind)
    options = list(task.packed_task().options)
    start = time.perf_counter()
    scores = [peer.score(options, mask, batch_size) for mask in masks]
    return time.perf_counter() - start, scores


def best_batch_size(kind: str, task: BenchTask) -> int:
    """Return the batch size at which a peer scores a part of the documents fastest;
    the first pass warms up.
    """
    few = replace(task, documents=max(1, task.documents // task.TUNING_SHARE))

    def seconds(size: int) -> float:
        return peer_scores(kind, few, [Mask()], size)[0]

    seconds(task.BATCH_SIZES[-1])
    return min(task.BATCH_SIZES, key=seconds)


def arithmetic(task: BenchTask, masks: Sequence[Mask]) -> tuple[float, float]:
    """Return the operations of one pass an ablation, and ours: layers,
    and the vocabulary where answers are read.
    """
    skeleton = task.store().skeleton
    documents = task.packed_task()
    tokens = sum(len(option.path) for option in documents.options)
    answers = sum(len(option.continuation) for option in documents.options)
    through = tokens * skeleton.layers
    whole = SweepCost(through, through, through, answers=answers) * len(masks)
    ours = sweep_cost([Job(documents.packed, tuple(masks))], skeleton.width, skeleton.layers, PLENTY)
    return operations(whole, skeleton), operations(ours, skeleton)


def our_scores(task: BenchTask, masks: Sequence[Mask]) -> tuple[float, list[list[float]]]:
    """Return the seconds of packing and sweeping a task under all masks, and the scores."""
    store = task.store()
    with StreamedModel(store, device=CPU, resident_bytes=store.size_bytes) as model:
        # Weights are in memory on both sides.
        for _ in model.layers(range(store.skeleton.layers)):
            pass
        documents = task.packed_task()
        start = time.perf_counter()
        job = Job(documents.packed, tuple(masks))
        with CleanCache(PLENTY.cache_bytes) as cache_of_clean:
            (scores,) = sweep(PassSetup(model, PLENTY, cache_of_clean), [job])
        return time.perf_counter() - start, scores.logprobs.tolist()


def our_pass_from_disk(inputs: Inputs, name: str, documents: int, masks: Sequence[Mask]) -> Row:
    """Sweep from disk in int8 with memory for so many waves; bytes as the kernel counts them,
    and as planned.
    """
    store = open_store(inputs.folder / "opt-1.3b-int8")
    task = inputs.task(name, OPT_1_3B.hidden_size, documents)
    job = Job(task.packed, tuple(masks))
    layers, width = store.skeleton.layers, store.skeleton.width
    # The clean run goes with the first wave.
    slots = -(-(len(masks) + 1) // WAVES)
    limits = SweepLimits(4 * width * task.packed.token_count * slots, cache_bytes=1 << 30)
    # Embeddings are read once, by pages, when rows are embedded and answers read.
    embeddings = store.manifest.files[NON_LAYER].size_bytes
    planned = sweep_cost([job], width, layers, limits).layers_read * store.layer_bytes + embeddings
    with (
        StreamedModel(store, device=CPU, resident_bytes=0) as model,
        CleanCache(limits.cache_bytes) as cache_of_clean,
    ):
        drop_from_cache(store.folder)
        before, start = bytes_from_disk(), time.perf_counter()
        (scores,) = sweep(PassSetup(model, limits, cache_of_clean), [job])
        seconds = time.perf_counter() - start
        read = bytes_from_disk() - before
    return {
        "seconds": seconds,
        "read_bytes": read,
        "planned_bytes": planned,
        "scores": scores.logprobs.tolist(),
        "peak_resident_bytes": peak_resident_bytes(),
    }


def disk_offload_passes(inputs: Inputs, name: str, documents: int, masks: Sequence[Mask]) -> Row:
    """Score under each mask by a pass of its own from disk, the page cache dropped before each."""
    folder = inputs.folder / "opt-1.3b-offload"
    peer = DiskOffload(OPT_1_3B, folder)
    options = inputs.task(name, OPT_1_3B.hidden_size, documents).options
    peer.score(options, Mask(), len(options))
    seconds, read, scores = 0.0, 0, []
    for mask in masks:
        drop_from_cache(folder)
        before, start = bytes_from_disk(), time.perf_counter()
        scores.append(peer.score(options, mask, len(options)))
        seconds += time.perf_counter() - start
        read += bytes_from_disk() - before
    return {
        "seconds": seconds,
        "read_bytes": read,
        "scores": scores,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def one_layer_of_66b(inputs: Inputs) -> Row:
    """Take one layer's head ablations through that layer and the next; compare with the bare products."""
    store = open_store(inputs.folder / "opt-66b-3-layers")
    row = plain_row(inputs.data_dir, inputs.tokenizer, 128, 8)
    masks = tuple(Mask(heads=frozenset([(0, head)])) for head in range(store.skeleton.heads))
    job = Job(PackedRows((row,), 8), masks)
    costs: list[SweepCost] = []
    products = Products(store, PLENTY.micro_batch_tokens)
    products.measure()
    with StreamedModel(store, device=CPU, resident_bytes=0) as model, torch.no_grad():
        setup = PassSetup(model, PLENTY, CleanCache(PLENTY.cache_bytes), costs.append)
        variants = Variants.of([Variant(0, index, 0) for index in range(len(masks))])
        plan = PlannedWave(0, frozenset(), variants)
        wave = Wave(setup, [job], [Scores.empty(len(masks), 8)], (BlockRow(0, row),), plan)
        start = time.perf_counter()
        for number, layer in model.layers(range(2)):
            wave.step(number, layer)
        seconds = time.perf_counter() - start
    products.measure()
    done = operations(sum(costs, SweepCost()), store.skeleton)
    bare = done / (products.operations / statistics.mean(products.seconds))
    return {"seconds": seconds, "bare_seconds": bare, "operations": done}


def growth_point(inputs: Inputs, layers: int, documents: int, ablations: int) -> Row:
    """Sweep so many head ablations, spread over the layers, over so many documents;
    return time and added memory.
    """
    store = open_store(inputs.folder / f"opt-125m-{layers}-layers")
    heads = [unit.as_mask() for unit in all_heads(layers, store.skeleton.heads)]
    masks = [heads[index] for index in np.linspace(0, len(heads) - 1, ablations).round().astype(int)]
    job = Job(inputs.task("piqa", store.skeleton.width, documents).packed, tuple(masks))
    with (
        StreamedModel(store, device=CPU, resident_bytes=store.size_bytes) as model,
        CleanCache(PLENTY.cache_bytes) as cache_of_clean,
    ):
        for _ in model.layers(range(layers)):
            pass
        before, start = peak_resident_bytes(), time.perf_counter()
        sweep(PassSetup(model, PLENTY, cache_of_clean), [job])
        return {"seconds": time.perf_counter() - start, "bytes": peak_resident_bytes() - before}
