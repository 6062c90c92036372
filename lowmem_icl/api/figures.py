"""The figures of a run, one by one: matplotlib's, which notebooks show and which save themselves."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from lowmem_icl.api.words import python_errors
from lowmem_icl.errors import InputError
from lowmem_icl.options import did_you_mean
from lowmem_icl.report.run_tables import RunTables
from lowmem_icl.system.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

PAGE_WIDTH = 6.75
"""In inches."""
FORMATS = (".svg", ".pdf", ".png")


@dataclass(frozen=True)
class Figure:
    """A drawn figure: a notebook shows it, `save` writes it, `figure` is matplotlib's own.

    >>> import lowmem_icl as icl
    >>> figure = icl.load(folder).plot.heads("recall", shots=4)
    >>> figure.figure.get_size_inches()[0]
    np.float64(6.75)
    """

    name: str
    caption: str
    figure: "MatplotlibFigure" = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self._encoded("png")

    @python_errors
    def save(self, path: str | Path) -> Path:
        """Write it as .svg, .pdf or .png; return the path."""
        path = Path(path)
        if path.suffix not in FORMATS:
            raise InputError(f"path: expected a name ending in {', '.join(FORMATS)}, got {path.name!r}")
        with atomic_path(path) as temporary:
            temporary.write_bytes(self._encoded(path.suffix[1:]))
        return path

    def _encoded(self, extension: str) -> bytes:
        from lowmem_icl.report.figures.files import encoded
        from lowmem_icl.report.figures.style import figure_style

        with figure_style():
            return encoded(self.figure, extension, self.caption)


class Plots:
    """The figures of a run: `run.plot.heads("recall", shots=16)`; `names` lists what there is.

    Of every one: task, None for all; shots, None for all; width in inches. Raises InputError for a task or
    shot count that the run does not have, and where it measured nothing for the figure.

    >>> import lowmem_icl as icl
    >>> icl.load(folder).plot.names[:3]
    ['accuracy', 'importance-heads', 'ablate-heads']
    """

    def __init__(self, run: RunTables) -> None:
        self._run = run

    @property
    def names(self) -> list[str]:
        """The names that `figure` takes: all figures of the page and of `report --figures`."""
        from lowmem_icl.report.figures.registry import FIGURES

        return list(FIGURES)

    @python_errors
    def figure(
        self, name: str, task: str | None = None, shots: int | None = None, width: float = PAGE_WIDTH
    ) -> Figure:
        """Draw a figure by its name."""
        from lowmem_icl.report.figures.files import FigureFiles, check_tasks
        from lowmem_icl.report.figures.layout import Asked
        from lowmem_icl.report.figures.registry import FIGURES
        from lowmem_icl.report.figures.style import figure_style

        if name not in FIGURES:
            hint = did_you_mean(name, FIGURES) or f"; expected one of {', '.join(FIGURES)}"
            raise InputError(f"name: no figure is called {name!r}{hint}")
        FigureFiles(widths=(width,))
        check_tasks([task], self._run)
        results = self._run.results
        if shots is not None:
            if shots not in self._run.shots:
                known = ", ".join(str(count) for count in self._run.shots if count is not None)
                raise InputError(f"shots: the run has none at {shots}; expected one of {known}")
            results = results.filter(pl.col("shots").is_null() | (pl.col("shots") == shots))
        with figure_style():
            drawn = FIGURES[name].draw(results, self._run.record, Asked(width, task))
        if drawn is None:
            raise InputError(
                f"{name}: {self._run.folder} has no numbers for it; run the experiment "
                f"{FIGURES[name].experiment}, or ask for another task or shots"
            )
        return Figure(name, FIGURES[name].caption, drawn)

    def accuracy(self, task: str | None = None, *, width: float = PAGE_WIDTH) -> Figure:
        """Draw the clean accuracy by number of demonstrations."""
        return self.figure("accuracy", task, None, width)

    def heads(
        self, task: str | None = None, shots: int | None = None, *, width: float = PAGE_WIDTH
    ) -> Figure:
        """Draw what removing each head alone costs, by layer and head."""
        return self.figure("ablate-heads", task, shots, width)

    def ffns(self, task: str | None = None, shots: int | None = None, *, width: float = PAGE_WIDTH) -> Figure:
        """Draw what removing each FFN alone costs, by layer."""
        return self.figure("ablate-ffns", task, shots, width)

    def importance(
        self, task: str | None = None, shots: int | None = None, *, width: float = PAGE_WIDTH
    ) -> Figure:
        """Draw the gradient importance of heads."""
        return self.figure("importance-heads", task, shots, width)

    def estimates(
        self, task: str | None = None, shots: int | None = None, *, width: float = PAGE_WIDTH
    ) -> Figure:
        """Draw first-order estimates against exact drops."""
        return self.figure("ablate-estimates", task, shots, width)

    def head_curves(
        self, task: str | None = None, shots: int | None = None, *, width: float = PAGE_WIDTH
    ) -> Figure:
        """Draw accuracy as the least important heads are removed first."""
        return self.figure("prune-heads", task, shots, width)

    def ffn_curves(
        self, task: str | None = None, shots: int | None = None, *, width: float = PAGE_WIDTH
    ) -> Figure:
        """Draw accuracy as the least important FFNs are removed first."""
        return self.figure("prune-ffns", task, shots, width)

    def masks(
        self, task: str | None = None, shots: int | None = None, *, width: float = PAGE_WIDTH
    ) -> Figure:
        """Draw accuracy under greedy masks and under masks of equal size."""
        return self.figure("prune-masks", task, shots, width)

    def induction(self, *, width: float = PAGE_WIDTH) -> Figure:
        """Draw the scores of every head on random sequences."""
        return self.figure("induction-scores", None, None, width)

    def induction_removal(
        self, task: str | None = None, shots: int | None = None, *, width: float = PAGE_WIDTH
    ) -> Figure:
        """Draw the accuracy lost without the induction heads, beside that without random heads."""
        return self.figure("induction-removal", task, shots, width)

    def agreement(self, *, width: float = PAGE_WIDTH) -> Figure:
        """Draw how far the rankings of heads agree between tasks."""
        return self.figure("agreement-heads", None, None, width)

    def __repr__(self) -> str:
        return f"Plots of {self._run.folder}: {', '.join(self.names)}"
