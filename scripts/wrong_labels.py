"""Why wrong labels can raise accuracy: what a model chooses in tasks that ask for one item of a list.

    python scripts/wrong_labels.py --model gemma3-270m --tasks object_among_animals,FILE.json

For every task with right, shuffled and foreign labels in its demonstrations: accuracy, the gold option's
log-probability, that of writing any of the options at all, and where in the list the chosen and the right
items stand. Prints a table in Markdown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.passes import PassSetup, sweep
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.session.prepare import prepare, with_store
from lowmem_icl.tasks.documents import Document
from lowmem_icl.tasks.packing import PackedTask

COLUMNS = (
    "task",
    "shots",
    "labels",
    "accuracy",
    "gold, nats",
    "any option, nats",
    "chosen first",
    "gold first",
)
MEMORY_BYTES = 4 << 30


def places(document: Document) -> list[int]:
    """Return at which place of the question's list each option stands, counted from 0."""
    question = document.options[0][0].rsplit("Q:", 1)[1]
    found = [question.find(continuation.strip()) for _, continuation in document.options]
    return [sorted(found).index(position) for position in found]


def row(packed: PackedTask, logprobs: np.ndarray) -> list[str]:
    """Return a task's cells of COLUMNS from the log-probabilities of its options."""
    right, gold, any_option, chosen_first, gold_first = [], [], [], [], []
    for document, first in zip(packed.task.documents, packed.first_option, strict=True):
        values = logprobs[first : first + len(document.gold)]
        chosen, answer = int(values.argmax()), document.gold.index(True)
        place = places(document)
        right.append(document.gold[chosen])
        gold.append(values[answer])
        any_option.append(np.logaddexp.reduce(values))
        chosen_first.append(place[chosen] == 0)
        gold_first.append(place[answer] == 0)
    task = packed.task
    numbers = [np.mean(values) for values in (right, gold, any_option, chosen_first, gold_first)]
    return [Path(task.task).stem, str(task.shots), task.labels, *(f"{value:.2f}" for value in numbers)]


def rows(options: RunOptions) -> list[list[str]]:
    """Return the table's rows: every task at every shot count, and its controls."""
    prepared = with_store(prepare(options))
    limits = SweepLimits.of(MEMORY_BYTES)
    found = []
    with (
        StreamedModel(prepared.store, device=torch.device("cpu"), resident_bytes=MEMORY_BYTES) as model,
        CleanCache(limits.cache_bytes, 0, None) as cache,
    ):
        for task in (*prepared.evaluate, *prepared.label_controls):
            packed = prepared.pack(task)
            (scores,) = sweep(PassSetup(model, limits, cache), [Job(packed.packed, (Mask(),))])
            found.append(row(packed, scores.logprobs[0]))
    return sorted(found, key=lambda cells: (cells[0], int(cells[1])))


def main(
    model: Annotated[str, typer.Option(help="As of lowmem-icl run.")] = "gemma3-270m",
    tasks: Annotated[str, typer.Option(help="Tasks whose questions are lists.")] = "object_among_animals",
    shots: Annotated[str, typer.Option(help="Shot counts.")] = "0,10",
    limit: Annotated[int, typer.Option(help="Documents per task.")] = 64,
    store_dir: Annotated[Path | None, typer.Option(help="As of lowmem-icl run.")] = None,
) -> None:
    """Print what a model chooses with right and with wrong labels."""
    place: dict[str, Any] = {} if store_dir is None else {"store_dir": store_dir}
    options = RunOptions(
        model=model,
        tasks=tuple(tasks.split(",")),
        shots=tuple(int(count) for count in shots.split(",")),
        limit=limit,
        experiments=("evaluate",),
        **place,
    )
    lines: list[Sequence[str]] = [COLUMNS, ["---"] * len(COLUMNS), *rows(options)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


if __name__ == "__main__":
    typer.run(main)
