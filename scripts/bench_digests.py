"""What it costs that a store's files are compared with their digests as a run first reads them.

    python scripts/bench_digests.py STORE... [--tokens N]... [--rounds N] [--sha256]

A store is opened and N tokens go through all its layers, once with its digests (as in a run's first pass)
and once trusting them (as in all later ones), in turns; least of the rounds, wall clock. Beside them the
rates of this machine's SHA-256 and XXH3, and the one at which its disk gives layer files. `--sha256` compares
those instead, as for stores of before.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from lowmem_icl.model.attention import whole_row
from lowmem_icl.model.digests import Digest
from lowmem_icl.model.integrity import distrust_all
from lowmem_icl.model.reading import read_rate
from lowmem_icl.model.store import Store, open_store
from lowmem_icl.model.streamed import StreamedModel

ROW_TOKENS = 256
SAMPLE_BYTES = 256 << 20


def hash_rate(digest: Digest) -> float:
    """Return the bytes per second of a kind of digest on one core."""
    sample, start = bytes(SAMPLE_BYTES), time.perf_counter()
    summed = digest.summing()
    summed.update(sample)
    return SAMPLE_BYTES / (time.perf_counter() - start)


def pass_seconds(store: Store, tokens: int) -> tuple[float, float]:
    """Return the seconds to open a model, and for these tokens through its layers."""
    rows = [whole_row(ROW_TOKENS)] * (tokens // ROW_TOKENS)
    start = time.perf_counter()
    with StreamedModel(store, device=torch.device("cpu"), resident_bytes=0) as model, torch.no_grad():
        opened = time.perf_counter()
        residual = torch.ones(len(rows) * ROW_TOKENS, model.skeleton.width)
        for _, layer in model.layers(range(model.skeleton.layers)):
            residual = layer.run(residual, rows)
        return opened - start, time.perf_counter() - opened


def main(
    stores: Annotated[list[Path], typer.Argument()],
    tokens: Annotated[list[int], typer.Option(help="Tokens of a pass; several times.")] = [1024, 8192],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Rounds; the least counts.")] = 5,
    sha256: Annotated[bool, typer.Option("--sha256", help="As for stores of before.")] = False,
) -> None:
    """Print a line per store and number of tokens."""
    rates = [hash_rate(Digest("sha256", "")), hash_rate(Digest("xxh3", ""))]
    print(f"SHA-256: {rates[0] / 1e9:.2f} GB/s; XXH3: {rates[1] / 1e9:.2f} GB/s; threads: "
          f"{torch.get_num_threads()}")  # fmt: skip
    for folder in stores:
        store = open_store(folder)
        if sha256:
            files = {
                name: file.model_copy(update={"xxh3": None}) for name, file in store.manifest.files.items()
            }
            store = replace(store, manifest=store.manifest.model_copy(update={"files": files}))
        print(f"{folder.name}: {store.size_bytes / 1e6:.0f} MB, read at "
              f"{read_rate(store.layer_paths, SAMPLE_BYTES) / 1e9:.2f} GB/s")  # fmt: skip
        for count in tokens:
            checked, trusted = [], []
            for _ in range(rounds):
                distrust_all()
                checked.append(pass_seconds(store, count))
                trusted.append(pass_seconds(store, count))
            opening = min(first for first, _ in checked) - min(first for first, _ in trusted)
            with_digests, without = (min(layers for _, layers in runs) for runs in (checked, trusted))
            print(f"  {count} tokens: {without:.3f} s trusted, {with_digests:.3f} s with digests "
                  f"({with_digests / without - 1:+.1%}); opening {opening:+.3f} s, once a run")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
