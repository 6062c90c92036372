"""Tokens per second of the int8 sweep on a card, beside bitsandbytes' Linear8bitLt in Hugging Face.

    bash scripts/bench_gpu.sh [--model DIR] [--device cuda] [--documents 16] [--context 96] [--ablations 64]
        [--peer-ablations 8] [--memory-gb 2] [--folder DIR] [--json FILE]

Both sides score the same options of the same documents under the same masks, each of one head, spread over
all layers. Documents are random tokens, and without --model the weights are random too, of OPT-1.3B's shape:
speed does not depend on what they say. The peer is AutoModelForCausalLM with load_in_8bit and hooks that zero
a head's slice before the output projection, one pass per mask, the vocabulary at answers only, in float16
outside its linears (float32 on a CPU), in the batch size that is fastest for it. It runs a sample of the
masks and is scaled to all.

Tokens are counted as the peer runs them: of every option its context and all but the last token of its
continuation, for every mask. Ours is measured with the weights on the device and streamed from disk. Both
sides run in processes of their own; the peer's sample is run half before and half after ours.
"""

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_common import OPT_1_3B, Side, drop_from_cache, in_child
from bench_peers import HuggingFace
from bench_results import largest_difference, sample_of
from rich.console import Console
from rich.table import Table

from lowmem_icl.conversion.calibration import CalibrationText
from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.conversion.claim import Conversion
from lowmem_icl.conversion.convert import convert
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.passes import PassSetup, sweep
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.errors import InputError
from lowmem_icl.masks.mask import Mask, all_heads
from lowmem_icl.model.store import Store, is_store, open_store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.system.machine import (
    describe_machine,
    device_in_use,
    peak_resident_bytes,
    resolved_device,
    wait_for,
)
from lowmem_icl.tasks.loading import Document, TaskRows
from lowmem_icl.tasks.packing import PackedTask, PackingLimits, pack

CALIBRATION_TOKENS = 512
OPTIONS, ANSWER_TOKENS = 2, 4
BATCH_SIZES = (8, 32, 128)
CACHE_BYTES = 8 << 30
VERSIONS = ("torch", "bitsandbytes", "transformers", "accelerate", "lowmem-icl")


@dataclass(frozen=True)
class Case:
    """What both sides score, and where: a checkpoint, its store, and documents of random tokens."""

    checkpoint: Path
    store: Path
    device: str
    documents: int
    context: int
    memory_bytes: int

    def on(self) -> torch.device:
        """Return the device."""
        return resolved_device(self.device)

    def opened(self) -> Store:
        """Return our side's weights."""
        return open_store(self.store)

    def packed_task(self) -> PackedTask:
        """Return the documents, not packed yet."""
        skeleton = self.opened().skeleton
        rng = np.random.default_rng(0)

        def text(tokens: int) -> str:
            return " ".join(map(str, rng.integers(4, skeleton.vocabulary, tokens)))

        documents = []
        for index in range(self.documents):
            context = text(self.context)
            options = tuple((context, text(ANSWER_TOKENS)) for _ in range(OPTIONS))
            gold = (True, *(False,) * (OPTIONS - 1))
            documents.append(Document(index, options, gold, str(index), (), str(index), 0, {}))
        limits = PackingLimits(skeleton.context_tokens, PackingLimits.row_tokens_for(skeleton.width), 2)
        rows = TaskRows("random", 0, "train", tuple(documents), "acc", ())
        return pack(rows, lambda texts: [[int(token) for token in each.split()] for each in texts], limits)


def make_checkpoint(folder: Path) -> Path:
    """Return a checkpoint of OPT-1.3B's shape with random weights; made once."""
    from transformers import OPTForCausalLM

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        OPTForCausalLM._from_config(OPT_1_3B, dtype=torch.float16).save_pretrained(folder)
    return folder


