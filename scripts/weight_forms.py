"""What each form of weights costs in accuracy, disk and time: the table of docs/stores.md.

    python scripts/weight_forms.py [--models demo,smollm2] [--out runs/forms] [--store-dir DIR] [--rounds 2]
        [--docs docs/stores.md] [--json FILE]

Each model is evaluated in every form by the same command, `lowmem-icl run --experiments evaluate`: the demo
on all its tasks at 0, 4 and 16 shots, a pretrained model on four tasks of word pairs at 0 and 5. Accuracy is
the mean over tasks and shot counts. `difference` is how far the right answer's log-probability lies from
that in float32, as a mean of absolute values over all documents, in nats. `layers` are the layers' files,
which are what a sweep reads; embeddings are the same in every form. Seconds are of the evaluation alone, the
least of several rounds in which the forms take turns; on a machine that does other work they are too many.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import polars as pl
import typer
from doc_tables import put_table
from rich.console import Console

from lowmem_icl.model.store import Weights, open_store
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
    "48",
)
DOCUMENT = ("task", "shots", "document", "option")
HALF_BYTES = 2


@dataclass(frozen=True)
class Form:
    """What one form of a model's weights gives: its layers' bytes on disk and their share of float16, mean
    accuracy, the mean distance from float32 in nats, and seconds.
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


def layers_on_disk(record: Mapping[str, Any]) -> tuple[int, float]:
    """Return the bytes of a run's layer files, and their share of what the parameters take in float16."""
    store = open_store(Path(record["model"]["store"]))
    size = sum(path.stat().st_size for path in store.layer_paths)
    shapes = store.skeleton.layer_parameters().values()
    parameters = sum(_count(shape) for shape in shapes) * store.skeleton.layers
    return size, size / (HALF_BYTES * parameters)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for axis in shape:
        count *= axis
    return count


def distance(answers: pl.DataFrame, reference: pl.DataFrame) -> float:
    """Return how far the right answers' log-probabilities lie from others, a mean over documents in nats."""
    both = answers.filter("gold").join(reference, on=DOCUMENT, suffix="_reference", validate="1:1")
    return float((both["logprob"] - both["logprob_reference"]).abs().mean())  # type: ignore[arg-type]


def forms_of(model: str, out: Path, store_dir: Path | None, rounds: int) -> list[Form]:
    """Return a model in every form."""
    folders: dict[Weights, list[Path]] = {
        weights: [out / f"{Path(model).stem}-{weights}-{round_number}" for round_number in range(rounds)]
        for weights in FORMS
    }
    for round_number in range(rounds):
        for weights in FORMS:
            evaluate(model, weights, folders[weights][round_number], store_dir)
    reference = pl.read_parquet(folders[REFERENCE][0] / "answers.parquet")
    found = []
    for weights in FORMS:
        first, *_ = runs = [read_run(folder) for folder in folders[weights]]
        answers = pl.read_parquet(folders[weights][0] / "answers.parquet")
        accuracies = clean_accuracy(first.results).filter(pl.col("task") != "aggregate")
        size, share = layers_on_disk(first.record)
        found.append(
            Form(
                Path(model).stem,
                weights,
                size,
                share,
                float(accuracies["value"].mean()),  # type: ignore[arg-type]
                distance(answers, reference),
                min(run.record["stages"]["evaluate"]["seconds"] for run in runs),
            )
        )
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


def main(
    models: Annotated[str, typer.Option(help="Comma-separated, as --model takes them.")] = "demo,smollm2",
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/forms"),
    store_dir: Annotated[Path | None, typer.Option(help="Folder for the stores.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 2,
    docs: Annotated[Path | None, typer.Option(help="Put the table between this file's marks.")] = None,
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
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(form) for form in forms], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
