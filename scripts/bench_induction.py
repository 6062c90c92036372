"""Scores of all heads at OPT-66B's width: time, reads and peak memory of a model of few layers,
against a plain forward.

    python scripts/bench_induction.py [--layers 2] [--sequences 100] [--memory 6GB] [--tokenizer DIR]
        [--folder DIR]

The store has random weights; what is measured is `lowmem-icl run --experiments induction`'s pass over random
sequences, in a process of its own, with memory dealt out as a run deals it.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_common import OPT_66B, SHARED, in_child, opt_config, random_store

from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.head_scores import HeadScores
from lowmem_icl.engine.passes import PassSetup, score_heads
from lowmem_icl.experiments.induction.stage import head_questions
from lowmem_icl.model.store import open_store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.memory import plan_memory
from lowmem_icl.session.prepare import prepare
from lowmem_icl.system.machine import peak_resident_bytes


def score(folder: Path, own_task: Path, memory: str, sequences: int) -> dict[str, Any]:
    """Score all heads on the longest so many random sequences; return seconds, reads and peak memory."""
    wanted = {"model": str(folder), "tasks": str(own_task), "shots": "0", "experiments": "induction"}
    prepared = prepare(RunOptions.model_validate(wanted | {"memory": memory}))
    asked = head_questions(prepared)
    asked = replace(
        asked,
        repeated=asked.repeated[-sequences:],
        unrepeated=asked.unrepeated[-sequences:],
        base_tokens=asked.base_tokens[-sequences:],
    )
    store = open_store(folder)
    dealt = plan_memory(prepared, max(len(row) for row in asked.rows))
    skeleton = store.skeleton
    scores = HeadScores.empty(sequences, skeleton.layers, skeleton.heads)
    before = peak_resident_bytes()
    with StreamedModel(
        store,
        device=torch.device("cpu"),
        resident_bytes=dealt.resident_bytes,
        tables_in_memory=dealt.tables_in_memory,
    ) as model:
        start = time.perf_counter()
        setup = PassSetup(model, dealt.limits(), CleanCache(dealt.cache_bytes, dealt.spill_bytes))
        score_heads(setup, asked, scores)
        seconds = time.perf_counter() - start
        read_bytes = model.read_bytes
    return {
        "layers": skeleton.layers,
        "sequences": sequences,
        "tokens": sum(len(row) for row in asked.rows),
        "seconds": round(seconds, 1),
        "reads_of_the_weights": round(read_bytes / (skeleton.layers * store.layer_bytes), 2),
        "peak_bytes": peak_resident_bytes(),
        "peak_bytes_after_imports": before,
        "micro_batch_tokens": dealt.micro_batch_tokens,
        "working_bytes": dealt.working_bytes,
    }


def main(
    layers: int = 2,
    sequences: int = 100,
    memory: str = "6GB",
    folder: Annotated[
        Path | None, typer.Option(help="Where the store is kept; else a temporary folder.")
    ] = None,
    tokenizer: Path = SHARED / "tokenizer" / "opt",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as temporary:
        models = folder or Path(temporary)
        models.mkdir(parents=True, exist_ok=True)
        config = opt_config(layers, OPT_66B.num_attention_heads, OPT_66B.hidden_size)
        store = random_store(models / f"opt66b-{layers}layers", config, tokenizer, layers, print)
        own = models / "own.jsonl"
        own.write_text('{"context": "a", "options": [" b", " c"], "gold": 0}\n' * 4)
        measured = in_child(score, store.folder, own, memory, sequences)
    print(json.dumps(measured, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps([measured], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
