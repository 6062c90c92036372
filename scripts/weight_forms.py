"""What each form of weights costs in accuracy, disk and time: the tables of docs/stores.md and the README.

    python scripts/weight_forms.py [--models demo,smollm2] [--out runs/forms] [--store-dir DIR] [--rounds 5]
        [--docs docs/stores.md] [--readme README.md] [--json FILE]

Each model is evaluated in every form by the same command, `lowmem-icl run --experiments evaluate`: the demo
on all its tasks at 0, 4 and 16 shots, a pretrained model on four tasks of word pairs at 0 and 5. Accuracy is
the mean over tasks and shot counts. `difference` is how far the right answer's log-probability lies from
that in float32, as a mean of absolute values over all documents, in nats. `layers` are the layers' files,
which are what a sweep reads; embeddings are the same in every form. Seconds are the processor's, on one
thread, for 1,280 tokens through all layers, read from disk as in a sweep: the least of several rounds in
which the forms take turns. Where others use the machine as well they are a little too many.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, get_args

import polars as pl
import torch
import typer
from doc_tables import put_table
from rich.console import Console

from lowmem_icl.model.attention import whole_row
from lowmem_icl.model.store import Weights, open_store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.numbers import clean_accuracy
from lowmem_icl.report.run_tables import read_run

FORMS: tuple[Weights, ...] = ("float32", "bfloat16", "int8", "nf4")
REFERENCE: Weights = "float32"
OPTIONS = {"demo": ("--shots", "0,4,16")}
PRETRAINED = (
    "--tasks",
    "english_french,country_capital,antonym,present_past",
    "--shots",
    "0,5",
    "--limit",
    "32",
)
DOCUMENT = ("task", "shots", "document", "option")
HALF_BYTES = 2
PASS_TOKENS, ROW_TOKENS = 1280, 128


@dataclass(frozen=True)
class Form:
    """What one form of a model's weights gives: its layers' bytes on disk and their share of float16, mean
    accuracy, the mean distance from float32 in nats, and the processor's seconds for a pass.
    """

    model: str
    weights: Weights
    layers_bytes: int
    share_of_half: float
    accuracy: float
    difference: float
    seconds: float


def evaluate(model: str, weights: Weights, folder: Path, store_dir: Path | None) -> None:
    """Evaluate a model in one form into a run folder; a finished one is taken as it is."""
    command = [sys.executable, "-c", "from lowmem_icl.cli.app import app; app()", "run", "--model", model]
    where = ["--out", str(folder), *(["--store-dir", str(store_dir)] if store_dir else [])]
    options = OPTIONS.get(model, PRETRAINED)
    arguments = [*command, "--weights", weights, "--experiments", "evaluate", *options, *where, "--quiet"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise typer.BadParameter(f"{model} in {weights}: {done.stderr.strip()}")


def layers_on_disk(folder: Path) -> tuple[int, float]:
    """Return the bytes of a store's layer files, and their share of what the parameters take in float16."""
    store = open_store(folder)
    size = sum(path.stat().st_size for path in store.layer_paths)
    shapes = store.skeleton.layer_parameters().values()
    parameters = sum(math.prod(shape) for shape in shapes) * store.skeleton.layers
    return size, size / (HALF_BYTES * parameters)


def distance(answers: pl.DataFrame, reference: pl.DataFrame) -> float:
    """Return how far the right answers' log-probabilities lie from others, a mean over documents in nats."""
    both = answers.filter("gold").join(reference, on=DOCUMENT, suffix="_reference", validate="1:1")
    return float((both["logprob"] - both["logprob_reference"]).abs().mean())  # type: ignore[arg-type]


