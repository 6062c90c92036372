"""The site of the docs: built strictly, whole, and loading nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem_icl

ROOT = Path(__file__).parents[1]
TOOLS = ("mkdocs", "material", "mkdocstrings_handlers.python")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built; a broken link, a missing anchor or a page outside the navigation ends the build."""
    for tool in TOOLS:
        if importlib.util.find_spec(tool.partition(".")[0]) is None:
            pytest.skip(f"{tool} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet")
    # The theme prints an advertisement of its successor unless it is told not to.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [*command, "-f", "docs/mkdocs.yml", "-d", folder],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_has_all_that_it_loads_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\"> ]+)", text)
        loaded += re.findall(r"<link[^>]* href=\"?([^\"> ]+)[^>]*rel=\"?stylesheet", text)
        loaded += re.findall(r"<link rel=\"?stylesheet\"? href=\"?([^\"> ]+)", text)
        assert any(target.endswith(".css") for target in loaded)
        for target in loaded:
            assert "://" not in target, f"{page.name} loads {target}"
            assert target.startswith("data:") or (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = (site / "docs" / "api.html").read_text(encoding="utf-8")
    assert not [
        name
        for name in lowmem_icl.__all__
        if name[0] != "_" and f"id=lowmem_icl.{name}" not in text.replace('"', "")
    ]
