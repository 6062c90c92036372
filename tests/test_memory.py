"""Peak memory, measured by child processes on a checkpoint that is ten times larger than what they may
hold.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import HASTE, invoke
from conftest import make_checkpoint, small_config
from demo_scores import DEMO
from safetensors.torch import save_file
from transformers import OPTForCausalLM

from lowmem_icl.conversion.checkpoint import open_checkpoint

# The way back holds the graph of a layer.
ALLOWANCES = {"evaluate": 60_000_000, "importance": 90_000_000, "ablate": 60_000_000}
SHARD_BYTES = 20_000_000

# Every command runs twice: first on a tiny model, so that what counts is the work and not what libraries
# load.
CHILD = f"""
{HASTE}
import contextlib, io, json, sys
from lowmem_icl.cli.app import app
from lowmem_icl.system.machine import peak_resident_bytes
peaks = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            app(arguments)
        except SystemExit as stopped:
            assert not stopped.code, arguments
    peaks.append(peak_resident_bytes())
print(json.dumps(peaks))
"""


@dataclass(frozen=True)
class Large:
    source: Path
    source_bytes: int
    tiny: Path


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder


def write_large(folder: Path, layers: int) -> Path:
    """Write a bfloat16 checkpoint whose layers all have one layer's random weights,
    in shards of SHARD_BYTES or less.
    """
    wide = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_attention_heads": 8}
    config = small_config(num_hidden_layers=1, vocab_size=528, init_std=0.02, **wide)
    torch.manual_seed(0)
    tensors = OPTForCausalLM(config).bfloat16().state_dict()
    tensors.pop("lm_head.weight")
    first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    parts = [{name: tensor for name, tensor in tensors.items() if name not in first}]
    parts += [
        {name.replace(".0.", f".{number}.", 1): tensor for name, tensor in first.items()}
        for number in range(layers)
    ]
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number in range(0, len(parts), 3):
        file = f"model-{number:05}.safetensors"
        shard = {name: tensor for part in parts[number : number + 3] for name, tensor in part.items()}
        save_file({name: tensor.clone() for name, tensor in shard.items()}, folder / file, {"format": "pt"})
        assert (folder / file).stat().st_size <= SHARD_BYTES
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.num_hidden_layers, config.dtype = layers, torch.bfloat16
    config.save_pretrained(folder)
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    """A checkpoint of 600 MB in many small shards, and a tiny one of the same kind."""
    folder = tmp_path_factory.mktemp("large")
    source = write_large(folder / "source", layers=96)
    tiny = with_tokenizer(make_checkpoint(folder / "tiny", vocab_size=528))
    return Large(source, open_checkpoint(source).size_bytes, tiny)


def peaks_of(*commands: Sequence[object]) -> list[int]:
    """Run commands one after another in one process; return its peak memory after each."""
    arguments = [[str(argument) for argument in command] for command in commands]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )
    assert child.returncode == 0, child.stderr
    return [int(peak) for peak in json.loads(child.stdout.strip().splitlines()[-1])]


@pytest.fixture(scope="module")
def converted(large: Large) -> tuple[Path, list[int]]:
    """The store of the large checkpoint, and a child's peak memory before and after converting it."""
    store = large.source.parent / "store"
    tiny = ["convert", large.tiny, large.tiny.parent / "tiny-store"]
    return store, peaks_of(tiny, ["convert", large.source, store])


def test_converting_holds_a_layer_and_not_the_model(large: Large, converted: tuple[Path, list[int]]) -> None:
    _, (before, after) = converted
    assert large.source_bytes > 600e6
    assert after - before < large.source_bytes / 10 + 2 * SHARD_BYTES, (
        "a tenth of it, and the pages of two shards"
    )


@pytest.mark.parametrize(
    "experiments",
    [("evaluate", "importance"), pytest.param(("ablate",), marks=pytest.mark.slow)],
    ids="+".join,
)
def test_a_run_keeps_to_its_memory(
    large: Large, converted: tuple[Path, list[int]], tmp_path: Path, experiments: tuple[str, ...]
) -> None:
    rows = [
        {"context": f"cat dax {number}", "options": [" wug", " dog"], "gold": number % 2}
        for number in range(48)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def command(model: Path, experiment: str, out: Path, *more: object) -> list[object]:
        limit = 1 if experiment == "ablate" else 24
        task = ("--tasks", tmp_path / "own.jsonl", "--shots", 0, "--train-limit", limit)
        return ["run", "--model", model, *task, "--experiments", experiment, "--out", out / experiment, *more]

    store, _ = converted
    tiny, run = tmp_path / "tiny", tmp_path / "run"
    first = [command(large.tiny.parent / "tiny-store", experiment, tiny) for experiment in experiments]
    then = [command(store, name, run, "--memory", ALLOWANCES[name]) for name in experiments]
    peaks = peaks_of(*first, *then)
    before = peaks[len(experiments) - 1]
    for experiment, after in zip(experiments, peaks[len(experiments) :], strict=True):
        allowance = ALLOWANCES[experiment]
        assert large.source_bytes > 6 * allowance
        assert after - before < allowance
        record = json.loads((run / experiment / "run.json").read_text())
        assert record["peak_resident_bytes"] == pytest.approx(after, rel=0.05)
        (stage,) = record["stages"].values()
        assert stage["read_bytes"] == pytest.approx(stage["planned_read_bytes"], rel=0.02)
        assert stage["read_bytes"] > 250e6


def test_what_cannot_fit_is_refused_with_what_would(converted: tuple[Path, list[int]]) -> None:
    task = ("--tasks", "recall", "--shots", 0, "--limit", 4)
    refused = invoke("plan", "--model", converted[0], *task, "--memory", "20MB")
    assert refused.exit_code == 3
    assert "the smallest that does is --memory" in refused.stderr
