"""A model of OPT-66B's exact shape on this machine, against the machine's own limits;
and OPT-1.3B's against accelerate.

    python scripts/bench_opt66b.py [--full] [--json FILE] [--folder DIR] [--data-dir DIR] [--tokenizer DIR]

Scores 1,024 tokens of real rows through all 64 layers, streamed from disk in int8, and measures in the same
run what bounds it: the bare integer products of the same shapes (`torch._int_mm`, every eighth layer, between
the layers), and the bare sequential read of the same files. By default 4 layer files stand for 64 (they are
read past the page cache each time); --full writes all 64, for which 70 GB must be free. Then accelerate's
`disk_offload` in bfloat16 and this project in int8 run the same 256 tokens through OPT-1.3B's shape, the page
cache dropped before every pass.
"""

import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_common import (
    OPT_1_3B,
    OPT_66B,
    SHARED,
    Products,
    bytes_from_disk,
    converted,
    drop_from_cache,
    in_child,
    offloaded,
    plain_row,
    random_checkpoint,
    random_store,
    real_task,
)
from rich.console import Console
from rich.table import Table

from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.passes import PassSetup, sweep
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.store import open_store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import PackedRows, Row
from lowmem_icl.system.machine import peak_resident_bytes

TOKENS = 1024
PEER_TOKENS = 256
PEER_ANSWERS = 32
ROUNDS = 3
DISTINCT_LAYERS = 4
PRODUCTS_EVERY = 8
BLOCK_BYTES = 32 << 20
FULL_BYTES = 70e9
PLENTY = SweepLimits.of(1 << 30)


def bare_read_seconds(paths: list[Path]) -> float:
    """Return the time of reading files whole and in order, two blocks in flight, past the page cache."""
    buffers = [mmap(-1, BLOCK_BYTES) for _ in range(2)]
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)

    def read(descriptor: int, starts: range, lane: int) -> None:
        for start in starts:
            os.preadv(descriptor, [buffers[lane]], start)

    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        for path in paths:
            descriptor = os.open(path, flags)
            blocks = range(0, path.stat().st_size, BLOCK_BYTES)
            # Two lanes, so that two reads never share a buffer.
            list(pool.map(read, [descriptor] * 2, (blocks[0::2], blocks[1::2]), range(2)))
            os.close(descriptor)
    return time.perf_counter() - began


class ProbedModel(StreamedModel):
    """A streamed model that measures the bare products between its layers, every so often."""

    products: Products
    paused = 0.0

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, DecoderLayer]]:
        """Yield the layers, and measure after every eighth."""
        for number, layer in super().layers(order):
            yield number, layer
            if (number + 1) % PRODUCTS_EVERY == 0:
                self.paused += self.products.measure()


def score_opt66b(folder: Path, data_dir: Path, tokenizer: Path) -> dict[str, Any]:
    """Score real rows through all layers of a store; return times, limits and peak memory."""
    store = open_store(folder)
    rows: list[Row] = []
    for row in real_task("hellaswag", data_dir, tokenizer, store.skeleton.width, documents=64).packed.rows:
        if sum(map(len, rows)) >= TOKENS:
            break
        rows.append(row)
    tokens = sum(map(len, rows))
    options = 1 + max(int(row.options.max()) for row in rows)
    job = Job(PackedRows(tuple(rows), options), (Mask(),))
    with ProbedModel(store, device=torch.device("cpu"), resident_bytes=0) as model:
        model.products = products = Products(store, tokens)
        start = time.perf_counter()
        (scores,) = sweep(PassSetup(model, PLENTY, CleanCache(PLENTY.cache_bytes)), [job])
        seconds = time.perf_counter() - start - model.paused
        read_bytes = model.read_bytes
    if not np.isfinite(scores.logprobs).all():
        raise RuntimeError("a score is not finite")
    peak = peak_resident_bytes()
    read_seconds = bare_read_seconds(store.layer_paths)
    layers = store.skeleton.layers
    product_seconds = layers * statistics.mean(products.seconds)
    return {
        "seconds": seconds,
        "product_seconds": product_seconds,
        "read_seconds": read_seconds,
        "ratio": seconds / max(product_seconds, read_seconds),
        "peak_resident_bytes": peak,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "read_bytes": read_bytes,
        "read_bytes_per_second": read_bytes / read_seconds,
        "operations_per_second": layers * products.operations / seconds,
        "product_operations_per_second": layers * products.operations / product_seconds,
        "layers": layers,
        "threads": torch.get_num_threads(),
    }


