"""Runs into disks that have hardly any room."""

from pathlib import Path

import pytest
import torch
from commands import invoke
from safetensors.torch import save

from lowmem_icl.model.writing import write_tensors
from lowmem_icl.planning import memory

DEMO = ("--limit", "8", "--train-limit", "4", "--shots", "0,16", "--experiments", "evaluate,ablate")


def test_three_megabytes_do_for_what_needs_no_spill(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda folder: 3 << 20)
    result = invoke("plan", *DEMO, "--store-dir", stores, "--out", tmp_path / "run", "--memory", "1GB")
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(memory, "free_bytes", lambda folder: 0)
    assert invoke("plan", *DEMO, "--store-dir", stores, "--out", tmp_path / "run").exit_code == 0


def test_what_cannot_be_written_is_said_in_one_line() -> None:
    refused = invoke("run", "--out", "/proc/x")
    assert refused.exit_code == 2
    assert "--out /proc/x: cannot be written to" in refused.stderr


def test_tensors_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.int8).view(2, 3),
        "a": torch.ones(3, 2).t(),
        "é": torch.zeros(5, dtype=torch.bfloat16),
        "form": torch.tensor(0, dtype=torch.uint8),
    }
    write_tensors(tmp_path / "file", tensors, {"k": "v"})
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "file").read_bytes() == save(whole, metadata={"k": "v"})
