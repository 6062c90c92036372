"""What `lowmem-icl plan` says of models without any weights; for OPT, the README's table of sizes.

    python scripts/plan_sizes.py [--models opt-125m,…,opt-66b] [--memory 16GB] [--readme README.md]
        [--json FILE]
    python scripts/plan_sizes.py --models llama-3-70b,qwen2.5-72b,gemma-2-27b

Each model is a folder with its config.json and a tokenizer, and nothing else: `plan` works out file sizes,
reads the real rows of the tasks, and measures this machine with random weights. OPT's tokenizer serves all,
since only the lengths of texts matter. The programme is fixed (`PROGRAMME`): piqa and copa at 0 and 1 shots,
64 documents each, shared demonstrations; clean scores, importance, and every head and FFN removed alone.

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
from doc_tables import put_table
from rich.console import Console

from lowmem_icl import __version__
from lowmem_icl.model.skeleton import Skeleton

SHARED = Path(os.environ.get("LOWMEM_ICL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PROGRAMME = (
    "--tasks", "piqa,copa", "--shots", "0,1", "--limit", "64", "--demonstrations", "shared",
    "--experiments", "evaluate,importance,ablate",
)  # fmt: skip


def opt_config(layers: int, heads: int, width: int, embedding: int | None = None) -> dict[str, Any]:
    """Return an OPT's config.json; `embedding` is the width of its embeddings where these are projected."""
    return {
        "model_type": "opt",
        "torch_dtype": "float16",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": width,
        "ffn_dim": 4 * width,
        "word_embed_proj_dim": embedding or width,
        "do_layer_norm_before": embedding is None,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }


OPTS = {
    "opt-125m": opt_config(12, 12, 768),
    "opt-350m": opt_config(24, 16, 1024, embedding=512),
    "opt-1.3b": opt_config(24, 32, 2048),
    "opt-2.7b": opt_config(32, 32, 2560),
    "opt-6.7b": opt_config(32, 32, 4096),
    "opt-13b": opt_config(40, 40, 5120),
    "opt-30b": opt_config(48, 56, 7168),
    "opt-66b": opt_config(64, 72, 9216),
}
# As published.
LARGE = {
    "llama-3-70b": {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    },
    "qwen2.5-72b": {
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "max_window_layers": 80,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "torch_dtype": "bfloat16",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 144,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-06,
    },
}
CONFIGS: dict[str, dict[str, Any]] = OPTS | LARGE


@dataclass(frozen=True)
class Card:
    """What a card is taken to do per second: operations, and bytes read from disk for it."""

    operations: float
    read_bytes: float

    def seconds(self, stage: dict[str, Any]) -> float:
        """Return how long a planned stage takes: reading goes on beside computing."""
        return float(max(stage["operations"] / self.operations, stage["read_bytes"] / self.read_bytes))


@dataclass(frozen=True)
class PlannedModel:
    """What a model takes: bytes on disk, the smallest --memory, operations, hours here and, estimated, on a
    card.
    """

    model: str
    units: int
    store_bytes: int
    smallest_memory_bytes: int
    operations: int
    hours: float
    card_hours: float


def weightless_checkpoint(folder: Path, config: dict[str, Any], tokenizer: Path) -> Path:
    """Return a folder with a config and a tokenizer, as much of a checkpoint as planning needs."""
    folder.mkdir(parents=True)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
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


def planned_model(model: str, checkpoint: Path, data_dir: Path, memory: str, card: Card) -> PlannedModel:
    """Return what a model takes by its plan, here and on a card."""
    done = plan(checkpoint, data_dir, memory)
    if done.returncode:
        raise typer.BadParameter(f"{model}: {done.stderr.strip()}")
    planned = json.loads(done.stdout)
    skeleton, stages = Skeleton.from_dict(CONFIGS[model]), planned["stages"]
    return PlannedModel(
        model,
        skeleton.layers * (skeleton.heads + 1),
        planned["store_bytes"],
        smallest_memory(checkpoint, data_dir),
        sum(stage["operations"] for stage in stages),
        sum(stage["seconds"] for stage in stages) / 3600,
        sum(card.seconds(stage) for stage in stages) / 3600,
    )


def hours_text(hours: float) -> str:
    """Return hours to two digits: < 0.1, 3.4, 120, 1,400."""
    if hours < 0.1:
        return "< 0.1"
    return f"{hours:.2g}" if hours < 10 else f"{float(f'{hours:.2g}'):,.0f}"


def table(models: list[PlannedModel]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| model | units | disk | smallest `--memory` | hours, CPU | hours, 24 GB card |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for one in models:
        disk, memory = (f"{size / 1e9:.2g} GB" for size in (one.store_bytes, one.smallest_memory_bytes))
        hours = f"{hours_text(one.hours)} | {hours_text(one.card_hours)}"
        lines.append(f"| {one.model} | {one.units:,} | {disk} | {memory} | {hours} |")
    return "\n".join(lines)


def main(
    models: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CONFIGS)}.")] = ",".join(OPTS),
    memory: Annotated[str, typer.Option(help="What every model is planned with.")] = "16GB",
    card_rate: Annotated[float, typer.Option(help="Operations per second of the card.")] = 20e12,
    card_read: Annotated[float, typer.Option(help="Bytes per second read for the card.")] = 3e9,
    data_dir: Annotated[Path, typer.Option(help="Rows of the tasks.")] = SHARED / "data",
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer for all.")] = SHARED / "tokenizer" / "opt",
    readme: Annotated[Path | None, typer.Option(help="Put the table between this file's marks.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Plan every model and print the table."""
    wanted = models.split(",")
    if unknown := set(wanted) - CONFIGS.keys():
        raise typer.BadParameter(f"--models: unknown {', '.join(unknown)}; known are {', '.join(CONFIGS)}")
    console, card = Console(stderr=True), Card(card_rate, card_read)
    planned = []
    with tempfile.TemporaryDirectory(prefix="sizes-") as temporary:
        for model in wanted:
            checkpoint = weightless_checkpoint(Path(temporary) / model, CONFIGS[model], tokenizer)
            planned.append(planned_model(model, checkpoint, data_dir, memory, card))
            console.print(f"{model}: {hours_text(planned[-1].hours)} hours", highlight=False)
    text = table(planned)
    print(text)
    if readme is not None:
        put_table(readme, "sizes", Path(__file__).name, text)
    machine = {
        "version": __version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    if json_file is not None:
        given = {"programme": PROGRAMME, "memory": memory, "card": asdict(card), "machine": machine}
        content = given | {"models": [asdict(one) for one in planned]}
        json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
