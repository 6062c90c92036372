"""The examples run, and the notebooks are made from them."""

import json
import os
import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
EXAMPLES = sorted((PROJECT / "scripts" / "examples").glob("*.py"))
# What each must have printed for its text to be true.
SAID = {
    "important_heads": ("'L0H0', 'L1H0', 'L1H1'",),
    "induction_heads": ("prefix_matching", "random-median"),
    "learning": ("recall", "knowledge"),
    "masks_elsewhere": ("under the mask:",),
    "pruning": ("kept: ['L0H0', 'L1H0', 'L1H1', 'L2H0', 'L0F']",),
    "shared_heads": ("category",),
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(
    example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    before = set(os.listdir())
    runpy.run_path(str(example))
    printed = capsys.readouterr().out
    assert all(said in printed for said in SAID[example.stem])
    assert set(os.listdir()) == before


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_notebooks_hold_their_scripts(example: Path) -> None:
    path = PROJECT / "docs" / "notebooks" / f"{example.stem}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines: list[str] = []
    for cell in cells:
        source = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "markdown":
            lines += ["# %% [markdown]", *(f"# {line}".rstrip() for line in source)]
        else:
            lines += ["# %%", *source]
    script = [line for line in example.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert [line for line in lines if line.strip()] == script
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.get("outputs", ()))
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in code)
