"""SECURITY.md names tests that are there, and is found from the docs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_that_it_names_is_there() -> None:
    files = re.findall(r"`(test_\w+\.py)`", TEXT)
    named = re.findall(r"`(test_\w+)`", TEXT)
    assert len(named) >= 10
    text = "".join((ROOT / "tests" / "faults" / name).read_text(encoding="utf-8") for name in set(files))
    assert not [name for name in named if f"def {name}(" not in text]


def test_every_promise_has_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| of ")]
    assert len(rows) == 13
    assert all("test_" in row.split("|")[3] for row in rows)


def test_the_docs_link_to_it() -> None:
    assert "](../SECURITY.md)" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    navigation = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    assert "- SECURITY.md" in navigation
    assert "!/SECURITY.md" in navigation