def _timed_pass(folder: Path, once: Any) -> dict[str, Any]:
    """Warm up, drop the files' pages, and measure one pass."""
    once()
    gc.collect()
    drop_from_cache(folder)
    before, start = bytes_from_disk(), time.perf_counter()
    logprobs = once()
    return {
        "seconds": time.perf_counter() - start,
        "read_bytes": bytes_from_disk() - before,
        "peak_resident_bytes": peak_resident_bytes(),
        "logprobs": logprobs,
    }


def pass_of_ours(folder: Path, data_dir: Path, tokenizer: Path) -> dict[str, Any]:
    """Run the plain row through the int8 store."""
    row = plain_row(data_dir, tokenizer, PEER_TOKENS, PEER_ANSWERS)
    with StreamedModel(open_store(folder), device=torch.device("cpu"), resident_bytes=0) as model:
        job = Job(PackedRows((row,), PEER_ANSWERS), (Mask(),))
        return _timed_pass(
            folder,
            lambda: (
                sweep(PassSetup(model, PLENTY, CleanCache(PLENTY.cache_bytes)), [job])[0].logprobs[0].tolist()
            ),
        )


def pass_of_disk_offload(folder: Path, data_dir: Path, tokenizer: Path) -> dict[str, Any]:
    """Run the plain row through accelerate's disk_offload of the bfloat16 checkpoint,
    answers only at the head.
    """
    from accelerate import disk_offload, init_empty_weights
    from transformers import OPTForCausalLM

    row = plain_row(data_dir, tokenizer, PEER_TOKENS, PEER_ANSWERS)
    with init_empty_weights():
        model = OPTForCausalLM._from_config(OPT_1_3B, dtype=torch.bfloat16).eval()
    model.tie_weights()
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    tokens = torch.from_numpy(row.tokens)[None]

    def once() -> list[float]:
        with torch.no_grad():
            logits = model(tokens, logits_to_keep=PEER_ANSWERS, use_cache=False).logits[0].float()
        logprobs = logits.log_softmax(-1).gather(1, torch.from_numpy(row.targets)[:, None])
        return [float(logprob) for logprob in logprobs[:, 0]]

    return _timed_pass(folder, once)


def make_opt_1_3b(folder: Path, tokenizer: Path) -> None:
    """Write OPT-1.3B's shape with random weights: an int8 store made by `convert`,
    and accelerate's offload folder.
    """
    checkpoint = random_checkpoint(folder / "checkpoint", OPT_1_3B, tokenizer, torch.bfloat16)
    offloaded(checkpoint, folder / "offload")
    converted(checkpoint, folder / "store", "int8")


