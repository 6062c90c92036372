"""The model in lm-evaluation-harness beside the harness's own `hf`.

    python scripts/bench_lm_eval.py [--docs docs/lm-eval.md] [--documents 32,8] [--threads 1] [--json FILE]

Both get the same requests, made by the harness from ARC-Easy's and COPA's rows: without demonstrations, with
five that are drawn per document (its default), and with the same five for all documents (its `first_n`). Each
side is a process of its own with as many threads; `hf` has float32 weights and the batch size at which it is
fastest on a quarter of the documents. Prints seconds, ratios and the largest difference in nats; stops where
float32 differs by more than a thousandth, or in what would be written greedily.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_common import SHARED, Side
from bench_real import hugging_face
from doc_tables import put_table
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

from lowmem_icl.conversion.locate import load_tokenizer
from lowmem_icl.harness.model import StreamedLM
from lowmem_icl.model.store import open_store

BATCH_SIZES = (1, 4, 8, 16, 32)
TUNING_SHARE = 4
LARGEST_DIFFERENCE = 1e-3
FORMS = ("float32", "int8")
SETTINGS = (
    ("0 shots", 0, "default"),
    ("5 shots, drawn per document", 5, "default"),
    ("5 shots, the same for all", 5, "first_n"),
)
NAMES = {"arc_easy": "ARC-Easy", "copa": "COPA"}
TABLE_WIDTH = 110
DEFINITIONS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
    },
    "copa": {
        "validation_split": "validation",
        "doc_to_text": "{{premise.rstrip('.')}} {{'because' if question == 'cause' else 'therefore'}}",
        "doc_to_choice": "{{[choice1, choice2]}}",
        "doc_to_target": "label",
    },
}

Answers = list[tuple[float, bool]]


@dataclass(frozen=True)
class Asked:
    """The requests of a task's first documents: with so many demonstrations, by this sampler of lm-eval."""

    data_dir: Path
    task: str
    shots: int
    sampler: str
    documents: int

    def requests(self) -> list[Instance]:
        """Return them as the harness makes them."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        fields = DEFINITIONS[self.task]
        splits = {"train", *(name for key, name in fields.items() if key.endswith("_split"))}
        folder = self.data_dir / self.task
        task = ConfigurableTask(
            config={
                "task": self.task,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {name: str(folder / f"{name}.jsonl") for name in splits}},
                "training_split": "train",
                "output_type": "multiple_choice",
                "num_fewshot": self.shots,
                "fewshot_config": {"sampler": self.sampler},
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                **fields,
            }
        )
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=self.documents, rank=0, world_size=1)
        return list(task.instances)


@cache
def ours(model: str, weights: str, stores: Path) -> StreamedLM:
    """Return our side's model."""
    return StreamedLM(model=model, weights=weights, store_dir=str(stores), device="cpu")


@cache
def theirs(store: Path) -> HFLM:
    """Return the harness's model with the weights of our float32 side."""
    tokenizer = load_tokenizer(open_store(store).tokenizer_folder)
    return HFLM(pretrained=hugging_face(store).model, tokenizer=tokenizer, device="cpu", batch_size=1)


def float_store(model: str, stores: Path) -> Path:
    """Return the folder of our float32 store, converted where it is not there."""
    return ours(model, "float32", stores).open.store.folder


def set_threads(count: int) -> int:
    """Let torch take so many threads here; return how many it takes."""
    torch.set_num_threads(count)
    return torch.get_num_threads()


def our_answers(model: str, weights: str, stores: Path, asked: Asked) -> tuple[float, Answers]:
    """Return seconds and answers of our side."""
    loaded, requests = ours(model, weights, stores), asked.requests()
    start = time.perf_counter()
    answers = loaded.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - start, answers


def their_answers(store: Path, asked: Asked, batch_size: int) -> tuple[float, Answers]:
    """Return seconds and answers of `hf`."""
    loaded, requests = theirs(store), asked.requests()
    loaded.batch_size_per_gpu = batch_size
    start = time.perf_counter()
    answers = loaded.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - start, answers


