"""Make masks/demo: the demo model's masks as a default run makes them, for others to reuse and compare with.

    python scripts/make_demo_masks.py [FOLDER]

Kept are the greedy and certified masks of tasks and shot counts and of all tasks together, and every
level of the curves over heads by the aggregate ranking.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lowmem_icl.cli.audience import audience_of
from lowmem_icl.cli.terminal import Terminal
from lowmem_icl.options import RunOptions
from lowmem_icl.runner import run

KEPT = re.compile(r"(?:greedy|certified)-.*|gradient-heads-\d+-aggregate-.*")


def main(
    folder: Annotated[Path, typer.Argument(help="Where the masks go.")] = Path(__file__).parents[1]
    / "masks"
    / "demo",
) -> None:
    """Run the demo and keep its masks."""
    with tempfile.TemporaryDirectory(prefix="demo-masks-") as temporary:
        finished = run(RunOptions(out=Path(temporary) / "run"), audience_of(Terminal()))
        kept = [path for path in (finished.folder / "masks").glob("*.json") if KEPT.fullmatch(path.stem)]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in kept:
            shutil.copy(path, folder)
    typer.echo(f"{len(kept)} masks in {folder}")


if __name__ == "__main__":
    typer.run(main)
