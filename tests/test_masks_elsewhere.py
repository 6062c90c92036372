"""docs/masks-elsewhere.md: its examples run, in order, and do what they say."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "masks-elsewhere.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"# needs (\w+)\n")


@pytest.mark.filterwarnings("ignore")
def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lowmem_icl", "masks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    names: dict[str, Any] = {}
    ran = 0
    for kind, text in blocks:
        needed = NEEDS.match(text)
        if needed is not None and importlib.util.find_spec(needed[1]) is None:
            continue
        ran += 1
        if kind == "python":
            # nnsight reads the file that a trace stands in.
            script = tmp_path / f"example_{ran}.py"
            script.write_text(text, encoding="utf-8")
            exec(compile(text, str(script), "exec"), names)
            continue
        for line in text.splitlines():
            result = invoke(*shlex.split(line)[1:])
            assert result.exit_code == 0, result.output
    assert ran >= 7
    torch.testing.assert_close(names["without"](names["tokens"]).logits, names["masked"], atol=1e-4, rtol=0)
    assert not torch.equal(names["clean"], names["masked"])
    for name in ("logits", "same"):
        if name in names:
            torch.testing.assert_close(names[name], names["masked"], atol=1e-4, rtol=0)
    for module in ("lens_mask", "sight_mask"):
        sys.modules.pop(module, None)
