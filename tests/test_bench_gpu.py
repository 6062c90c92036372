"""The card's benchmark on the CPU, with a tiny model: every line of it runs but the card's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint, make_store

from lowmem_icl.masks.mask import Mask

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_gpu

    monkeypatch.setattr(bench_gpu.Peer, "_only", None)
    return bench_gpu


def test_both_sides_score_the_same_rows_under_the_same_masks(gpu: Any, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", init_std=0.02)
    store = make_store(model, tmp_path / "store", "int8")
    case = gpu.Case(model, store.folder, "cpu", 3, 20, 10**7)
    masks = [Mask(heads=frozenset([(0, 1)])), Mask(heads=frozenset([(2, 3)]))]
    streamed, ours = (gpu.our_sweep(case, masks, streamed) for streamed in (True, False))
    theirs = gpu.peer_passes(case, masks, 4)
    assert ours["scores"] == streamed["scores"]
    assert gpu.largest_difference(ours["scores"], theirs["scores"]) < 0.02, "the same model, rows and masks"
    assert ours["scores"][0] != ours["scores"][1]
    assert {type(layer.fc1).__name__ for layer in gpu.Peer.of(case).hooked.layers} == {"Linear8bitLt"}


def test_without_a_card_it_says_so(gpu: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(gpu.typer.BadParameter, match="torch sees no CUDA device here"):
        gpu.main()


@pytest.mark.slow
def test_one_command_prints_and_writes_all_figures(tmp_path: Path) -> None:
    model, written = make_checkpoint(tmp_path / "tiny", init_std=0.02), tmp_path / "figures.json"
    flags = {"model": model, "device": "cpu", "documents": 3, "context": 20, "ablations": 5,
             "peer-ablations": 3, "memory-gb": 0.01, "json": written}  # fmt: skip
    ran = subprocess.run(
        [SCRIPTS / "bench_gpu.sh", *(f"--{name}={value}" for name, value in flags.items())],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "tokens/s" in ran.stdout
    assert "Linear8bitLt" in ran.stdout
    figures = json.loads(written.read_text(encoding="utf-8"))
    # A document has two options of 20 + 4 tokens, the last of which is only predicted.
    assert figures["tokens"] == 3 * 2 * 23 * 5
    assert figures["linear8bitlt"]["sampled"] == "3 of 5"
    assert figures["largest_difference"] < 0.02
    assert figures["largest_difference_streamed"] == 0
    for side in ("ours", "ours_streamed", "linear8bitlt"):
        rate, seconds = figures[side]["tokens_per_second"], figures[side]["seconds"]
        assert rate == pytest.approx(figures["tokens"] / seconds)
        assert figures[side]["peak_bytes"] > 0
    assert figures["ratio"] == pytest.approx(figures["linear8bitlt"]["seconds"] / figures["ours"]["seconds"])
    assert figures["machine"]["cuda"] is None
    assert {"torch", "bitsandbytes", "cuda"} <= figures["versions"].keys()
