"""Figures as files: formats, widths, names; the same numbers give the same bytes."""

import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from lowmem_icl.errors import InputError
from lowmem_icl.masks.naming import task_slug
from lowmem_icl.report.figures.layout import PAGE_WIDTH, Asked
from lowmem_icl.report.figures.registry import FIGURES
from lowmem_icl.report.figures.style import DPI, figure_style
from lowmem_icl.report.run_tables import RunTables
from lowmem_icl.system.files import atomic_path

FORMATS = ("svg", "pdf", "png")
SMALL_DPI, SMALL_COLOURS = 110, 32
LARGEST_SVG_BYTES = 150_000
NARROWEST, WIDEST = 3.0, 10.0
"""In inches."""
CREATOR = "lowmem-icl"
OLD_NAMES = (
    "ablation", "capacity", "estimate", "ffn-curves", "ffns", "grid", "heads", "importance", "in-context",
    "induction", "label-drops", "overlap", "pruning",
)  # fmt: skip
"""What SVG files of a run's figures were called before they said what they are."""
OLD_CREATOR = b"<dc:title>Matplotlib v"


@dataclass(frozen=True)
class FigureFiles:
    """Which files are asked for: formats, widths in inches, and tasks, None being all tasks in one figure.

    Raises InputError for an unknown format and for a width outside NARROWEST to WIDEST.
    """

    formats: Sequence[str] = ("svg",)
    widths: Sequence[float] = (PAGE_WIDTH,)
    tasks: Sequence[str | None] = (None,)

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise InputError(
                    f"--figures: expected any of {', '.join(FORMATS)}, separated by commas; got '{name}'"
                    f"{_hint(name, FORMATS)}"
                )
        for width in self.widths:
            if not NARROWEST <= width <= WIDEST:
                raise InputError(
                    f"--figure-width: expected inches from {NARROWEST:g} to {WIDEST:g}, such as 3.25 for a "
                    f"column and 6.75 for a page; got {width:g}"
                )


def asked_files(formats: str | None, widths: str | None, tasks: Sequence[str]) -> FigureFiles | None:
    """Return what flags ask for: lists separated by commas, and tasks; None where none of them is given.

    Raises InputError naming the flag that is not understood.
    """
    if formats is None and widths is None and not tasks:
        return None
    try:
        inches = [float(width) for width in _listed(widths or f"{PAGE_WIDTH:g}")]
    except ValueError as error:
        raise InputError(
            f"--figure-width: expected inches, separated by commas, such as 3.25,6.75; got '{widths}'"
        ) from error
    return FigureFiles(_listed(formats or "svg"), inches, list(tasks) or (None,))


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip().lower() for part in text.split(",")))


def write_figures(run: RunTables, files: FigureFiles = FigureFiles()) -> list[Path]:
    """Draw a run's figures into `figures/` of its folder; return the files written.

    Figures whose numbers the run does not have are left out. Raises InputError for a task that is not in it,
    naming one that is like it.
    """
    check_tasks(files.tasks, run)
    written: list[Path] = []
    with figure_style():
        for name, task, width in product(FIGURES, files.tasks, files.widths):
            figure = FIGURES[name].draw(run.results, run.record, Asked(width, task))
            if figure is not None:
                stem = file_stem(name, width, task)
                written += [_write(run, figure, name, f"{stem}.{extension}") for extension in files.formats]
    _remove_old(run.folder / "figures")
    return written


def write_page_figures(run: RunTables) -> dict[str, bytes]:
    """Write the figures that every run has, as SVG of a page's width; return them by name as images for
    readers of the page without JavaScript: that SVG, or a small PNG of one that is large.
    """
    images = {}
    with figure_style():
        for name, kind in FIGURES.items():
            figure = kind.draw(run.results, run.record, Asked())
            if figure is not None:
                content = _write(run, figure, name, f"{name}.svg").read_bytes()
                images[name] = content if len(content) <= LARGEST_SVG_BYTES else small_image(figure)
    _remove_old(run.folder / "figures")
    return images


def _write(run: RunTables, figure: Figure, name: str, file_name: str) -> Path:
    path = run.folder / "figures" / file_name
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded(figure, path.suffix[1:], FIGURES[name].caption))
    return path


def small_image(figure: Figure) -> bytes:
    """Return a figure that was saved before as a PNG of few pixels and colours."""
    content, small = io.BytesIO(), io.BytesIO()
    # Everything has its place since it was saved.
    figure.set_layout_engine("none")
    figure.savefig(content, format="png", dpi=SMALL_DPI)
    Image.open(content).convert("RGB").quantize(SMALL_COLOURS).save(small, "png", optimize=True)
    return small.getvalue()


def check_tasks(tasks: Sequence[str | None], run: RunTables) -> None:
    """Check that a run has these tasks; raise InputError naming one that is like it where not."""
    for task in tasks:
        if task is not None and task not in run.tasks:
            hint = _hint(task, run.tasks) or f"; it has {', '.join(run.tasks)}"
            raise InputError(f"--task {task}: expected a task of {run.folder}{hint}")


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def file_stem(name: str, width: float = PAGE_WIDTH, task: str | None = None) -> str:
    """Return what the file of a figure is called, without its format.

    A task's own figure has its name, or a slug of it, and a width other than a page's stands at the end.
    """
    pieces = [name] if task is None else [name, task_slug(task)]
    return "-".join(pieces if width == PAGE_WIDTH else [*pieces, f"{width:g}in"])


def encoded(figure: Figure, extension: str, caption: str) -> bytes:
    """Return a figure as a file's bytes, without a date, with its caption as the title that is read aloud."""
    by_format: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": CREATOR, "Title": caption},
        "pdf": {"CreationDate": None, "Creator": CREATOR, "Producer": CREATOR, "Title": caption},
        "png": {"Software": CREATOR, "Title": caption},
    }
    content = io.BytesIO()
    figure.savefig(content, format=extension, dpi=DPI, metadata=by_format[extension])
    return content.getvalue()


def _remove_old(figures: Path) -> None:
    """Remove figures that an earlier version wrote under other names; nothing that it did not write."""
    for name in OLD_NAMES:
        path = figures / f"{name}.svg"
        if path.is_file() and OLD_CREATOR in path.read_bytes()[:2000]:
            path.unlink()
