"""What a run has so far, as files: tables, masks, record and page, written again whenever there is more."""

import datetime
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Protocol

import polars as pl

from lowmem_icl import __version__
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskFile, fill_of_table, write_mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.failures import Failure
from lowmem_icl.session.fills import kept_tables
from lowmem_icl.session.folder import RunFolder
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import MaskResult, StageResult
from lowmem_icl.session.run_form import StageActuals, State
from lowmem_icl.system.time_limit import TimeIsUp, at_most
from lowmem_icl.tables.schema import TABLES, empty_frame, read_table, write_table

SECONDS_BETWEEN_PAGES = 120.0
SECONDS_BETWEEN_RECORDS = 15.0
SECONDS_TO_STOP = 5.0
# Pages take at most one part in so many of a run's time.
LEAST_TIMES_WRITING = 20


class Follower(Protocol):
    """Who is told what a run finds."""

    def stage_over(self, stage: str, results: pl.DataFrame, actuals: StageActuals) -> None:
        """Learn what a stage has found and taken."""

    def recorded(self) -> None:
        """Learn that run.json was written."""


class Untold:
    """A follower who does nothing with it."""

    def stage_over(self, stage: str, results: pl.DataFrame, actuals: StageActuals) -> None:
        """Do nothing."""

    def recorded(self) -> None:
        """Do nothing."""


class Publisher:
    """Folds the stages' results, the newest of each, and writes them into the run folder.

    `write_page` is given the folder once its tables are there, and how the run ends; None while it goes on.
    """

    def __init__(
        self,
        prepared: Prepared,
        opened: RunFolder,
        warnings: Sequence[str],
        write_page: Callable[[Path, State | None], None],
    ) -> None:
        self._prepared, self._opened, self._write_page = prepared, opened, write_page
        self._warnings = list(warnings)
        self._published = self._recorded = time.monotonic()
        self._has_more = False
        self._seconds_writing = 0.0
        self.results: dict[str, StageResult] = {}
        self.follower: Follower = Untold()

    def fold(self, experiment: str, result: StageResult) -> None:
        """Take what a stage has found so far in place of what it had before."""
        self.results[experiment] = result
        self._has_more = True

    @property
    def unfinished(self) -> list[str]:
        """What the time did not do for, a sentence per stage."""
        return [result.unfinished for result in self.results.values() if result.unfinished]

    @property
    def failures(self) -> list[Failure]:
        """What could not be done."""
        return [failure for result in self.results.values() for failure in result.failures]

    @property
    def warnings(self) -> list[str]:
        """All there is to be warned of."""
        found = itertools.chain.from_iterable(result.warnings for result in self.results.values())
        return [*self._warnings, *self._opened.parts.notes, *found, *self.unfinished]

    def stage_over(self, experiment: str, actuals: StageActuals) -> None:
        """Note that a stage is over in this session, and what it took."""
        self._opened.add_stage(experiment, actuals)
        self.write_record()
        self.follower.stage_over(experiment, self.results[experiment].results, actuals)

    def write_record(self) -> None:
        """Write run.json."""
        self._is_recorded()
        fields = {name: value for result in self.results.values() for name, value in result.record.items()}
        fields["failures"] = [failure.as_record() for failure in self.failures]
        self._opened.write_record(warnings=self.warnings, fields=fields)
        self.follower.recorded()

    def publish_stopped(self, announce: Callable[[str], None]) -> None:
        """Write what there is of a run that is being stopped, as far as a few seconds do; another stop ends
        that at once. Where an earlier session wrote more, that stays.
        """
        if self._has_less_than_folder():
            return
        announce("stopping: writing tables and page of what there is; another Ctrl-C stops at once")
        with suppress(TimeIsUp, OSError), at_most(SECONDS_TO_STOP):
            self._opened.finish("stopped")
            self.publish()

    def _has_less_than_folder(self) -> bool:
        """Tell whether the folder's table holds records that are not found again yet in this session."""
        path = self._opened.path / "results.parquet"
        if not path.is_file():
            return False
        try:
            there = read_table(path, "results").group_by("experiment").len().rows()
        except InputError:
            # Damaged: anything is more.
            return False
        here = {name: len(result.results) for name, result in self.results.items()}
        return any(here.get(name, 0) < count for name, count in there)

    def publish(self, ends_as: State | None = None) -> None:
        """Write everything; `ends_as`: the state that the run is about to end in."""
        began = time.monotonic()
        folder, options = self._opened.path, self._prepared.options
        for table in TABLES:
            frames = [getattr(result, table) for result in self.results.values()]
            write_table(pl.concat(frames or [empty_frame(table)]), table, folder / f"{table}.parquet")
        for made in itertools.chain.from_iterable(result.masks for result in self.results.values()):
            mask_file = self._mask_file(made)
            for target in (folder / "masks", *([options.masks_dir] if options.masks_dir else [])):
                write_mask(target / f"{made.name}.json", mask_file)
        self.write_record()
        self._write_page(folder, ends_as)
        self._is_published(began)

    def _is_published(self, began: float) -> None:
        self._published, self._has_more = time.monotonic(), False
        self._seconds_writing = self._published - began

    def _is_recorded(self) -> None:
        self._recorded = time.monotonic()

    def is_due(self) -> bool:
        """Tell whether the last page was a while ago: two minutes, or more where writing took long."""
        wait = max(SECONDS_BETWEEN_PAGES, LEAST_TIMES_WRITING * self._seconds_writing)
        return time.monotonic() - self._published >= wait

    def publish_if_due(self) -> None:
        """Write everything, unless that was done a moment ago; then run.json, from which the time left is
        read, unless that was.
        """
        if self._has_more and self.is_due():
            self.publish()
        elif time.monotonic() - self._recorded >= SECONDS_BETWEEN_RECORDS:
            self.write_record()

    def _mask_file(self, made: MaskResult) -> MaskFile:
        tasks = [made.task]
        if made.task == AGGREGATE:
            tasks = list(dict.fromkeys(task.task for task in self._prepared.train if in_domain(task.task)))
        fields = {
            "method": made.method,
            "tasks": tasks,
            "shots": [made.shots],
            "documents": made.documents,
            "seed": made.seed,
            "protocol": self._prepared.options.protocol,
            "version": __version__,
            "date": datetime.date.today().isoformat(),
        }
        note = {"note": made.note} if made.note else {}
        mask, means = made.mask, None
        if mask.ablation == "mean" and mask.fill is not None:
            means = self._tables[mask.fill]
            mask = mask.filled(fill_of_table(means))
        model = self._prepared.mask_model
        return MaskFile(made.name, mask, model, fields | note, made.scores, means=means)

    @cached_property
    def _tables(self) -> Mapping[str, UnitMeans]:
        """What stands in removed units' place, by name; asked for once a mask is made, which needs it."""
        return kept_tables(self._prepared, self._opened.parts)
