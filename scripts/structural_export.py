"""What `masks export --structural` lets go of a real model: sizes and speed, before and after.

    python scripts/structural_export.py --model smollm2 [--docs docs/masks-elsewhere.md]

Masks of half the heads and half the FFNs: taken out as whole layers, as an FFN and the attention after it, as
groups of keys and values, and at random. Each is written with zeros and as a smaller model; both are loaded
by plain transformers, must give the same logits, and are timed in turns on one row of tokens.
"""

import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from doc_tables import put_table

from lowmem_icl.conversion.checkpoint import Checkpoint
from lowmem_icl.errors import InputError
from lowmem_icl.export.folder import ExportedFolder, export_folder, open_source
from lowmem_icl.masks.files import MaskFile, MaskModel
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.options import run_options

SEED = 42
HEADINGS = (
    "| mask | heads, FFNs removed | parameters | MB | s, zeros | s, smaller | times as fast | difference |"
)


@dataclass(frozen=True)
class Shape:
    """How many layers, heads, and heads of keys and values a model has."""

    layers: int
    heads: int
    groups: int

    def attention(self, layers: range) -> frozenset[tuple[int, int]]:
        """All heads of some layers."""
        return frozenset((layer, head) for layer in layers for head in range(self.heads))


def masks_of(shape: Shape) -> dict[str, Mask]:
    """Return masks of about half the heads and half the FFNs, by what they are made of."""
    every, per_group = range(shape.layers), shape.heads // shape.groups
    odd, even = every[1::2], every[::2]
    n_groups = shape.groups // 2 or 1
    last = [shape.heads - 1 - head for head in range(per_group * n_groups)]
    in_groups = frozenset((layer, head) for layer in every for head in last)
    drawn = random.Random(SEED)
    heads = drawn.sample(sorted(shape.attention(every)), shape.layers * shape.heads // 2)
    ffns = frozenset(drawn.sample(every, shape.layers // 2))
    return {
        "every other layer": Mask(shape.attention(odd), frozenset(odd)),
        "every other FFN, and the attention after it": Mask(
            shape.attention(odd), frozenset(even[: len(odd)])
        ),
        f"{n_groups} of {shape.groups} groups of keys and values in every layer": Mask(in_groups),
        "that, and every other layer": Mask(
            in_groups | shape.attention(odd), frozenset(odd)
        ),
        "all heads of every other layer, other FFNs at random": Mask(shape.attention(odd), ffns),
        "heads and FFNs at random": Mask(frozenset(heads), ffns),
    }  # fmt: skip


def loaded(folder: Path) -> Any:
    """Load a checkpoint as anyone would."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def seconds_in_turns(models: Mapping[str, Any], tokens: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return the fastest of some forward passes of every model, one after the other in each round, in seconds
    of the processor: what else the machine does is not in them.
    """
    best = dict.fromkeys(models, float("inf"))
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, model in models.items():
                started = time.process_time()
                model(tokens)
                # The first round, which loads pages, is slower: the fastest counts.
                best[name] = min(best[name], time.process_time() - started)
    return best


def row(name: str, mask: Mask, shape: Shape, cells: list[str]) -> str:
    """Return a line of the table."""
    removed = f"{len(mask.heads)} of {shape.layers * shape.heads}, {len(mask.ffns)} of {shape.layers}"
    return f"| {' | '.join([name, removed, *cells])} |"


def measured(
    named: tuple[str, MaskFile], source: Checkpoint, shape: Shape, tokens: torch.Tensor, rounds: int
) -> str:
    """Write a mask both ways, load both and return a line of the table."""
    name, mask_file = named
    with tempfile.TemporaryDirectory() as folder:
        zeros: ExportedFolder = export_folder(mask_file, source, Path(folder) / "zeros")
        try:
            small = export_folder(mask_file, source, Path(folder) / "small", structural=True)
        except InputError:
            whole = f"{zeros.after.parameters / 1e6:.1f} M"
            cells = [f"{whole}: nothing can go", f"{zeros.after.size_bytes / 1e6:.0f}", "", "", "", ""]
            return row(name, mask_file.mask, shape, cells)
        models = {"zeros": loaded(zeros.folder), "small": loaded(small.folder)}
        seconds = seconds_in_turns(models, tokens, rounds)
        with torch.no_grad():
            logits = [model(tokens).logits.log_softmax(-1) for model in models.values()]
        difference = float((logits[0] - logits[1]).abs().max())
    before, after = small.before, small.after
    cells = [
        f"{before.parameters / 1e6:.1f} M → {after.parameters / 1e6:.1f} M",
        f"{before.size_bytes / 1e6:.0f} → {after.size_bytes / 1e6:.0f}",
        f"{seconds['zeros']:.2f}",
        f"{seconds['small']:.2f}",
        f"{seconds['zeros'] / seconds['small']:.2f}",
        f"{difference:.0e}" if difference else "0",
    ]
    return row(name, mask_file.mask, shape, cells)


def main(
    model: Annotated[str, typer.Option(help="A checkpoint folder, a .gguf file, a hub id, `smollm2` …")],
    tokens: Annotated[int, typer.Option(help="Length of the row that is timed.")] = 256,
    rounds: Annotated[int, typer.Option(help="Timed passes of each.")] = 9,
    docs: Annotated[Path | None, typer.Option(help="Put the table between this file's marks.")] = None,
) -> None:
    """Print the table."""
    # Threads that wait for each other would count twice.
    torch.set_num_threads(1)
    source = open_source(model, None, run_options({}, None, {}).resolved_store_dir)
    skeleton = Skeleton.from_dict(source.config)
    heads = skeleton.heads
    shape = Shape(skeleton.layers, heads, int(getattr(skeleton.config, "num_key_value_heads", heads)))
    facts = MaskModel(
        id=model, model_type=skeleton.config.model_type, layers=shape.layers, heads=heads, digest="none"
    )
    drawn = torch.randint(0, skeleton.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(SEED))
    lines = [HEADINGS, "|---" * (HEADINGS.count("|") - 1) + "|"]
    typer.echo("\n".join(lines))
    for name, mask in masks_of(shape).items():
        mask_file = MaskFile("made", mask, facts, {"method": "by hand"})
        lines.append(measured((name, mask_file), source, shape, drawn, rounds))
        typer.echo(lines[-1])
    if docs is not None:
        put_table(docs, "structural", Path(__file__).name, "\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
