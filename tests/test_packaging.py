"""What is handed on: wheel and sdist hold the repository's files, the version stands in one place."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_readme_scripts import script

import lowmem_icl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def citation() -> Any:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist of the repository as it is."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout by git, so nothing says what belongs there")
    wheel, sdist = script("try_wheel").build(tmp_path_factory.mktemp("dist"))
    return wheel, sdist


def test_wheel_and_sdist_hold_what_the_repository_holds(built: tuple[Path, Path]) -> None:
    module = script("try_wheel")
    module.check_files(*built)
    files = module.wheel_files(built[0])
    for part in (
        "py.typed",
        "demo/model.safetensors",
        "demo/tasks/recall_0.yaml",
        "conversion/calibration.txt",
        "tasks/definitions/piqa.yaml",
        "tasks/pairs/antonym/train.jsonl",
        "report/page/assets/main.js",
        "report/page/assets/page.css",
        "report/page/templates/page.html.jinja",
    ):
        assert f"lowmem_icl/{part}" in files
    assert f"-{lowmem_icl.__version__}-" in built[0].name


def test_every_extra_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^## Extras\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert not [name for name in project["optional-dependencies"] if f"`{name}`" not in table]


@pytest.mark.slow
def test_a_wheel_runs_the_demo_where_nothing_else_is() -> None:
    pytest.importorskip("build")
    subprocess.run([sys.executable, ROOT / "scripts" / "try_wheel.py", "--borrow"], check=True)


def test_all_that_repeat_the_version_agree(citation: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "lowmem_icl/__init__.py"
    assert str(citation["version"]) == lowmem_icl.__version__
    shown = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    assert re.findall(r"^  version = \{(.+)\}", shown, re.MULTILINE) == [lowmem_icl.__version__]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert lowmem_icl.__version__ in re.findall(r"^## .*$", changelog, re.MULTILINE)[0]


def test_the_citation_has_what_its_form_requires_and_names_the_paper(citation: Any) -> None:
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["authors"][0]["family-names"] == "Bansal"
    shown = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    assert paper["title"] in shown
    assert paper["url"] in shown