def pass_seconds(folders: Mapping[Weights, Path], rounds: int) -> dict[Weights, float]:
    """Return the processor's seconds for PASS_TOKENS through all layers of each store, on one thread."""
    torch.set_num_threads(1)
    stores = {weights: open_store(folder) for weights, folder in folders.items()}
    seconds: dict[Weights, list[float]] = {weights: [] for weights in stores}
    for _ in range(rounds):
        for weights, store in stores.items():
            with StreamedModel(store, device=torch.device("cpu"), resident_bytes=0) as model, torch.no_grad():
                residual = torch.randn(PASS_TOKENS, model.skeleton.width)
                rows = [whole_row(ROW_TOKENS)] * (PASS_TOKENS // ROW_TOKENS)
                start = time.process_time()
                for _, layer in model.layers(range(model.skeleton.layers)):
                    residual = layer.run(residual, rows)
                seconds[weights].append(time.process_time() - start)
    return {weights: min(taken) for weights, taken in seconds.items()}


def forms_of(model: str, out: Path, store_dir: Path | None, rounds: int) -> list[Form]:
    """Return a model in every form."""
    folders: dict[Weights, Path] = {weights: out / f"{Path(model).stem}-{weights}" for weights in FORMS}
    for weights, folder in folders.items():
        evaluate(model, weights, folder, store_dir)
    runs = {weights: read_run(folder) for weights, folder in folders.items()}
    answers = {weights: pl.read_parquet(folder / "answers.parquet") for weights, folder in folders.items()}
    stores: dict[Weights, Path] = {
        weights: Path(run.record["model"]["store"]) for weights, run in runs.items()
    }
    seconds, found = pass_seconds(stores, rounds), []
    for weights, run in runs.items():
        accuracies = clean_accuracy(run.results).filter(pl.col("task") != AGGREGATE)["value"]
        size, share = layers_on_disk(stores[weights])
        found.append(
            Form(
                Path(model).stem, weights, size, share, sum(accuracies) / len(accuracies),
                distance(answers[weights], answers[REFERENCE]), seconds[weights],
            )
        )  # fmt: skip
    return found


def table(forms: Sequence[Form]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| model | `--weights` | layers | of float16 | accuracy | difference, nats | seconds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for form in forms:
        size = f"{form.layers_bytes / 1e6:.3g} MB | {100 * form.share_of_half:.0f} %"
        scores = f"{form.accuracy:.3f} | {form.difference:.2g}"
        lines.append(f"| {form.model} | {form.weights} | {size} | {scores} | {form.seconds:.3g} |")
    return "\n".join(lines)


def short_table(forms: Sequence[Form]) -> str:
    """Return the README's table as Markdown: a row per form, the largest model's share of float16."""
    models = list(dict.fromkeys(form.model for form in forms))
    by_weights = {(form.model, form.weights): form for form in forms}
    lines = [
        f"| `--weights` | disk, of float16 | {' | '.join(f'accuracy, {model}' for model in models)} |",
        f"|---|--:|{'--:|' * len(models)}",
    ]
    for weights in FORMS:
        scores = " | ".join(f"{by_weights[model, weights].accuracy:.3f}" for model in models)
        share = by_weights[models[-1], weights].share_of_half
        lines.append(f"| {weights} | {100 * share:.0f} % | {scores} |")
    return "\n".join(lines)


def main(
    models: Annotated[str, typer.Option(help="Comma-separated, as --model takes them.")] = "demo,smollm2",
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/forms"),
    store_dir: Annotated[Path | None, typer.Option(help="Folder for the stores.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 5,
    docs: Annotated[Path | None, typer.Option(help="Put the table between this file's marks.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Put a short one between this file's marks.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Evaluate every model in every form and print the table."""
    assert set(FORMS) == set(get_args(Weights))
    console = Console(stderr=True)
    forms: list[Form] = []
    for model in models.split(","):
        forms += forms_of(model, out, store_dir, rounds)
        console.print(f"{model}: done", highlight=False)
    text = table(forms)
    print(text)
    if docs is not None:
        put_table(docs, "weights", Path(__file__).name, text)
    if readme is not None:
        put_table(readme, "weights", Path(__file__).name, short_table(forms))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(form) for form in forms], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
