"""Peak memory, measured by child processes on a checkpoint that is ten times larger than what they may hold."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint, small_config
from transformers import OPTForCausalLM

from lowmem_icl.conversion.checkpoint import open_checkpoint

DEMO = Path(__file__).parents[1] / "lowmem_icl" / "demo"
# The way back holds the graph of a layer.
ALLOWANCES = {"evaluate": 60_000_000, "importance": 90_000_000, "ablate": 60_000_000}
SHARD_BYTES = 20_000_000

# Every command runs twice: first on a tiny model, so that what counts is the work and not what libraries load.
CHILD = """
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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    """A checkpoint of 600 MB in many small shards, and a tiny one of the same kind."""
    folder = tmp_path_factory.mktemp("large")
    wide = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_attention_heads": 8}
    torch.manual_seed(0)
    config = small_config(num_hidden_layers=96, vocab_size=528, init_std=0.02, **wide)
    OPTForCausalLM(config).bfloat16().save_pretrained(folder / "source", max_shard_size="20MB")
    source = with_tokenizer(folder / "source")
    tiny = with_tokenizer(make_checkpoint(folder / "tiny", vocab_size=528))
    return Large(source, open_checkpoint(source).size_bytes, tiny)


def peaks_of(*commands: list[str]) -> list[int]:
    told = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def converted(large: Large) -> tuple[Path, list[int]]:
    """The store of the large checkpoint, and a child's peak memory before and after converting it."""
    store = large.source.parent / "store"
    tiny = str(large.tiny.parent / "tiny-store")
    return store, peaks_of(["convert", str(large.tiny), tiny], ["convert", str(large.source), str(store)])


def test_converting_holds_a_layer_and_not_the_model(large: Large, converted: tuple[Path, list[int]]) -> None:
    _, (before, after) = converted
    assert large.source_bytes > 600e6
    assert after - before < large.source_bytes / 10 + 2 * SHARD_BYTES, (
        "a tenth of it, and the pages of two shards"
    )


@pytest.mark.parametrize(
    "experiment", ["evaluate", "importance", pytest.param("ablate", marks=pytest.mark.slow)]
)
def test_a_run_keeps_to_its_memory(
    large: Large, converted: tuple[Path, list[int]], tmp_path: Path, experiment: str
) -> None:
    store, _ = converted
    rows = [
        {"context": f"cat dax {number}", "options": [" wug", " dog"], "gold": number % 2}
        for number in range(48)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    same = ["--tasks", str(tmp_path / "own.jsonl"), "--shots", "0", "--experiments", experiment]
    same += ["--train-limit", "1" if experiment == "ablate" else "24"]
    tiny = ["run", "--model", str(large.tiny.parent / "tiny-store"), "--out", str(tmp_path / "tiny"), *same]
    allowance = ALLOWANCES[experiment]
    run = ["run", "--model", str(store), "--memory", str(allowance), "--out", str(tmp_path / "run"), *same]
    before, after = peaks_of(tiny, run)
    assert large.source_bytes > 6 * allowance
    assert after - before < allowance
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["peak_resident_bytes"] == pytest.approx(after, rel=0.05)
    (stage,) = record["stages"].values()
    assert stage["read_bytes"] == pytest.approx(stage["planned_read_bytes"], rel=0.02)
    assert stage["read_bytes"] > 250e6


def test_what_cannot_fit_is_refused_with_what_would(large: Large, converted: tuple[Path, list[int]]) -> None:
    told = subprocess.run(
        [sys.executable, "-c", "from lowmem_icl.cli.app import app; app()", "plan", "--model", str(converted[0]),
         "--tasks", "recall", "--shots", "0", "--limit", "4", "--memory", "20MB"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert told.returncode == 3
    assert "the smallest that does is --memory" in told.stderr
