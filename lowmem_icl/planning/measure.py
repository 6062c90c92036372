"""Two seconds of measuring this machine: its disk, and a layer of the model as a sweep runs it."""

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.model.attention import Segment, whole_row
from lowmem_icl.model.int8 import FIXED_ROWS, Int8Linear, matmul_in_fixed_rows
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.nf4 import Nf4Linear, quantise_nf4
from lowmem_icl.model.reading import read_rate
from lowmem_icl.model.store import Store
from lowmem_icl.model.tables import VOCABULARY_BLOCK
from lowmem_icl.model.vocabulary import head_rows
from lowmem_icl.system.allocator import keep_freed_memory
from lowmem_icl.system.files import TRIED, existing_folder, partial_path
from lowmem_icl.system.machine import wait_for

LAYER_SECONDS = 0.8
OTHER_SECONDS = 0.3
SHORT_SECONDS = 0.1
SAMPLE_BYTES = 256 << 20
SAMPLE_FILE_BYTES = 16 << 20
UNCACHED_BYTES = 64 << 20
RANDOM_ELEMENTS = 1 << 24
LARGEST_WHOLE = 3 << 25
"""Weights of a layer that is measured as it is on the CPU; of a larger one its products are, in part."""
CUT_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Rates:
    """What this machine does with this model, in seconds.

    `call_seconds` for every micro-batch through a layer; `attention_seconds`, `projection_seconds`,
    `ffn_seconds` for every token of it through the attention's inputs, its output projection and the FFN;
    `backward_seconds` for a token on the way back, 0 where that was not asked for; `answer_seconds` for one
    answer token through the unembedding; `disk_bytes_per_second`.
    """

    call_seconds: float
    attention_seconds: float
    projection_seconds: float
    ffn_seconds: float
    backward_seconds: float
    answer_seconds: float
    disk_bytes_per_second: float

    def seconds(self, cost: SweepCost, micro_batch_tokens: int) -> float:
        """Return how long this machine computes for a sweep of this cost."""
        # Whatever branches late makes batches that are not full: one more a layer.
        calls = (cost.projection_tokens + cost.backward_tokens) / micro_batch_tokens + cost.layers_read
        return (
            calls * self.call_seconds
            + cost.attention_tokens * self.attention_seconds
            + cost.projection_tokens * self.projection_seconds
            + cost.ffn_tokens * self.ffn_seconds
            + cost.backward_tokens * self.backward_seconds
            + cost.answers * self.answer_seconds
        )


