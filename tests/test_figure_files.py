"""Files of figures: the same bytes twice, safe names, and none but our own removed."""

import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image
from synthetic_run import SyntheticRun
from test_figures import HOSTILE, WIDTHS
from typer.testing import CliRunner

from lowmem_icl.cli.app import app
from lowmem_icl.report.figures import files
from lowmem_icl.report.figures.files import FigureFiles, asked_files, file_stem, write_figures
from lowmem_icl.report.figures.registry import FIGURES
from lowmem_icl.report.run_tables import read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small run of three tasks."""
    return SyntheticRun(4, 8, ("recall", "<script>$x$", "_x"), (0, 4)).write(tmp_path / "run [1]")


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(files, "FIGURES", {name: FIGURES[name] for name in names})


@pytest.fixture
def one_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw a figure of each kind alone: a dot plot, maps, an image within a figure, curves."""
    only(monkeypatch, "accuracy", "ablate-heads", "ablate-estimates", "prune-heads")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw two figures alone, where it is files that are asked about."""
    only(monkeypatch, "accuracy", "ablate-heads")


@pytest.mark.usefixtures("one_of_each_kind")
@pytest.mark.parametrize("width", WIDTHS)
def test_the_same_numbers_give_the_same_bytes_of_exactly_the_width(folder: Path, width: float) -> None:
    asked = FigureFiles(files.FORMATS, (width,), ("recall",))
    written = {path: path.read_bytes() for path in write_figures(read_run(folder), asked)}
    assert len(written) == 3 * 4
    assert {path: path.read_bytes() for path in write_figures(read_run(folder), asked)} == written
    for path, content in written.items():
        assert path.stem.endswith("-recall" if width == 6.75 else "-recall-3.25in")
        if path.suffix == ".svg":
            assert ET.fromstring(content).attrib["width"] == f"{72 * width:g}pt"
        elif path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width == round(300 * width)
        else:
            (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ", content)
            assert float(box) == 72 * width
            assert b"/FontFile2" in content, "fonts are embedded as TrueType, not as Type 3"
            assert b"CreationDate" not in content


@pytest.mark.usefixtures("two")
def test_texts_stay_texts_and_names_are_no_markup(folder: Path) -> None:
    (accuracy,) = [path for path in write_figures(read_run(folder)) if path.name == "accuracy.svg"]
    root = ET.fromstring(accuracy.read_bytes())
    found = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"recall", "_x", "mean of tasks", "accuracy"} <= {(text or "").strip() for text in found}
    assert any((text or "").startswith("<script>") for text in found)
    assert b"<script" not in accuracy.read_bytes()
    (title,) = root.iter("{http://www.w3.org/2000/svg}title")
    assert title.text == FIGURES["accuracy"].caption


def test_file_names_are_safe_and_differ() -> None:
    stems = {
        file_stem(name, width, task)
        for name, width, task in itertools.product(FIGURES, WIDTHS, (None, "recall", HOSTILE, HOSTILE + "!"))
    }
    assert len(stems) == len(FIGURES) * 2 * 4
    assert not [stem for stem in stems if re.search(r"[^\w.+-]", stem)]
    assert file_stem("accuracy") == "accuracy"


@pytest.mark.usefixtures("two")
def test_only_our_own_figures_are_removed(folder: Path) -> None:
    figures = folder / "figures"
    figures.mkdir()
    old = "<svg><dc:title>Matplotlib v3.9</dc:title></svg>"
    for name, text in {"ffns": old, "heads": "<svg>drawn by hand</svg>", "mine": old}.items():
        (figures / f"{name}.svg").write_text(text)
    write_figures(read_run(folder))
    left = {path.name for path in figures.iterdir()}
    assert {"heads.svg", "mine.svg", "ablate-heads.svg"} <= left
    assert "ffns.svg" not in left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figures", "svgs"], "--figures: expected any of svg, pdf, png, separated by commas; got 'svgs'"),
        (["--figure-width", "wide"], "--figure-width: expected inches, separated by commas"),
        (["--figure-width", "12"], "--figure-width: expected inches from 3 to 10"),
        (["--task", "recal"], "did you mean 'recall'?"),
        (["--task", "zzz"], "it has recall, "),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["report", str(folder), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (folder / "report.html").exists()


@pytest.mark.usefixtures("two")
def test_report_writes_the_figures_asked_for(folder: Path) -> None:
    asked = ["--figures", "svg,png", "--figure-width", "3.25,5.5", "--task", "recall"]
    result = CliRunner().invoke(app, ["report", str(folder), *asked])
    assert result.exit_code == 0, result.output
    names = {path.name for path in (folder / "figures").iterdir()}
    for name in ("accuracy-recall-3.25in.png", "accuracy-recall-5.5in.svg", "accuracy.svg"):
        assert name in names
        assert name == "accuracy.svg" or name in result.stdout
    assert asked_files(None, None, ()) is None
