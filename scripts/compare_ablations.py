r"""Ablations by zeros, by means and by other documents' values beside each other: how well estimates rank
units like exact drops, how far the three rankings by exact drops agree, and how large drops are.

    for ablation in zero mean resample; do
        lowmem-icl run --tasks recall,category,knowledge --shots 0,16 --experiments importance,ablate \
            --screen attribution --exact 36 --ablation $ablation --out runs/demo-$ablation
    done
    python scripts/compare_ablations.py runs/demo-zero,runs/demo-mean,runs/demo-resample \
        [ZERO,MEAN,RESAMPLE …] [--docs docs/experiments.md] [--json FILE]

Each argument names the folders of three runs of the same options but for --ablation, in which all units are
ablated exactly and have an estimate. Everything is of drops of gold log-probability; correlations are
Spearman's over all units, means over tasks. With --docs the table goes where the file marks it.
"""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer
from doc_tables import put_table

from lowmem_icl.protocols import ABLATIONS
from lowmem_icl.session.record import run_record
from lowmem_icl.statistics.agreement import spearman
from lowmem_icl.tables.schema import read_table

PAIRS = tuple(itertools.combinations(ABLATIONS, 2))
HEADER = (
    "| model, tasks, shots | "
    + " | ".join(
        [
            *(f"estimate and drop, {name}" for name in ABLATIONS),
            *(f"drops by {one} and {other}" for one, other in PAIRS),
            *(f"mean drop, {name}" for name in ABLATIONS),
        ]
    )
    + " |\n"
    + "|---" * (1 + len(ABLATIONS) + len(PAIRS) + len(ABLATIONS))
    + "|"
)
UNIT = ["task", "shots", "kind", "layer", "head"]


def drops(folder: Path, ablation: str) -> pl.DataFrame:
    """Return what every unit costs by a run; raise BadParameter where that is not as the table needs it."""
    found = read_table(folder / "results.parquet", "results").filter(
        pl.col("procedure") == "single",
        pl.col("metric") == "gold_logprob_drop",
        pl.col("task") != "aggregate",
    )
    if set(found["ablation"]) != {ablation} or not found["exact"].all():
        raise typer.BadParameter(f"{folder}: expected exact drops of all units with --ablation {ablation}")
    return found.select(*UNIT, "value")


def estimated(folder: Path) -> pl.DataFrame:
    """Return how far a run's estimates agree with its drops, by task and shot count."""
    return read_table(folder / "results.parquet", "results").filter(
        pl.col("metric") == "estimate_spearman",
        pl.col("method") == "attribution",
        pl.col("task") != "aggregate",
    )


def compared(folders: list[Path]) -> list[dict[str, Any]]:
    """Return, by shot count, what three runs come to."""
    by_ablation = dict(zip(ABLATIONS, folders, strict=True))
    exact = {name: drops(folder, name) for name, folder in by_ablation.items()}
    agreement = {name: estimated(folder) for name, folder in by_ablation.items()}
    found = []
    for shots in sorted(set(exact["zero"]["shots"])):
        here = {name: frame.filter(pl.col("shots") == shots) for name, frame in exact.items()}
        found.append(
            {
                "model": Path(run_record(folders[0])["model"]["id"]).name,
                "tasks": sorted(set(here["zero"]["task"])),
                "shots": shots,
                "estimate": {
                    name: frame.filter(pl.col("shots") == shots)["value"].mean()
                    for name, frame in agreement.items()
                },
                "ranking": {
                    f"{one}, {other}": _mean_spearman(here[one], here[other]) for one, other in PAIRS
                },
                "drop": {name: frame["value"].mean() for name, frame in here.items()},
            }
        )
    return found


def _mean_spearman(one: pl.DataFrame, other: pl.DataFrame) -> float:
    both = one.join(other, on=UNIT, nulls_equal=True)
    by_task = both.partition_by("task")
    return float(
        np.mean([spearman(task["value"].to_numpy(), task["value_right"].to_numpy()) for task in by_task])
    )


def row(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    columns = [f"{found['model']}: {', '.join(found['tasks'])}; {found['shots']}"]
    columns += [f"{value:.2f}" for name in ("estimate", "ranking") for value in found[name].values()]
    columns += [f"{value:.3f}" for value in found["drop"].values()]
    return "| " + " | ".join(columns) + " |"


def main(
    runs: Annotated[list[str], typer.Argument(help="Three run folders each, with commas between.")],
    docs: Annotated[Path | None, typer.Option(help="A file that marks where the table goes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Print the table."""
    found = []
    for named in runs:
        folders = [Path(name) for name in named.split(",")]
        if len(folders) != len(ABLATIONS):
            raise typer.BadParameter(f"{named}: expected three folders, of {', '.join(ABLATIONS)}")
        found += compared(folders)
    table = "\n".join([HEADER, *map(row, found)])
    typer.echo(table)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if docs is not None:
        put_table(docs, "ablations", Path(__file__).name, table)


if __name__ == "__main__":
    typer.run(main)