def measure(
    store: Store, row_tokens: int, limits: SweepLimits, device: torch.device, *, backward: bool
) -> Rates:
    """Measure a layer of random weights of the store's shape with rows of this length, and the store's disk.

    limits: of a sweep, which say how many tokens go through a layer together.
    """
    keep_freed_memory()
    skeleton = store.skeleton
    halves: _Halves = _CutLayer(store) if _is_cut(store, device) else _WholeLayer(store, device, limits)
    with torch.no_grad():
        single = halves.seconds(row_tokens, 1, LAYER_SECONDS / 8)
        # A layer of a very large model is measured on fewer tokens, so that this stays short.
        full = max(2, limits.micro_batch_tokens // row_tokens)
        rows = int(min(full, max(2, LAYER_SECONDS / sum(single))))
        several = halves.seconds(row_tokens, rows, LAYER_SECONDS / 3)
    # Where one row costs next to nothing more, all is for the tokens.
    share = max(1 - sum(single) / sum(several), (1 - 1 / rows) / 2) / (1 - 1 / rows)
    attention, projection, ffn = (seconds * min(1.0, share) / (rows * row_tokens) for seconds in several)
    columns = skeleton.embedding_width
    hidden = torch.randn(head_rows(skeleton.width), columns, device=device)
    block_rows = min(VOCABULARY_BLOCK, skeleton.vocabulary, max(1, CUT_WEIGHTS // 4 // columns))
    vocabulary = torch.randn(block_rows, columns, device=device)
    block = _seconds_of(
        lambda: matmul_in_fixed_rows(hidden, vocabulary.t(), len(hidden)).exp_().sum(1), device, OTHER_SECONDS
    )
    return Rates(
        call_seconds=max(0.0, 1 - share) * sum(several),
        attention_seconds=attention,
        projection_seconds=projection,
        ffn_seconds=ffn,
        backward_seconds=halves.backward_seconds(row_tokens, rows, sum(several)) if backward else 0.0,
        answer_seconds=block / len(hidden) * skeleton.vocabulary / len(vocabulary),
        disk_bytes_per_second=_disk_bytes_per_second(store),
    )


def _seconds_of(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the mean time of repeating some work for about so long, once at least, after a first time."""
    work()
    wait_for(device)
    start, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - start < budget:
        work()
        wait_for(device)
        done += 1
    return (time.perf_counter() - start) / done


def _plain_rows(row_tokens: int, rows: int, device: torch.device) -> list[Segment]:
    return [whole_row(row_tokens, device)] * rows


def _is_cut(store: Store, device: torch.device) -> bool:
    return device.type == "cpu" and sum(store.skeleton.weights_by_part) > LARGEST_WHOLE


class _Halves(Protocol):
    """A layer, or what stands for it, whose halves can be timed."""

    def seconds(self, row_tokens: int, rows: int, budget: float) -> tuple[float, float, float]:
        """Return the seconds of a micro-batch of so many rows through the attention, its output projection,
        and the FFN.
        """
        ...

    def backward_seconds(self, row_tokens: int, rows: int, forward_seconds: float) -> float:
        """Return the seconds of a token on the way back, the layer being run again first."""
        ...


@dataclass(frozen=True)
class _CutLayer:
    """The products of a layer too large to be held for a plan: each part is one linear, cut to a few of its
    outputs, and counts by its weights. Attention itself, norms and activations are left out.
    """

    store: Store

    def seconds(self, row_tokens: int, rows: int, budget: float) -> tuple[float, float, float]:
        """See _Halves."""
        skeleton = self.store.skeleton
        attention, projection, ffn = skeleton.weights_by_part
        per_weight = self._seconds_per_weight(skeleton.width, rows * row_tokens, budget)
        return attention * per_weight, projection * per_weight, ffn * per_weight

    def _seconds_per_weight(self, inputs: int, tokens: int, budget: float) -> float:
        outputs = max(1, CUT_WEIGHTS // inputs)
        linear: nn.Module
        if self.store.manifest.weights == "int8":
            linear = Int8Linear(inputs, outputs, bias=True)
            few = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
            values = {"weight": few, "SCB": torch.full((outputs,), 0.1), "bias": torch.zeros(outputs)}
            for name, value in values.items():
                setattr(linear, name, value)
            linear.refresh()
        elif self.store.manifest.weights == "nf4":
            linear = Nf4Linear(inputs, outputs, bias=True)
            linear.bias = torch.zeros(outputs)
            linear.fill(quantise_nf4("weight", torch.randn(outputs, inputs)))
        else:
            linear = nn.Linear(inputs, outputs)
        batches = torch.randn(max(1, min(4, UNCACHED_BYTES // 2 // (4 * tokens * inputs))), tokens, inputs)
        turns = itertools.cycle(batches)
        return _seconds_of(lambda: linear(next(turns)), torch.device("cpu"), budget) / (inputs * outputs)

    def backward_seconds(self, row_tokens: int, rows: int, forward_seconds: float) -> float:
        """See _Halves."""
        return _backward_by_products(self.store, forward_seconds / (rows * row_tokens), torch.device("cpu"))


class _WholeLayer:
    """A layer of random weights, as a sweep runs it."""

    def __init__(self, store: Store, device: torch.device, limits: SweepLimits) -> None:
        self._store, self._device, self._residual_bytes = store, device, limits.alive_bytes
        self._layer = DecoderLayer(store.skeleton, store.manifest.weights, device)
        self._layer.fill(0, _random_layer(store))

    def seconds(self, row_tokens: int, rows: int, budget: float) -> tuple[float, float, float]:
        """See _Halves."""
        tokens, width = rows * row_tokens, self._store.skeleton.width
        layer, device = self._layer, self._device
        # More than the processor's cache holds, as in a sweep: a batch comes from memory.
        batches = max(1, min(UNCACHED_BYTES, self._residual_bytes) // (4 * tokens * width))
        residuals = torch.randn(batches, tokens, width, device=device)
        z = torch.randn(tokens, self._store.skeleton.attention_width, device=device)
        segments = _plain_rows(row_tokens, rows, device)
        turns = itertools.cycle(range(batches))
        attend = _seconds_of(lambda: layer.attend(residuals[next(turns)].clone(), segments), device, budget)

        def finish(*, without_ffn: bool) -> None:
            turn = next(turns)
            residuals[turn] = layer.finish(residuals[turn].clone(), z, without_ffn=without_ffn)

        project = _seconds_of(lambda: finish(without_ffn=True), device, budget / 2)
        return (
            attend,
            project,
            max(0.0, _seconds_of(lambda: finish(without_ffn=False), device, budget) - project),
        )

    def backward_seconds(self, row_tokens: int, rows: int, forward_seconds: float) -> float:
        """See _Halves."""
        tokens, width, device = rows * row_tokens, self._store.skeleton.width, self._device
        if forward_seconds > SHORT_SECONDS:
            return _backward_by_products(self._store, forward_seconds / tokens, device)
        entering = torch.randn(tokens, width, device=device, requires_grad=True)
        segments = _plain_rows(row_tokens, rows, device)

        def back() -> None:
            captured = self._layer.run_captured(entering, segments)
            assert captured.ffn is not None
            inputs = (entering, captured.z, captured.ffn)
            torch.autograd.grad(captured.output, inputs, torch.ones_like(captured.output))

        return _seconds_of(back, device, OTHER_SECONDS) / tokens


def _backward_by_products(store: Store, forward_seconds: float, device: torch.device) -> float:
    """Return the seconds of a token on the way back where trying it takes too long: forward again, and the
    products in floating point at this machine's rate.
    """
    operations = 2 * sum(store.skeleton.weights_by_part)
    left = torch.randn(FIXED_ROWS, store.skeleton.width, device=device)
    right = torch.randn(store.skeleton.width, 1024, device=device)
    product = _seconds_of(lambda: left @ right, device, OTHER_SECONDS)
    return forward_seconds + operations * product / (2 * left.numel() * 1024)


def _random_layer(store: Store) -> dict[str, Tensor]:
    """Return a layer's tensors, as a store has them, from a little randomness repeated."""
    weights = store.manifest.weights
    linears = set(store.skeleton.linear_names())
    tensors: dict[str, Tensor] = {}
    for name, shape in store.skeleton.layer_parameters().items():
        owner, _, leaf = name.rpartition(".")
        elements = torch.Size(shape).numel()
        few = torch.randint(-127, 128, (min(elements, RANDOM_ELEMENTS),), dtype=torch.int8)
        values = few.repeat(-(-elements // len(few)))[:elements].view(shape)
        if owner not in linears or leaf == "bias" or weights not in ("int8", "nf4"):
            tensors[name] = values.float().mul_(1e-3)
        elif weights == "nf4":
            tensors |= quantise_nf4(name, values)
        else:
            tensors[name], tensors[f"{owner}.SCB"] = values, torch.full((shape[0],), 0.1)
    return tensors


def _disk_bytes_per_second(store: Store) -> float:
    """Read layers of the store past the page cache, or files of random bytes where there is no store yet."""
    if store.is_written:
        return read_rate(store.layer_paths, SAMPLE_BYTES)
    parent = existing_folder(store.folder)
    of_process = partial_path(parent / TRIED).name
    place = parent if os.access(parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".", suffix=of_process, dir=place) as folder:
        some = os.urandom(1 << 20)
        samples = [Path(folder) / str(number) for number in range(SAMPLE_BYTES // SAMPLE_FILE_BYTES)]
        for sample in samples:
            with sample.open("wb") as opened:
                for _ in range(SAMPLE_FILE_BYTES >> 20):
                    opened.write(some)
                opened.flush()
                os.fsync(opened.fileno())
        return read_rate(samples, SAMPLE_BYTES)