def make_store(checkpoint: Path, folder: Path) -> None:
    """Convert a checkpoint, its outlier columns found on random tokens; once."""
    if is_store(folder):
        return
    opened = open_checkpoint(checkpoint)
    tokens = torch.randint(4, int(opened.config["vocab_size"]), (CALIBRATION_TOKENS,))
    convert(Conversion(opened, folder, "int8", "random"), CalibrationText(tokens.tolist()))


def peak_bytes(device: torch.device) -> int:
    """Return the most that was held: of the device by torch, or of the machine where the CPU computes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def our_sweep(case: Case, masks: Sequence[Mask], streamed: bool) -> dict[str, Any]:
    """Sweep all masks; weights on the device, or from disk past the page cache."""
    store, device = case.opened(), case.on()
    limits = SweepLimits(case.memory_bytes, CACHE_BYTES)
    resident = 0 if streamed else store.size_bytes
    with (
        device_in_use(device, None),
        StreamedModel(store, device=device, resident_bytes=resident) as model,
        torch.no_grad(),
    ):
        packed = case.packed_task().packed

        def once(asked: Sequence[Mask]) -> Any:
            with CleanCache(CACHE_BYTES) as cache:
                return sweep(PassSetup(model, limits, cache), [Job(packed, tuple(asked))])[0]

        # Weights are there, and kernels chosen, on both sides before the clock runs.
        once(masks[:1])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        drop_from_cache(store.folder)
        start = time.perf_counter()
        scores = once(masks)
        wait_for(device)
        return {
            "seconds": time.perf_counter() - start,
            "peak_bytes": peak_bytes(device),
            "scores": scores.logprobs.tolist(),
        }


class Peer:
    """Hugging Face's model with bitsandbytes' Linear8bitLt; one in its process."""

    _only: "Peer | None" = None

    def __init__(self, case: Case) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        self.device = case.on()
        model = AutoModelForCausalLM.from_pretrained(
            case.checkpoint,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            device_map={"": self.device},
            dtype=torch.float16 if self.device.type == "cuda" else torch.float32,
        )
        self.hooked = HuggingFace(model.eval(), self.device)
        self.options = list(case.packed_task().options)

    @classmethod
    def of(cls, case: Case) -> "Peer":
        """Return the one of this process, loaded now where it is not."""
        cls._only = cls._only or cls(case)
        return cls._only

    def passes(self, masks: Sequence[Mask], batch_size: int) -> dict[str, Any]:
        """Score all options under each mask by a pass of its own."""
        wait_for(self.device)
        start = time.perf_counter()
        scores = [self.hooked.score(self.options, mask, batch_size) for mask in masks]
        wait_for(self.device)
        return {
            "seconds": time.perf_counter() - start,
            "peak_bytes": peak_bytes(self.device),
            "scores": scores,
        }


def peer_passes(case: Case, masks: Sequence[Mask], batch_size: int) -> dict[str, Any]:
    """Run the peer's passes in this process."""
    return Peer.of(case).passes(masks, batch_size)


def best_batch_size(case: Case) -> int:
    """Return the batch size in which the peer's pass takes the least time; the first pass warms up."""
    peer = Peer.of(case)
    peer.passes([Mask()], BATCH_SIZES[0])
    return min(BATCH_SIZES, key=lambda size: float(peer.passes([Mask()], size)["seconds"]))