def compare_opt_1_3b(folder: Path, data_dir: Path, tokenizer: Path) -> dict[str, Any]:
    """Alternate passes of both sides, each in a process of its own; return medians and ratios."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(in_child(pass_of_ours, folder / "store", data_dir, tokenizer))
        theirs.append(in_child(pass_of_disk_offload, folder / "offload", data_dir, tokenizer))
    result: dict[str, Any] = {"tokens": PEER_TOKENS}
    for side, passes in (("ours", ours), ("disk_offload", theirs)):
        for key in ("seconds", "read_bytes", "peak_resident_bytes"):
            result[f"{side}_{key}"] = statistics.median(one[key] for one in passes)
    difference = np.abs(np.subtract(ours[0]["logprobs"], theirs[0]["logprobs"]))
    return result | {
        "time_ratio": result["ours_seconds"] / result["disk_offload_seconds"],
        "read_ratio": result["ours_read_bytes"] / result["disk_offload_read_bytes"],
        "largest_difference": float(difference.max()),
    }


def show(console: Console, scored: dict[str, Any], peer: dict[str, Any] | None) -> None:
    """Print what was measured."""
    table = Table(title=f"OPT-66B's shape, {scored['tokens']} tokens through {scored['layers']} layers")
    for column in ("", "seconds", "rate"):
        table.add_column(column, justify="left" if not column else "right")
    rates = (
        ("lowmem-icl", "seconds", f"{scored['tokens_per_second']:.2f} tokens/s, "
         f"{scored['operations_per_second'] / 1e9:.0f} GOP/s"),
        ("bare integer products", "product_seconds",
         f"{scored['product_operations_per_second'] / 1e9:.0f} GOP/s"),
        ("bare sequential read", "read_seconds", f"{scored['read_bytes_per_second'] / 1e9:.2f} GB/s"),
    )  # fmt: skip
    for name, key, rate in rates:
        table.add_row(name, f"{scored[key]:.1f}", rate)
    console.print(table)
    console.print(
        f"{scored['ratio']:.2f} times the larger limit (target 1.25), peak resident memory "
        f"{scored['peak_resident_bytes'] / 1e9:.2f} GB (target 6), {scored['threads']} threads"
    )
    if peer is None:
        return
    table = Table(title=f"OPT-1.3B's shape, {peer['tokens']} tokens, page cache dropped before every pass")
    for column in ("", "seconds a pass", "read", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    for side, name in (("ours", "lowmem-icl, int8"), ("disk_offload", "accelerate disk_offload, bfloat16")):
        table.add_row(
            name,
            f"{peer[f'{side}_seconds']:.2f}",
            f"{peer[f'{side}_read_bytes'] / 1e9:.2f} GB",
            f"{peer[f'{side}_peak_resident_bytes'] / 1e9:.2f} GB",
        )
    console.print(table)
    console.print(
        f"{peer['time_ratio']:.2f} times its time (target 0.45), {peer['read_ratio']:.2f} times its bytes "
        "(target 0.55); "
        f"log-probabilities differ by at most {peer['largest_difference']:.2g} nats (int8 against bfloat16)"
    )


def main(
    full: Annotated[bool, typer.Option("--full", help="64 layer files of their own (70 GB).")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where models are built and kept; else a temporary folder.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Rows of the tasks.")] = SHARED / "data",
    tokenizer: Annotated[Path, typer.Option(help="OPT's tokenizer.")] = SHARED / "tokenizer" / "opt",
    peer: Annotated[bool, typer.Option(help="Compare with accelerate on OPT-1.3B's shape.")] = True,
) -> None:
    """Measure a model of OPT-66B's shape on this machine."""
    console, err = Console(), Console(stderr=True)
    for given, flag in ((data_dir, "--data-dir"), (tokenizer, "--tokenizer")):
        if not given.is_dir():
            raise typer.BadParameter(f"{flag}: folder {given} does not exist")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        models = folder or Path(temporary)
        models.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(models).free
        if full and free < FULL_BYTES and not (models / "opt-66b-full").is_dir():
            raise typer.BadParameter(f"--full needs 70 GB in {models}, {free / 1e9:.0f} GB are free")
        store = models / ("opt-66b-full" if full else "opt-66b")
        distinct = OPT_66B.num_hidden_layers if full else DISTINCT_LAYERS
        in_child(random_store, store, OPT_66B, tokenizer, distinct, print_line)
        err.print("scoring; about as long as 64 layers of integer products take: minutes on 2 cores")
        scored = in_child(score_opt66b, store, data_dir, tokenizer)
        compared = None
        if peer:
            small = models / "opt-1.3b"
            if not (small / "store" / "manifest.json").is_file():
                shutil.rmtree(small, ignore_errors=True)
                err.print("making OPT-1.3B's shape")
                in_child(make_opt_1_3b, small, tokenizer)
            compared = compare_opt_1_3b(small, data_dir, tokenizer)
    show(console, scored, compared)
    if json_file is not None:
        json_file.write_text(json.dumps(scored | {"opt_1_3b": compared}, indent=1) + "\n")


def print_line(text: str) -> None:
    """Print progress of a child."""
    Console(stderr=True).print(text)


if __name__ == "__main__":
    typer.run(main)
