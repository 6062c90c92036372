"""Peak memory at OPT-66B's width: a model of few layers, run as a user runs it, against what `--memory` gave.

    python scripts/bench_memory.py [--layers 2] [--tokenizer DIR] [--folder DIR] [--docs docs/benchmarks.md]
        [--json FILE]

The store has random weights. Every row of the table is a process of its own: clean scores and every unit
removed alone on a short document, gradients of long ones, and the scores of heads on the longest random
sequence. A peak keeps to its memory where it is at most what the process holds after its imports,
plus --memory, plus 200 MB; the script fails where one does not.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from bench_common import OPT_66B, SHARED, in_child, opt_config, random_store
from bench_induction import score
from doc_tables import put_table
from rich.console import Console

from lowmem_icl.system.machine import peak_resident_bytes

SLACK_BYTES = 200_000_000
SEQUENCES = 1


@dataclass(frozen=True)
class Case:
    """What is run with which --memory, on how many documents of each split, of how many words."""

    experiments: str
    memory: str
    documents: int
    words: int


@dataclass(frozen=True)
class Peak:
    """What a case took, in bytes, and after how many seconds it was done."""

    experiments: str
    memory: str
    peak_bytes: int
    working_bytes: int
    seconds: float


RUNS = (Case("evaluate,ablate", "4GB", 1, 20), Case("importance", "8GB", 3, 200))
HEADS = Case("induction", "8GB", 1, 20)


def imports_bytes() -> int:
    """Return what a process holds that has imported all that a run needs."""
    import lowmem_icl.experiments.order
    import lowmem_icl.runner  # noqa: F401

    return peak_resident_bytes()


def write_documents(path: Path, case: Case) -> Path:
    """Write a task of the case's documents."""
    lines = [
        {"context": f"{number}" + " word" * case.words, "options": [" yes", " no"], "gold": number % 2}
        for number in range(4 * case.documents)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def peak_of_run(store: Path, case: Case, folder: Path) -> Peak:
    """Run a case's experiments by the command line; return what run.json says of its memory."""
    out = folder / case.experiments.replace(",", "-")
    task = write_documents(folder / f"{out.name}.jsonl", case)
    command = [sys.executable, "-c", "from lowmem_icl.cli.app import app; app()", "run"]
    options = {
        "model": store, "tasks": task, "shots": 0, "limit": case.documents, "train-limit": case.documents,
        "experiments": case.experiments, "memory": case.memory, "device": "cpu", "out": out,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([*command, *flags, "--labels=right", "--quiet"], check=True, stdout=subprocess.DEVNULL)
    record = json.loads((out / "run.json").read_text())
    seconds = sum(stage["seconds"] for stage in record["stages"].values())
    working = record["plan"]["memory"]["working_bytes"]
    return Peak(case.experiments, case.memory, record["peak_resident_bytes"], working, seconds)


def peak_of_heads(store: Path, folder: Path) -> Peak:
    """Score all heads on a few sequences."""
    own = write_documents(folder / "heads.jsonl", HEADS)
    found = in_child(score, store, own, HEADS.memory, SEQUENCES)
    return Peak(
        HEADS.experiments, HEADS.memory, found["peak_bytes"], found["working_bytes"], found["seconds"]
    )


def table(peaks: list[Peak], imports: int) -> str:
    """Return the table as Markdown."""
    lines = [
        "| experiments | `--memory` | working space, planned | peak memory | of it by imports |",
        "|---|--:|--:|--:|--:|",
    ]
    for peak in peaks:
        sizes = (f"{size / 1e9:.2f} GB" for size in (peak.working_bytes, peak.peak_bytes, imports))
        lines.append(f"| {peak.experiments} | {peak.memory.replace('GB', ' GB')} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def main(
    layers: int = 2,
    tokenizer: Annotated[Path, typer.Option(help="OPT's tokenizer.")] = SHARED / "tokenizer" / "opt",
    folder: Annotated[
        Path | None, typer.Option(help="Where the store is kept; else a temporary folder.")
    ] = None,
    docs: Annotated[Path | None, typer.Option(help="Put the table between this file's marks.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure and print; fail where a peak exceeds its memory."""
    console, peaks = Console(stderr=True), []
    with tempfile.TemporaryDirectory(prefix="memory-") as temporary:
        models = folder or Path(temporary)
        models.mkdir(parents=True, exist_ok=True)
        config = opt_config(layers, OPT_66B.num_attention_heads, OPT_66B.hidden_size)
        store = in_child(random_store, models / f"opt66b-{layers}layers", config, tokenizer, layers, print)
        imports = in_child(imports_bytes)
        for case in RUNS:
            console.print(f"{case.experiments} in {case.memory}", highlight=False)
            peaks.append(peak_of_run(store.folder, case, Path(temporary)))
        console.print(f"{HEADS.experiments} in {HEADS.memory}", highlight=False)
        peaks.append(peak_of_heads(store.folder, Path(temporary)))
    text = table(peaks, imports)
    print(text)
    if docs is not None:
        put_table(docs, "memory", Path(__file__).name, text)
    if json_file is not None:
        content = {"imports_bytes": imports, "threads": os.cpu_count(), "peaks": [asdict(p) for p in peaks]}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    for peak in peaks:
        allowed = imports + round(float(peak.memory.removesuffix("GB")) * 1e9) + SLACK_BYTES
        if peak.peak_bytes > allowed:
            raise typer.BadParameter(f"{peak.experiments}: {peak.peak_bytes} bytes, {allowed} are allowed")


if __name__ == "__main__":
    typer.run(main)
