"""The benchmarks' own peers: hooks on transformers' models of any family, and the case on a real model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from family_models import CASES, LAYERS
from family_oracles import option_logprobs

from lowmem_icl.masks.mask import Mask
from lowmem_icl.tasks.packing import OptionTokens

SCRIPTS = Path(__file__).parents[1] / "scripts"
TOKENIZER, DATA = SHARED / "tokenizer" / "opt", SHARED / "data"
OPTIONS = [
    OptionTokens((3, 7, 11, 5), (5, 2), 3, False),
    OptionTokens((3, 7, 11), (9,), 3, False),
    OptionTokens((8, 1, 4, 4, 6, 10), (6, 10, 12), 4, False),
]
MASKS = [Mask(), Mask(heads=frozenset([(0, 1), (LAYERS - 1, 2)])), Mask(ffns=frozenset([1]))]


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "llama", "gemma2", "granite", "falcon 40b"])
def test_the_hooked_peer_scores_batches_as_whole_runs_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from bench_peers import HuggingFace

    case = CASES[name]
    model = case.make()
    peer = HuggingFace(model)
    for mask in MASKS:
        expected = option_logprobs(case, model, OPTIONS, mask)
        np.testing.assert_allclose(peer.score(OPTIONS, mask, 2), expected, atol=1e-4)
    assert np.ptp([peer.score(OPTIONS, mask, 3)[2] for mask in MASKS]) > 1e-2, "masks change scores"


@pytest.mark.slow
def test_the_real_case_compares_scores_before_times(tmp_path: Path) -> None:
    """A small model stands in for the real one."""
    if not (TOKENIZER.is_dir() and DATA.is_dir()):
        pytest.skip(f"no tokenizer or rows in {SHARED}")
    llama = CASES["llama"]
    wide = llama.__class__("llama", llama.config | {"vocab_size": 50272, "max_position_embeddings": 2048})
    folder = wide.save(tmp_path / "model")
    for path in TOKENIZER.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    written = tmp_path / "figures.json"
    flags = {"case": "real", "model": folder, "documents": 2, "peer-units": 3, "folder": tmp_path / "made",
             "data-dir": DATA, "json": written}  # fmt: skip
    subprocess.run(
        [sys.executable, SCRIPTS / "bench_sweep.py", *(f"--{name}={value}" for name, value in flags.items())],
        check=True,
        timeout=600,
    )
    rows = json.loads(written.read_text(encoding="utf-8"))
    totals = {row["case"]: row for row in rows if "ratio" in row}
    assert {name: row["target"] for name, row in totals.items()} == {
        "real 0-shot": 3.0, "real 0-shot, int8": None, "real 5-shot": 15.0, "real 5-shot, int8": None,
    }  # fmt: skip
    of_tasks = [row for row in rows if "ratio" not in row and row["weights"] == "float32"]
    assert {row["task"] for row in of_tasks} == {
        f"{task}, {shots}-shot, float32" for task in ("copa", "arc_easy") for shots in (0, 5)
    }
    assert all(row["largest_difference"] < 1e-3 for row in of_tasks)
    units = wide.config["num_hidden_layers"] * (wide.config["num_attention_heads"] + 1)
    assert {row["sampled"] for row in of_tasks} == {f"3 of {units}"}
