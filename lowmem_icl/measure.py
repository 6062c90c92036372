"""Two seconds of measuring this machine: its disk, and a layer of the model as a sweep runs it."""

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowmem_icl.engine.batches import MICRO_BATCH_TOKENS, Piece, gather, scatter, segments
from lowmem_icl.files import existing_folder
from lowmem_icl.model.allocator import keep_freed_memory
from lowmem_icl.model.int8 import FIXED_ROWS, matmul_in_fixed_rows
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.reading import read_rate
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import VOCABULARY_BLOCK
from lowmem_icl.rows import Row

LAYER_SECONDS = 0.8
OTHER_SECONDS = 0.3
SHORT_SECONDS = 0.1
SAMPLE_BYTES = 256 << 20
UNCACHED_BYTES = 64 << 20
RANDOM_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Rates:
    """What this machine does with this model.

    `call_seconds` for every micro-batch through a layer and `token_seconds` for every token of it;
    `backward_token_seconds` for a token on the way back, 0 where that was not asked for; `answer_seconds` for one place
    through the unembedding; `disk_bytes_per_second`.
    """

    call_seconds: float
    token_seconds: float
    backward_token_seconds: float
    answer_seconds: float
    disk_bytes_per_second: float


def measure(
    store: Store, row_tokens: int, residual_bytes: int, device: torch.device, *, backward: bool
) -> Rates:
    """Measure a layer of random weights of the store's shape with rows of this length, and the store's disk.

    residual_bytes: how much of the memory the rows may take; more than the processor's cache is not needed.
    """
    keep_freed_memory()
    skeleton = store.skeleton
    call, token, back = _layer_seconds(
        store, row_tokens, min(UNCACHED_BYTES, residual_bytes), device, backward=backward
    )
    hidden = torch.randn(FIXED_ROWS, skeleton.width, device=device)
    vocabulary = torch.randn(min(VOCABULARY_BLOCK, skeleton.vocabulary), skeleton.width, device=device)
    block = _seconds_of(lambda: matmul_in_fixed_rows(hidden, vocabulary.t()).exp_().sum(1), OTHER_SECONDS)
    return Rates(
        call_seconds=call,
        token_seconds=token,
        backward_token_seconds=back,
        answer_seconds=block / FIXED_ROWS * skeleton.vocabulary / len(vocabulary),
        disk_bytes_per_second=_disk_bytes_per_second(store),
    )


def _seconds_of(work: Callable[[], object], budget: float) -> float:
    """Return the mean time of repeating some work for about so long, once at least, after a first time."""
    work()
    _wait_for_device()
    start, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - start < budget:
        work()
        _wait_for_device()
        done += 1
    return (time.perf_counter() - start) / done


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _layer_seconds(
    store: Store, row_tokens: int, residual_bytes: int, device: torch.device, *, backward: bool
) -> tuple[float, float, float]:
    """Return what a micro-batch through a layer costs at all, for each of its tokens, and for a token on the way back."""
    layer = DecoderLayer(store.skeleton, store.manifest.weights, device)
    layer.fill(_random_layer(store))
    full = max(2, MICRO_BATCH_TOKENS // row_tokens)
    ends = np.full(row_tokens, row_tokens)
    nothing = np.zeros(0, dtype=np.int64)
    row = Row(ends, ends, ends, ends, nothing, nothing, nothing)

    def once(rows: int) -> Callable[[], object]:
        # More than the processor's cache holds, as in a sweep: a batch comes from memory.
        width = store.skeleton.width
        batches = max(1, residual_bytes // (4 * rows * row_tokens * width))
        residuals = list(torch.randn(batches * rows, 1, row_tokens, width, device=device))
        turns = itertools.cycle(range(batches))
        keep_heads = torch.ones(rows, store.skeleton.heads, device=device)

        def work() -> None:
            turn = next(turns)
            pieces = [Piece(turn * rows + place, 0, 1) for place in range(rows)]
            batch = gather(residuals, pieces)
            of_rows = segments(pieces, [row] * len(residuals), batch.device)
            scatter(layer.run(batch, of_rows, keep_heads), residuals, pieces)

        return work

    with torch.no_grad():
        one = _seconds_of(once(1), LAYER_SECONDS / 4)
        # A layer of a very large model is measured on fewer tokens, so that this stays short.
        rows = int(min(full, max(2, LAYER_SECONDS / one)))
        many = _seconds_of(once(rows), LAYER_SECONDS)
    # Where one row costs next to nothing more, all is for the tokens.
    token = max(many - one, many / 2 * (1 - 1 / rows)) / ((rows - 1) * row_tokens)
    there = max(0.0, many - token * rows * row_tokens)
    if not backward:
        return there, token, 0.0
    if many > SHORT_SECONDS:
        # Too long to be tried: forward again, and the products in floating point at this machine's rate.
        operations = 2 * sum(
            torch.Size(shape).numel() for shape in store.skeleton.layer_parameters().values()
        )
        left = torch.randn(FIXED_ROWS, store.skeleton.width, device=device)
        right = torch.randn(store.skeleton.width, 4096, device=device)
        product = _seconds_of(lambda: left @ right, OTHER_SECONDS)
        return there, token, token + operations * product / (2 * left.numel() * 4096)
    entering = torch.randn(rows * row_tokens, store.skeleton.width, device=device, requires_grad=True)
    of_rows = segments([Piece(0, 0, 1)] * rows, [row], entering.device)

    def back() -> None:
        leaving, captured = layer.run_captured(entering, of_rows)
        torch.autograd.grad(leaving, (entering, captured.z, captured.ffn), torch.ones_like(leaving))

    return there, token, _seconds_of(back, OTHER_SECONDS) / (rows * row_tokens)


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
        if owner not in linears or leaf == "bias" or weights != "int8":
            tensors[name] = values.float().mul_(1e-3)
            continue
        tensors[name], tensors[f"{owner}.SCB"] = values, torch.full((shape[0],), 0.1)
    return tensors


def _disk_bytes_per_second(store: Store) -> float:
    """Read layers of the store past the page cache; of a store that is not there yet, a file of their size."""
    if store.is_written:
        return read_rate(store.layer_paths, SAMPLE_BYTES)
    place = existing_folder(store.folder)
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        sample = Path(folder) / "sample"
        with sample.open("wb") as opened:
            opened.write(os.urandom(1 << 20) * (SAMPLE_BYTES >> 20))
            opened.flush()
            os.fsync(opened.fileno())
        return read_rate([sample], SAMPLE_BYTES)
