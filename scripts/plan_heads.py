"""What `plan` says of patching and of icl-heads at OPT-66B: ten word-pair tasks, 25 prompts of ten shots.

    python scripts/plan_heads.py [--model opt-66b] [--docs docs/experiments.md]

The model is a config and a tokenizer; the card is the one that plan_night.py assumes.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from doc_tables import put_table
from plan_night import card_file, lowmem
from plan_sizes import CONFIGS, SHARED, weightless_checkpoint

TASKS = (
    "country_capital,antonym,singular_plural,present_past,present_participle,comparative,english_french,"
    "english_spanish,word_category,next_item"
)
EXPERIMENTS = ("icl-heads", "patch")


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(CONFIGS)}.")] = "opt-66b",
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.")] = SHARED / "tokenizer" / "opt",
    docs: Annotated[Path | None, typer.Option(help="A file that marks where the table goes.")] = None,
) -> None:
    """Plan both experiments and print the table."""
    lines = [
        "| 10 tasks × 25 prompts, 10 shots | changed prompts | E operations | weights read | minutes |",
        "|---|--:|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory(prefix="heads-") as temporary:
        checkpoint = weightless_checkpoint(Path(temporary) / model, CONFIGS[model], tokenizer)
        asked = ("--model", str(checkpoint), "--tasks", TASKS, "--shots", "10", "--train-limit", "25")
        kept = ("--limit", "64", "--store-dir", str(checkpoint / "stores"))
        machine = ("--machine", str(card_file(Path(temporary))))
        for name in EXPERIMENTS:
            plan = json.loads(lowmem("plan", *asked, *kept, *machine, "--experiments", name, "--json"))
            (stage,) = plan["stages"]
            reads = stage["read_bytes"] / plan["store_bytes"]
            lines.append(
                f"| `--experiments {name}` | {stage['amount']['ablations'] / 1e6:.2f} M | "
                f"{stage['operations'] / 1e18:.3g} | {reads:.1f} | {stage['seconds'] / 60:.0f} |"
            )
    text = "\n".join(lines)
    typer.echo(text)
    if docs is not None:
        put_table(docs, "heads", Path(__file__).name, text)


if __name__ == "__main__":
    typer.run(main)
