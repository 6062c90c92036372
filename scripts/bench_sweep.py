"""The sweep against other ways to do the same, on this machine, all sides in one run on the same rows.

    pip install -e '.[bench]'
    python scripts/bench_sweep.py [--case 1,2,3a,3b,4a,4b,5,6] [--json FILE] [--folder DIR]
        [--data-dir DIR] [--tokenizer DIR]

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

Peers run a stated sample of the ablations, spread over the layers, and are scaled to all; results are
compared before times are. Every side runs in a process of its own; where several rounds are run, sides
alternate and medians are taken.
"""

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

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
from rich.table import Table

from lowmem_icl.experiments.ablate.measure import ablated_units
from lowmem_icl.masks.mask import Mask

CASES = ("1", "2", "3a", "3b", "4a", "4b", "5", "6")
TARGETS = {"1": 3.0, "2": 18.0, "3a": 2.0, "3b": 10.0, "4a": 3.0, "4b": 12.0, "5": 0.8}
READ_TARGET = 60.0
TASKS = ("piqa", "hellaswag")
PEERS = ("HuggingFace", "TransformerLens")
SAMPLED = {"1": 12, "2": 4, "4a": 6, "4b": 8}
EVALUATION_ROUNDS = 3
DISK_ABLATIONS = 96
COMPARISON_COLUMNS = (
    "case", "against", "ours", "theirs", "ratio", "target", "", "largest difference", "sample",
    "by arithmetic",
)  # fmt: skip


def sample_of(masks: Sequence[Mask], count: int) -> list[int]:
    """Return the indices of `count` masks, spread evenly."""
    return [int(index) for index in np.linspace(0, len(masks) - 1, count).round()]


def compared(case: str, peer: str, ours: float, theirs: float, difference: float, **more: Any) -> Row:
    """Return a row of the results."""
    return {
        "case": case,
        "peer": peer,
        "ours_seconds": ours,
        "peer_seconds": theirs,
        "ratio": theirs / ours,
        "largest_difference": difference,
        "target": TARGETS[case],
    } | more


def largest_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Return the largest difference between scores, in nats."""
    return float(np.abs(np.subtract(ours, theirs)).max())


def ablations(case: str, inputs: Inputs, say: Any) -> list[Row]:
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
            task_rows = ablations_of(task, case, masks, us, peers)
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


def ablations_of(
    task: BenchTask, case: str, masks: Sequence[Mask], us: Side, peers: Mapping[str, Side]
) -> list[Row]:
    """Return a task's rows, one per peer, whose passes under a sample are scaled to all masks."""
    indices = sample_of(masks, SAMPLED[case])
    sample = [masks[index] for index in indices]
    sizes = {peer: side.call(best_batch_size, peer, task) for peer, side in peers.items()}
    peer_seconds = dict.fromkeys(peers, 0.0)
    peer_logprobs: dict[str, list[list[float]]] = {peer: [] for peer in peers}

    def score_half(half: Sequence[Mask]) -> None:
        for peer, side in peers.items():
            seconds, logprobs = side.call(peer_scores, peer, task, half, sizes[peer])
            peer_seconds[peer] += seconds
            peer_logprobs[peer] += logprobs

    # Half of the sample before and half after, so that a machine that drifts favours nobody.
    middle = len(sample) // 2
    score_half(sample[:middle])
    ours_seconds, ours = us.call(our_scores, task, masks)
    score_half(sample[middle:])
    return [
        {"case": case, "peer": peer, "task": task.name, "ours_seconds": ours_seconds,
         "peer_seconds": peer_seconds[peer] * len(masks) / len(sample),
         "largest_difference": largest_difference([ours[index] for index in indices], peer_logprobs[peer]),
         "batch_size": sizes[peer], "sampled": f"{len(sample)} of {len(masks)}"}
        for peer in peers
    ]  # fmt: skip


def evaluation(case: str, inputs: Inputs, say: Any) -> list[Row]:
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


def from_disk(case: str, inputs: Inputs, say: Any) -> list[Row]:
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


def near_the_limit(case: str, inputs: Inputs, say: Any) -> list[Row]:
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


def growth(case: str, inputs: Inputs, say: Any) -> list[Row]:
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
    "5": near_the_limit, "6": growth,
}  # fmt: skip


def comparison_table(rows: Sequence[Row]) -> Table:
    """Return the table of all comparisons, and of the bytes read where they were counted."""
    table = Table(title="one machine, one run: seconds, and how many times faster")
    for column in COMPARISON_COLUMNS:
        table.add_column(column, justify="left" if column in ("case", "against", "") else "right")
    for row in rows:
        ratio, target = row.get("ratio"), row.get("target")
        table.add_row(
            row["case"],
            f"{row['peer']}{', ' + row['task'] if 'task' in row else ''}",
            f"{row['ours_seconds']:.1f}",
            f"{row['peer_seconds']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if target is None else f"{target:g}",
            "" if ratio is None else "met" if ratio >= target else "missed",
            f"{row['largest_difference']:.2g}",
            row.get("sampled", ""),
            f"{row['arithmetic_ratio']:.2f}" if "arithmetic_ratio" in row else "",
        )
        if "read_ratio" in row:
            table.add_row(
                "",
                "bytes read",
                f"{row['ours_read_bytes'] / 1e9:.2f} GB",
                f"{row['peer_read_bytes'] / 1e9:.0f} GB",
                f"{row['read_ratio']:.0f}",
                f"{row['read_target']:g}",
                "met" if row["read_ratio"] >= row["read_target"] else "missed",
                f"planned {row['planned_read_bytes'] / 1e9:.2f} GB",
                "",
                "",
            )
    return table


def growth_table(rows: Sequence[Row]) -> Table:
    """Return the table of how time and memory grow."""
    table = Table(title="how cost grows (int8, OPT-125M's width)")
    for column in ("with", "values", "seconds", "added memory, MB", "time ~ n^", "memory ~ n^"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["axis"],
            ", ".join(map(str, row["values"])),
            ", ".join(f"{seconds:.1f}" for seconds in row["ours_seconds"]),
            ", ".join(f"{size / 1e6:.0f}" for size in row["added_bytes"]),
            f"{row['time_exponent']:.2f}",
            f"{row['memory_exponent']:.2f}",
        )
    return table


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the results."""
    growing = [row for row in rows if row["case"] == "6"]
    if len(growing) < len(rows):
        console.print(comparison_table([row for row in rows if row["case"] != "6"]))
    if growing:
        console.print(growth_table(growing))


def main(
    case: Annotated[str, typer.Option(help="Comma-separated, of " + ", ".join(CASES))] = ",".join(CASES),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where models are built and kept; else a temporary folder.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Rows of the tasks.")] = SHARED / "data",
    tokenizer: Annotated[Path, typer.Option(help="OPT's tokenizer.")] = SHARED / "tokenizer" / "opt",
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
        inputs = Inputs(models, data_dir, tokenizer)
        for name in asked:
            rows += RUN[name](name, inputs, print_line)
            if json_file is not None:
                json_file.write_text(json.dumps(rows, indent=1) + "\n")
    show(Console(), rows)


def print_line(text: str) -> None:
    """Print progress; also in a side's process."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
