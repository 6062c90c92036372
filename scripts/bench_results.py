"""What the sweep's benchmarks found: rows, their comparison, and the tables that show them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from bench_common import Side
from bench_sides import BenchTask, Row, best_batch_size, our_scores, peer_scores
from rich.console import Console
from rich.table import Table

from lowmem_icl.masks.mask import Mask

Say = Callable[[str], None]

TARGETS = {
    "1": 3.0, "2": 18.0, "3a": 2.0, "3b": 10.0, "4a": 3.0, "4b": 12.0, "5": 0.8, "real 0-shot": 3.0,
    "real 5-shot": 15.0, "patch": 50.0,
}  # fmt: skip
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
        "target": TARGETS.get(case),
    } | more


def largest_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Return the largest difference between scores, in nats."""
    return float(np.abs(np.subtract(ours, theirs)).max())


def ablations_of(
    tasks: Sequence[BenchTask], masks: Sequence[Mask], sampled: int, us: Side, peers: Mapping[str, Side]
) -> list[Row]:
    """Return rows, one per peer and task, whose passes under a sample are scaled to all masks.

    tasks: one and the same task in several forms of our side's weights; peers take it in the first.
    """
    indices = sample_of(masks, sampled)
    sample = [masks[index] for index in indices]
    sizes = {peer: side.call(best_batch_size, peer, tasks[0]) for peer, side in peers.items()}
    peer_seconds = dict.fromkeys(peers, 0.0)
    peer_logprobs: dict[str, list[list[float]]] = {peer: [] for peer in peers}

    def score_half(half: Sequence[Mask]) -> None:
        for peer, side in peers.items():
            seconds, logprobs = side.call(peer_scores, peer, tasks[0], half, sizes[peer])
            peer_seconds[peer] += seconds
            peer_logprobs[peer] += logprobs

    # Half of the sample before and half after, so that a machine that drifts favours nobody.
    middle = len(sample) // 2
    score_half(sample[:middle])
    of_ours = [us.call(our_scores, task, masks) for task in tasks]
    score_half(sample[middle:])
    return [
        {"peer": peer, "task": task.label, "ours_seconds": seconds,
         "peer_seconds": peer_seconds[peer] * len(masks) / len(sample),
         "largest_difference": largest_difference([ours[index] for index in indices], peer_logprobs[peer]),
         "batch_size": sizes[peer], "sampled": f"{len(sample)} of {len(masks)}"}
        for peer in peers
        for task, (seconds, ours) in zip(tasks, of_ours, strict=True)
    ]  # fmt: skip


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
            "" if ratio is None or target is None else "met" if ratio >= target else "missed",
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
