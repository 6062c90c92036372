"""Runs as Python users hold them: their tables, masks, figures and answer; loaded, or run now."""

import html
import shutil
import tempfile
import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from lowmem_icl.api.figures import Plots
from lowmem_icl.api.mask import Mask
from lowmem_icl.api.options import checked_options
from lowmem_icl.api.progress import Shown, progress_of
from lowmem_icl.api.words import python_errors
from lowmem_icl.errors import InputError
from lowmem_icl.masks.naming import mask_name
from lowmem_icl.options import RunOptions, did_you_mean
from lowmem_icl.report.run_tables import RunTables, read_run
from lowmem_icl.report.summary import run_summary
from lowmem_icl.runner import Audience
from lowmem_icl.runner import run as run_all
from lowmem_icl.session.finished import finished_record
from lowmem_icl.session.identity import folder_beside, run_folder
from lowmem_icl.system.files import atomic_folder
from lowmem_icl.system.progress import Advance, Progress
from lowmem_icl.tables.schema import TABLES, read_table


class Run:
    """A run's tables, masks and figures: read from its folder when it is loaded.

    Made by `load` and `run`. Tables are polars frames, their columns those of the files of the same names.

    >>> import lowmem_icl as icl
    >>> run = icl.load(folder)
    >>> run.shots
    [0, 4]
    >>> run.mask("greedy", "recall", 4).kept[:3]
    ['L0H0', 'L1H0', 'L1H1']
    """

    def __init__(self, tables: RunTables) -> None:
        self._tables = tables

    @property
    def folder(self) -> Path:
        """The run's folder; a temporary one, which goes with this object, where `run` was given none."""
        return self._tables.folder

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json: options, versions, plan and actuals."""
        return dict(self._tables.record)

    @property
    def tasks(self) -> list[str]:
        """The tasks, and after them their mean, `aggregate`, where the tables hold one."""
        return list(self._tables.tasks)

    @property
    def shots(self) -> list[int]:
        """The numbers of demonstrations, ascending."""
        return [count for count in self._tables.shots if count is not None]

    @property
    def results(self) -> pl.DataFrame:
        """results.parquet: a record per measured number."""
        return self._tables.results

    @cached_property
    @python_errors
    def effects(self) -> pl.DataFrame:
        """effects.parquet: a record per document under a removed unit or mask."""
        return self._read("effects")

    @cached_property
    @python_errors
    def answers(self) -> pl.DataFrame:
        """answers.parquet: a record per option of a document, clean and under masks given to evaluate."""
        return self._read("answers")

    @python_errors
    def units(self, task: str | None = None, shots: int | None = None) -> pl.DataFrame:
        """Return what is known of every unit: a record per task, shot count and unit.

        Of one task and shot count the costliest come first. Raises InputError for a task or shot count that
        the run does not have.
        """
        found = self._tables.units
        if task is not None:
            found = found.filter(pl.col("task") == self._known("task", task, self.tasks))
        if shots is not None:
            found = found.filter(pl.col("shots") == self._known("shots", shots, self.shots))
        if task is not None and shots is not None:
            found = found.sort("drop", descending=True, nulls_last=True, maintain_order=True)
        return found

    @property
    def masks(self) -> pl.DataFrame:
        """masks.parquet: a record per mask and setting it was judged in."""
        return self._tables.masks

    @property
    def mask_names(self) -> list[str]:
        """The names of all masks that have a file."""
        return list(self._tables.mask_files)

    @python_errors
    def mask(self, method: str, task: str | None = None, shots: int | None = None) -> Mask:
        """Return a mask by the method that made it, its task and shot count, or by its name alone.

        Raises InputError naming one that is like it where there is none.
        """
        if task is not None and shots is None:
            raise InputError(f"shots: expected a number of demonstrations with task {task!r}, got none")
        name = method if task is None else mask_name(method, task, shots or 0)
        known = self._tables.mask_files
        if name not in known:
            hint = did_you_mean(name, known) or "; mask_names lists them"
            raise InputError(f"mask: {self.folder} has none called {name!r}{hint}")
        return Mask.of_file(known[name])

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The answer and the main numbers, as summary.json has them."""
        return run_summary(self._tables)

    @property
    def answer(self) -> list[str]:
        """The answer, in up to three sentences."""
        return list(self.summary["answer"]["sentences"])

    @property
    def failures(self) -> list[str]:
        """What the run could not do because values were not finite, a sentence each; the others are whole."""
        return [failure["sentence"] for failure in self.record.get("failures", [])]

    @cached_property
    def plot(self) -> Plots:
        """The figures, one by one."""
        return Plots(self._tables)

    @property
    def report(self) -> Path:
        """The interactive page."""
        return self.folder / "report.html"

    @python_errors
    def save(self, folder: str | Path) -> "Run":
        """Copy the run's folder, whole or not at all, and return the run there.

        `run(out=folder)` with the same options goes on from it. Raises InputError where the folder exists.
        """
        target = Path(folder)
        if target.exists():
            raise InputError(f"folder: {target} exists; choose another")
        with atomic_folder(target) as temporary:
            shutil.copytree(self.folder, temporary, dirs_exist_ok=True)
        return load(target)

    def __repr__(self) -> str:
        model = self.record["model"]
        shots = ", ".join(map(str, self.shots))
        return (
            f"Run({str(self.folder)!r}: {model['id']} in {model['weights']}, "
            f"{', '.join(self.tasks)} at {shots} shots, {self.record['state']})"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.answer)
        accuracy = pl.DataFrame(self.summary["accuracy"])
        table = accuracy._repr_html_() if len(accuracy) else ""
        return f"<p>{html.escape(repr(self))}</p><ul>{said}</ul>{table}"

    def _read(self, table: str) -> pl.DataFrame:
        assert table in TABLES
        return read_table(self.folder / f"{table}.parquet", table)

    def _known(self, name: str, value: Any, known: list[Any]) -> Any:
        if value not in known:
            hint = did_you_mean(str(value), map(str, known))
            raise InputError(
                f"{name}: {self.folder} has no {value!r}{hint or '; it has ' + ', '.join(map(str, known))}"
            )
        return value


