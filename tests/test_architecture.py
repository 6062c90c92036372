"""Imports go downward, files stay small, and looking at the help stays quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lowmem_icl"
OWN = "lowmem_icl"

# What a part of the package must not import, of our own modules and of others.
FORBIDDEN = {
    "model": {"tasks", "engine", "experiments", "stages", "report", "cli", "run", "polars", "lm_eval"},
    "engine": {"tasks", "experiments", "stages", "report", "cli", "run", "polars", "lm_eval"},
    "tasks": {"engine", "model", "experiments", "stages", "report", "cli", "run", "polars", "torch"},
    "experiments": {
        "engine",
        "model",
        "stages",
        "report",
        "cli",
        "run",
        "transformers",
        "bitsandbytes",
        "torch",
    },
    "rankings": {"engine", "model", "experiments", "stages", "torch"},
    "resampling": {"engine", "model", "experiments", "stages", "torch"},
    "statistics": {"engine", "model", "experiments", "stages", "torch"},
    "results": {"engine", "model", "experiments", "stages", "torch"},
    "masks": {"engine", "model", "experiments", "stages", "torch"},
    "report": {"engine", "model", "experiments", "stages", "torch"},
    "stages": {"cli", "run", "report", "planning", "transformers", "bitsandbytes"},
    "planning": {"cli", "run", "report", "transformers", "bitsandbytes"},
}


def imported(path: Path) -> set[str]:
    """Names of imported packages; of our own, the first part below lowmem_icl."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module == OWN:
                modules = [f"{OWN}.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            names.add(parts[1] if parts[0] == OWN and len(parts) > 1 else parts[0])
    return names


def files_of(part: str) -> list[Path]:
    return (
        [PACKAGE / f"{part}.py"]
        if (PACKAGE / f"{part}.py").is_file()
        else sorted((PACKAGE / part).rglob("*.py"))
    )


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_downward(part: str) -> None:
    assert files_of(part)
    for path in files_of(part):
        assert not imported(path) & FORBIDDEN[part], path


def test_no_experiment_imports_another() -> None:
    names = {path.stem for path in (PACKAGE / "experiments").glob("*.py")} - {"__init__"}
    for path in (PACKAGE / "experiments").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [
            name for name in names if f"experiments.{name}" in text or f"experiments import {name}" in text
        ], path


def test_experiments_touch_no_files() -> None:
    for path in (PACKAGE / "experiments").glob("*.py"):
        assert not imported(path) & {"pathlib", "os", "shutil", "tempfile", "json"}, path


def test_only_families_names_the_fields_of_an_architecture() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "families.py":
            text = path.read_text(encoding="utf-8")
            for word in ("self_attn", "out_proj", "fc1", "fc2", "embed_positions", "project_in"):
                assert word not in text, f"{path} names {word}"


def test_files_stay_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_help_imports_no_torch() -> None:
    code = "import sys; import lowmem_icl.cli; print(sorted({'torch', 'transformers', 'lm_eval', 'polars'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
