"""README and docs: short in front, no broken link, every file in the tree, every column explained."""

import json
import re
from pathlib import Path

import pytest

from lowmem_icl.report.page.write import SECTIONS
from lowmem_icl.tables.schema import DERIVED_TABLES, TABLES, read_table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowmem_icl"
DOCS = ROOT / "docs"
LONGEST_README_BYTES = 9_000
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "masks" / "README.md", *sorted(DOCS.glob("*.md"))]
COMMANDS = ("pip install -e . && lowmem-icl run", "pip install -e '.[test]' && pytest")


def anchors(page: Path) -> set[str]:
    """Return the names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree_files() -> set[str]:
    """Return the paths that the tree of docs/contributing.md names, relative to the repository."""
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\n```text\n(.*?)```\n<!-- /tree -->", text, re.DOTALL)
    assert block is not None
    named, folders = set(), [""]
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth + 1 :] = [folders[depth] + name]
        if not name.endswith("/"):
            named.add(folders[depth] + name)
    return named


def test_the_readme_is_short_and_gives_the_two_commands() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= LONGEST_README_BYTES
    for command in COMMANDS:
        assert f"\n{command}\n" in text.decode()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_page_names_headings_that_exist() -> None:
    text = (DOCS / "numbers.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^## (.+)$", text, re.MULTILINE))
    named = {heading for meaning in SECTIONS.values() for heading in meaning}
    assert named == headings


def test_the_list_of_pages_and_the_navigation_name_every_page() -> None:
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    listed = (DOCS / "README.md").read_text(encoding="utf-8")
    navigation = (DOCS / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in listed
        assert re.search(rf"^ +- (?:.+: )?docs/{page.name}$", navigation, re.MULTILINE), page.name


def test_the_tree_names_every_file_of_the_package_and_no_other() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    described = {name for name in files if not name.endswith("/__init__.py")} | {"lowmem_icl/__init__.py"}
    named = tree_files()
    assert not described - named
    assert not [name for name in named if not (ROOT / name).is_file()]


def section_of_tables(name: str) -> str:
    """Return the section of docs/tables.md with this heading."""
    text = (DOCS / "tables.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^##+ {re.escape(name)}\n(.*?)(?=^##+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(section)


@pytest.mark.parametrize("table", [*TABLES, *DERIVED_TABLES])
def test_every_column_is_explained(table: str) -> None:
    section = section_of_tables(f"{table}.parquet")
    columns = (TABLES | DERIVED_TABLES)[table]
    assert not [column for column in columns if f"`{column}`" not in section]


def test_every_metric_and_key_of_a_run_is_explained(small_run: Path) -> None:
    metrics = read_table(small_run / "results.parquet", "results")["metric"].unique().to_list()
    explained = section_of_tables("Metrics")
    assert not [metric for metric in metrics if f"`{metric}`" not in explained]
    summary = json.loads((small_run / "summary.json").read_text(encoding="utf-8"))
    explained = section_of_tables("summary.json")
    assert not [key for key in summary if f"`{key}`" not in explained]


def test_every_metric_that_is_explained_is_in_one_row() -> None:
    rows = section_of_tables("Metrics").splitlines()
    named = [
        name for row in rows if row.startswith("| `") for name in re.findall("`(.+?)`", row.split("|")[1])
    ]
    assert len(named) == len(set(named))
