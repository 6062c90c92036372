"""The README's table of sizes: what `lowmem-icl plan` says of every OPT, without any weights.

    python scripts/plan_sizes.py [--sizes 125m,…,66b] [--memory 16GB] [--readme README.md] [--json FILE]

Each size gets a checkpoint of its exact shape whose weight file is empty (sparse, so that it takes no room):
`plan` reads its config, its file sizes and the real rows of the tasks, and measures this machine with random
weights. The programme is fixed (`PROGRAMME`): piqa and copa at 0 and 1 shots, 64 documents each, shared
demonstrations; clean scores, importance, and every head and FFN removed alone.

Run it on a machine that does nothing else: small models are measured several times too slow where threads
wait for other work.

Hours on a card are an estimate, since `plan` measures only the machine that it runs on: the planned
operations at `--card-rate`, or the planned reads at `--card-read`, whichever takes longer, by experiment. The
default rate, 20 T operations per second, is about half of what an RTX 3090 (24 GB) can do in float32 (35.6
TFLOP/s), the form in which gradients, attention and the vocabulary are computed. int8 products run on its
tensor cores, whose peak is eight times that; the estimate does not count on it. 3 GB/s is a usual NVMe drive.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from lowmem_icl import __version__

SHARED = Path(os.environ.get("LOWMEM_ICL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PROGRAMME = (
    "--tasks", "piqa,copa", "--shots", "0,1", "--limit", "64", "--demonstrations", "shared",
    "--experiments", "evaluate,importance,ablate",
)  # fmt: skip
# Where the table stands in the README.
BEGIN, END = "<!-- sizes: scripts/plan_sizes.py -->", "<!-- /sizes -->"
HALF_BYTES = 2
VOCABULARY, CONTEXT = 50272, 2048


@dataclass(frozen=True)
class Shape:
    """An OPT's shape; `embedding` is the width of its embeddings where these are projected."""

    layers: int
    heads: int
    width: int
    embedding: int | None = None

    def config(self) -> dict[str, Any]:
        """Return the checkpoint's config.json."""
        return {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "hidden_size": self.width,
            "ffn_dim": 4 * self.width,
            "word_embed_proj_dim": self.embedding or self.width,
            "do_layer_norm_before": self.embedding is None,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
        }

    @property
    def units(self) -> int:
        """Heads and FFNs."""
        return self.layers * (self.heads + 1)

    @property
    def parameters(self) -> int:
        """Parameters, norms left out."""
        embedding = self.embedding or self.width
        projections = 0 if self.embedding is None else 2 * embedding * self.width
        in_layer = 12 * self.width**2 + 9 * self.width
        return self.layers * in_layer + VOCABULARY * embedding + CONTEXT * self.width + projections


SHAPES = {
    "125m": Shape(12, 12, 768),
    "350m": Shape(24, 16, 1024, embedding=512),
    "1.3b": Shape(24, 32, 2048),
    "2.7b": Shape(32, 32, 2560),
    "6.7b": Shape(32, 32, 4096),
    "13b": Shape(40, 40, 5120),
    "30b": Shape(48, 56, 7168),
    "66b": Shape(64, 72, 9216),
}


@dataclass(frozen=True)
class Card:
    """What a card is taken to do per second: operations, and bytes read from disk for it."""

    operations: float
    read_bytes: float

    def seconds(self, stage: dict[str, Any]) -> float:
        """Return how long a planned stage takes: reading goes on beside computing."""
        return float(max(stage["operations"] / self.operations, stage["read_bytes"] / self.read_bytes))


@dataclass(frozen=True)
class PlannedSize:
    """What a size takes: bytes on disk, the smallest --memory, hours here and, estimated, on a card."""

    size: str
    units: int
    store_bytes: int
    smallest_memory_bytes: int
    hours: float
    card_hours: float