def best_batch_size(store: Path, asked: Asked) -> int:
    """Return the batch size at which `hf` is fastest on a part of the documents; the first pass warms up."""
    few = replace(asked, documents=max(1, asked.documents // TUNING_SHARE))
    their_answers(store, few, BATCH_SIZES[0])
    return min(BATCH_SIZES, key=lambda size: their_answers(store, few, size)[0])


def compared(
    model: str, stores: Path, every: Sequence[tuple[str, Asked]], threads: int
) -> list[dict[str, Any]]:
    """Return a row per task, setting and form of our weights."""
    rows = []
    with Side() as us, Side() as them:
        counts = us.call(set_threads, threads), them.call(set_threads, threads)
        if set(counts) != {threads}:
            raise RuntimeError(f"expected {threads} threads on both sides, got {counts}")
        store = us.call(float_store, model, stores)
        for setting, asked in every:
            size = them.call(best_batch_size, store, asked)
            before, expected = them.call(their_answers, store, asked, size)
            found = {form: us.call(our_answers, model, form, stores, asked) for form in FORMS}
            # Once before and once after, so that a machine that drifts favours nobody.
            after, _ = them.call(their_answers, store, asked, size)
            for form, (seconds, answers) in found.items():
                rows.append(
                    {
                        "task": asked.task, "setting": setting, "weights": form, "documents": asked.documents,
                        "requests": len(answers), "ours_seconds": seconds,
                        "peer_seconds": (before + after) / 2, "ratio": (before + after) / 2 / seconds,
                        "batch_size": size, "threads": threads, "model": model,
                        **differences(answers, expected),
                    }
                )  # fmt: skip
                check_equal(rows[-1])
                Console(stderr=True).print(rows[-1], highlight=False)
    return rows


def differences(found: Answers, expected: Answers) -> dict[str, Any]:
    """Return the largest difference in nats and how many requests differ in what is written greedily."""
    values = np.array([[value for value, _ in answers] for answers in (found, expected)])
    flags = np.array([[flag for _, flag in answers] for answers in (found, expected)])
    return {
        "largest_difference": float(np.abs(values[0] - values[1]).max()),
        "greedy_differing": int((flags[0] != flags[1]).sum()),
    }


def check_equal(row: dict[str, Any]) -> None:
    """Stop where both sides differ in the same precision: then no ratio means anything."""
    if row["weights"] == "float32" and (
        not row["largest_difference"] <= LARGEST_DIFFERENCE or row["greedy_differing"]
    ):
        raise RuntimeError(f"float32 answers differ: {row}")


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows for people."""
    table = Table(title="loglikelihood in lm-eval: seconds, and how many times faster than hf")
    for column in (
        "task",
        "setting",
        "weights",
        "ours",
        "hf (batch)",
        "ratio",
        "largest difference",
        "greedy ≠",
    ):
        table.add_column(column, justify="left" if column in ("task", "setting", "weights") else "right")
    for row in rows:
        table.add_row(
            row["task"],
            row["setting"],
            row["weights"],
            f"{row['ours_seconds']:.1f}",
            f"{row['peer_seconds']:.1f} ({row['batch_size']})",
            f"{row['ratio']:.2f}",
            f"{row['largest_difference']:.2g}",
            f"{row['greedy_differing']} of {row['requests']}",
        )
    return table


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return how many times faster ours is as the table of the docs: a line per task and setting."""
    lines = [f"| | {' | '.join(FORMS)} |", f"|---|{'--:|' * len(FORMS)}"]
    ratios = {(row["task"], row["setting"], row["weights"]): row["ratio"] for row in rows}
    for task, setting in dict.fromkeys((row["task"], row["setting"]) for row in rows):
        cells = [f"{ratios[task, setting, form]:.1f}" for form in FORMS]
        lines.append(f"| {NAMES[task]}, {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document_counts(text: str) -> tuple[int, int]:
    """Read how many documents there are without demonstrations and with them."""
    counts = text.split(",")
    if len(counts) not in (1, 2) or not all(count.isdigit() and int(count) >= 4 for count in counts):
        raise typer.BadParameter(f"--documents: expected one number from 4, or two as 32,8, got '{text}'")
    return int(counts[0]), int(counts[-1])


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Put the table between this file's marks.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where stores are kept; else a temporary folder.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Rows of the tasks.")] = SHARED / "data",
    model: Annotated[str, typer.Option(help="A model in a form that float32 can be made of.")] = "smollm2",
    documents: Annotated[
        str, typer.Option(help="Documents per task, without demonstrations and with them.")
    ] = "32,8",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each side.")] = 1,
) -> None:
    """Measure both on this machine."""
    if not data_dir.is_dir():
        raise typer.BadParameter(f"--data-dir: folder {data_dir} does not exist")
    without, few_shot = document_counts(documents)
    every = [
        (setting, Asked(data_dir, task, shots, sampler, few_shot if shots else without))
        for task in DEFINITIONS
        for setting, shots, sampler in SETTINGS
    ]
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        rows = compared(model, folder or Path(temporary), every, threads)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    # In a file there is no terminal whose width would cut the columns.
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table_of(rows))
    if docs is not None:
        put_table(docs, "speed", Path(__file__).name, markdown(rows))


if __name__ == "__main__":
    typer.run(main)