@python_errors
def load(folder: str | Path) -> Run:
    """Return a run from its folder, finished or not; raise InputError where it holds none.

    >>> import lowmem_icl as icl
    >>> run = icl.load(folder)
    >>> run.units("recall", shots=4)["unit"].head(3).to_list()
    ['L0H0', 'L0F', 'L1F']
    """
    return Run(read_run(Path(folder)))


@python_errors
def run(
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    config: str | Path | None = None,
    progress: Shown = True,
    **options: Any,
) -> Run:
    """Run the experiments that the options ask for, as `lowmem-icl run` does; return the finished run.

    out: its folder, where the same call continues after a stop; None for a temporary one without figures,
    which goes with the returned object (`save` keeps it). fresh: begin anew in a folder beside `out`, where
    that is there. config: a TOML or YAML file with more options.
    options: every option of `run`, with underscores: `model="demo"`, `tasks=["recall"]`, `shots=[0, 16]`,
    `limit=32`, `memory="6GB"`. Raises InputError or DoesNotFit before any long work.

    >>> import lowmem_icl as icl
    >>> run = icl.run(tasks="recall", shots=4, limit=8, experiments="evaluate", progress=False)
    >>> run.results.filter(metric="acc").select("labels", "value").rows()
    [('right', 0.625), ('shuffled', 0.125), ('foreign', 0.125)]
    """
    checked = checked_options({**options, "out": out}, config)
    if checked.out is not None:
        if fresh:
            checked = checked.model_copy(update={"out": folder_beside(checked.out)})
        return load(_finished(checked, progress))
    temporary = tempfile.mkdtemp(prefix="lowmem-icl-run-")
    try:
        in_folder = checked.model_copy(update={"out": Path(temporary)})
        finished = load(_finished(in_folder, progress, with_figures=False))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    weakref.finalize(finished, shutil.rmtree, temporary, ignore_errors=True)
    return finished


def _finished(options: RunOptions, progress: Shown, *, with_figures: bool = True) -> Path:
    """Return the folder of a run that is finished now, or was already."""
    if finished_record(options, {}) is not None:
        return run_folder(options)
    return run_all(options, _audience(progress, with_figures)).folder


def _audience(progress: Shown, with_figures: bool) -> Audience:
    """Return whom a run tells how far it is; an audience of people it tells more."""
    shown = progress_of(progress)
    return Audience(
        progress=shown,
        watch=lambda outlook, experiments: nullcontext(_View(shown)),
        wants_figures=with_figures,
    )


class _View:
    """Shows a run's parts one after the other."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def part(
        self, stage: str, label: str, operations: int, ablations: int
    ) -> AbstractContextManager[Advance]:
        """Show a part while it is done."""
        return self._progress(label, operations, "operations")

    def over(self, stage: str, seconds: float, found: str) -> None:
        """Say nothing: what a stage found is in the tables."""
