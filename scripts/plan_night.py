"""What `plan` says of the paper's programme at OPT-66B: with default options, and with --preset night.

    python scripts/plan_night.py [--model opt-66b] [--docs docs/overnight.md] [--json FILE]

14 tasks, all of their rows, 0, 1 and 5 shots. The model is a config and a tokenizer. Operations and reads are
counted for a card with 24 GB beside 64 GB of memory, of each 80 %, at assumed rates: these decide how long
waves are, since a stop loses one, and so, a little, what is read and run twice.
"""

import json
import sys
import tempfile
from pathlib import Path
from subprocess import run
from typing import Annotated, Any

import typer
from doc_tables import put_table
from plan_sizes import CONFIGS, SHARED, weightless_checkpoint

PROGRAMMES = {"default": (), "--preset night": ("--preset", "night")}
EXPERIMENTS = ("evaluate", "importance", "ablate", "prune", "induction")
# No card is at hand: its rates are those of a night in which 5 E operations fit.
CARD = {
    "call_seconds": 2e-4,
    "attention_products_per_second": 7e13,
    "projection_products_per_second": 7e13,
    "ffn_products_per_second": 7e13,
    "backward_products_per_second": 1e13,
    "vocabulary_products_per_second": 1e13,
    "disk_bytes_per_second": 3e9,
    "memory_bytes": int(0.8 * 64e9),
    "device_memory_bytes": int(0.8 * 24e9),
}


def lowmem(*arguments: str) -> str:
    """Run a command of the tool and return what it prints."""
    command = [sys.executable, "-c", "from lowmem_icl.cli.app import app; app()", *arguments]
    done = run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise typer.BadParameter(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def card_file(folder: Path) -> Path:
    """Return a machine file of a card with 24 GB, in the form of this machine's own."""
    path = folder / "machine.json"
    lowmem("measure", "--out", str(path))
    machine = json.loads(path.read_text())
    path.write_text(json.dumps(machine | CARD))
    return path


def planned(checkpoint: Path, data_dir: Path, machine: Path, programme: tuple[str, ...]) -> dict[str, Any]:
    """Return the plan of a programme."""
    asked = ("--model", str(checkpoint), "--data-dir", str(data_dir), "--shots", "0,1,5")
    kept = ("--store-dir", str(checkpoint / "stores"), "--machine", str(machine))
    told: dict[str, Any] = json.loads(lowmem("plan", *asked, *kept, *programme, "--json"))
    return told


def table(plans: dict[str, dict[str, Any]]) -> str:
    """Return the operations and reads of every experiment as Markdown, a column per programme."""
    lines = [
        "| E operations (thousands of layers read) | " + " | ".join(f"`{name}`" for name in plans) + " |",
        "|---|" + "--:|" * len(plans),
    ]
    rows = {name: {stage["experiment"]: stage for stage in plan["stages"]} for name, plan in plans.items()}
    for experiment in EXPERIMENTS:
        cells = [_cell([stages[experiment]]) for stages in rows.values()]
        lines.append(f"| {experiment} | " + " | ".join(cells) + " |")
    lines.append("| all | " + " | ".join(_cell(plan["stages"]) for plan in plans.values()) + " |")
    return "\n".join(lines)


def _cell(stages: list[dict[str, Any]]) -> str:
    operations = sum(stage["operations"] for stage in stages) / 1e18
    reads = sum(stage["layers_read"] for stage in stages) / 1000
    return f"{operations:,.3g} ({reads:,.3g})"


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(CONFIGS)}.")] = "opt-66b",
    data_dir: Annotated[Path, typer.Option(help="Rows of the tasks.")] = SHARED / "data",
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.")] = SHARED / "tokenizer" / "opt",
    docs: Annotated[Path | None, typer.Option(help="A file that marks where the table goes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plans there.")] = None,
) -> None:
    """Plan both programmes and print the table."""
    with tempfile.TemporaryDirectory(prefix="night-") as temporary:
        checkpoint = weightless_checkpoint(Path(temporary) / model, CONFIGS[model], tokenizer)
        machine = card_file(Path(temporary))
        plans = {
            name: planned(checkpoint, data_dir, machine, options) for name, options in PROGRAMMES.items()
        }
    text = table(plans)
    typer.echo(text)
    if docs is not None:
        put_table(docs, "night", Path(__file__).name, text)
    if json_file is not None:
        json_file.write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