def measured(case: Case, ablations: int, peer_ablations: int) -> dict[str, Any]:
    """Return all figures of a comparison as plain values."""
    skeleton = case.opened().skeleton
    heads = [unit.as_mask() for unit in all_heads(skeleton.layers, skeleton.heads)]
    masks = [heads[index] for index in sample_of(heads, min(ablations, len(heads)))]
    indices = sample_of(masks, min(peer_ablations, len(masks)))
    middle = (len(indices) + 1) // 2
    with Side() as us, Side() as them:
        size = them.call(best_batch_size, case)
        first = them.call(peer_passes, case, [masks[index] for index in indices[:middle]], size)
        # In this order: of a process on the CPU only its own peak is known.
        streamed = us.call(our_sweep, case, masks, True)
        ours = us.call(our_sweep, case, masks, False)
        second = them.call(peer_passes, case, [masks[index] for index in indices[middle:]], size)
    theirs = {
        "seconds": (first["seconds"] + second["seconds"]) * len(masks) / len(indices),
        "peak_bytes": max(first["peak_bytes"], second["peak_bytes"]),
        "batch_size": size,
        "sampled": f"{len(indices)} of {len(masks)}",
    }
    difference = largest_difference(
        [ours["scores"][index] for index in indices], first["scores"] + second["scores"]
    )
    between = largest_difference(ours.pop("scores"), streamed.pop("scores"))
    options = case.packed_task().options
    tokens = sum(len(option.path) for option in options) * len(masks)
    sides = {"ours": ours, "ours_streamed": streamed, "linear8bitlt": theirs}
    for side in sides.values():
        side["tokens_per_second"] = tokens / side["seconds"]
    return sides | {
        "ratio": theirs["seconds"] / ours["seconds"],
        "ratio_streamed": theirs["seconds"] / streamed["seconds"],
        "largest_difference": difference,
        "largest_difference_streamed": between,
        "tokens": tokens,
        "masks": len(masks),
    }


def described(case: Case) -> dict[str, Any]:
    """Return the machine, the versions and what was asked."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(case).items()}
    return {
        "machine": describe_machine(case.on()),
        "versions": versions | {"cuda": torch.version.cuda},
        "case": asked,
    }


def show(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures."""
    machine, versions = figures["machine"], figures["versions"]
    card = machine["cuda"] or f"no card, {machine['processor']}, {machine['threads']} threads"
    console.print(f"{card}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    table = Table(title=f"{figures['masks']} ablations, {figures['tokens']:,} tokens as one pass an ablation")
    for column in ("side", "seconds", "tokens/s", "peak memory, GB", "times as fast"):
        table.add_column(column, justify="left" if column == "side" else "right")
    theirs = figures["linear8bitlt"]
    names = {
        "ours": "this sweep, weights in memory",
        "ours_streamed": "this sweep, weights from disk",
        "linear8bitlt": f"Linear8bitLt, batches of {theirs['batch_size']}, {theirs['sampled']} masks",
    }
    for key, name in names.items():
        side = figures[key]
        ratio = theirs["seconds"] / side["seconds"]
        rate, peak = side["tokens_per_second"], side["peak_bytes"] / 1e9
        table.add_row(name, f"{side['seconds']:.2f}", f"{rate:,.0f}", f"{peak:.2f}", f"{ratio:.2f}")
    console.print(table)
    console.print(
        f"largest difference of scores: {figures['largest_difference']:.3g} nats to Linear8bitLt, which "
        "finds its outlier columns anew in every batch; "
        f"{figures['largest_difference_streamed']:.3g} from memory to disk"
    )


def main(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint; else random weights of OPT-1.3B's shape.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cuda, cuda:N or cpu.")] = "cuda",
    documents: Annotated[int, typer.Option(min=1, help="How many documents of two options.")] = 16,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a document's context.")] = 96,
    ablations: Annotated[int, typer.Option(min=1, help="How many heads are ablated, one at a time.")] = 64,
    peer_ablations: Annotated[int, typer.Option(min=2, help="How many of them the peer runs.")] = 8,
    memory_gb: Annotated[float, typer.Option(min=0.001, help="GB of residuals alive together.")] = 2.0,
    folder: Annotated[
        Path | None, typer.Option(help="Where models are built and kept; else a temporary folder.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure the sweep and its peer on one card."""
    try:
        resolved_device(device)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as temporary:
        made = folder or Path(temporary)
        made.mkdir(parents=True, exist_ok=True)
        checkpoint = model or in_child(make_checkpoint, made / "opt-1.3b")
        store = made / f"{checkpoint.name}-int8"
        make_store(checkpoint, store)
        case = Case(checkpoint, store, device, documents, context, int(memory_gb * 1e9))
        figures = described(case) | measured(case, ablations, peer_ablations)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    show(Console(width=120), figures)


if __name__ == "__main__":
    typer.run(main)