def weightless_checkpoint(folder: Path, shape: Shape, tokenizer: Path) -> Path:
    """Return a checkpoint folder of a shape whose one weight file is a hole of the right size."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    # With an index nobody opens the file before it is converted, which never happens here.
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model": shard}}))
    with (folder / shard).open("wb") as opened:
        opened.truncate(HALF_BYTES * shape.parameters)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


def plan(checkpoint: Path, data_dir: Path, memory: str) -> subprocess.CompletedProcess[str]:
    """Run `lowmem-icl plan --json` on a checkpoint."""
    command = [sys.executable, "-c", "from lowmem_icl.cli.app import app; app()", "plan"]
    options = {
        "model": checkpoint,
        "data-dir": data_dir,
        "store-dir": checkpoint / "stores",
        "memory": memory,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    arguments = [*command, *flags, "--device=cpu", *PROGRAMME, "--json"]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def smallest_memory(checkpoint: Path, data_dir: Path) -> int:
    """Return the bytes that `plan` names as the least, by giving it far too few."""
    refused = plan(checkpoint, data_dir, "1MB")
    named = re.search(r"smallest that does is\s+--memory\s+(\d+)MB", refused.stderr)
    if named is None:
        raise typer.BadParameter(f"plan did not name the smallest memory: {refused.stderr.strip()}")
    return int(named[1]) * 10**6


def planned_size(size: str, checkpoint: Path, data_dir: Path, memory: str, card: Card) -> PlannedSize:
    """Return what a size takes by its plan, here and on a card."""
    done = plan(checkpoint, data_dir, memory)
    if done.returncode:
        raise typer.BadParameter(f"{size}: {done.stderr.strip()}")
    planned = json.loads(done.stdout)
    return PlannedSize(
        size,
        SHAPES[size].units,
        planned["store_bytes"],
        smallest_memory(checkpoint, data_dir),
        sum(stage["seconds"] for stage in planned["stages"]) / 3600,
        sum(card.seconds(stage) for stage in planned["stages"]) / 3600,
    )


def hours_text(hours: float) -> str:
    """Return hours to two digits: < 0.1, 3.4, 120, 1,400."""
    if hours < 0.1:
        return "< 0.1"
    return f"{hours:.2g}" if hours < 10 else f"{float(f'{hours:.2g}'):,.0f}"


def table(sizes: list[PlannedSize]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| OPT | units | disk | smallest `--memory` | hours, CPU | hours, 24 GB card |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for one in sizes:
        disk, memory = (f"{size / 1e9:.2g} GB" for size in (one.store_bytes, one.smallest_memory_bytes))
        hours = f"{hours_text(one.hours)} | {hours_text(one.card_hours)}"
        lines.append(f"| {one.size} | {one.units:,} | {disk} | {memory} | {hours} |")
    return "\n".join(lines)


def put_into(readme: Path, text: str) -> None:
    """Replace what stands between the two marks of a Markdown file."""
    content = readme.read_text(encoding="utf-8")
    before, mark, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise typer.BadParameter(f"{readme} has no table between {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main(
    sizes: Annotated[str, typer.Option(help="Comma-separated sizes.")] = ",".join(SHAPES),
    memory: Annotated[str, typer.Option(help="What every size is planned with.")] = "16GB",
    card_rate: Annotated[float, typer.Option(help="Operations per second of the card.")] = 20e12,
    card_read: Annotated[float, typer.Option(help="Bytes per second read for the card.")] = 3e9,
    data_dir: Annotated[Path, typer.Option(help="Rows of the tasks.")] = SHARED / "data",
    tokenizer: Annotated[Path, typer.Option(help="OPT's tokenizer.")] = SHARED / "tokenizer" / "opt",
    readme: Annotated[Path | None, typer.Option(help="Put the table between this file's marks.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Plan every size and print the table."""
    wanted = sizes.split(",")
    if unknown := set(wanted) - SHAPES.keys():
        raise typer.BadParameter(f"--sizes: unknown {', '.join(unknown)}; known are {', '.join(SHAPES)}")
    console, card = Console(stderr=True), Card(card_rate, card_read)
    planned = []
    with tempfile.TemporaryDirectory(prefix="sizes-") as temporary:
        for size in wanted:
            checkpoint = weightless_checkpoint(Path(temporary) / f"opt-{size}", SHAPES[size], tokenizer)
            planned.append(planned_size(size, checkpoint, data_dir, memory, card))
            console.print(f"opt-{size}: {hours_text(planned[-1].hours)} hours", highlight=False)
    text = table(planned)
    print(text)
    if readme is not None:
        put_into(readme, text)
    machine = {
        "version": __version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    if json_file is not None:
        given = {"programme": PROGRAMME, "memory": memory, "card": asdict(card), "machine": machine}
        content = given | {"sizes": [asdict(one) for one in planned]}
        json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
