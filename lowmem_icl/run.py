"""The whole story of a run in order: check, plan, stages, tables, masks, page; continued where it stopped."""

import datetime
import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from lowmem_icl import __version__
from lowmem_icl.cli.plan import show_plan
from lowmem_icl.cli.terminal import Terminal
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.experiments.order import run_stages
from lowmem_icl.masks.files import MaskFile, check_fits, write_mask
from lowmem_icl.masks.naming import check_names
from lowmem_icl.model.int8 import slow_product_note
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.costs import lay_out
from lowmem_icl.planning.plan import check_memory, make_plan
from lowmem_icl.report.page import write_report
from lowmem_icl.session.folder import RunFolder, check_output, open_folder
from lowmem_icl.session.identity import identity_of
from lowmem_icl.session.prepare import Prepared, prepare, with_store
from lowmem_icl.session.run_form import StageActuals
from lowmem_icl.session.work import Gathered, MadeMask, Work
from lowmem_icl.system.machine import resolved_device
from lowmem_icl.tables.blocks import columns_frame, rows_frame
from lowmem_icl.tables.schema import write_table

logger = logging.getLogger("lowmem_icl")

RUN_FILE = "run.json"
SECONDS_BETWEEN_PAGES = 120.0
PACKAGES = ("torch", "transformers", "bitsandbytes", "optimum", "accelerate", "lm_eval", "polars", "numpy")


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, what it gathered and the content of run.json."""

    folder: Path
    gathered: Gathered
    record: dict[str, Any]


def run(
    options: RunOptions, terminal: Terminal, mask_files: Mapping[str, MaskFile] | None = None
) -> Finished:
    """Do everything that the options ask for; parts finished by an earlier run of the same options are reused.

    With `mask_files` only `evaluate` runs, clean and under each of them. Tables and page are written whenever an
    experiment is over, and now and then while ablations go on. Raises InputError, DoesNotFit or InUse before any long
    work; on Ctrl-C, and when --hours are over, what is finished stays.
    """
    began = time.monotonic()
    folder = check_output(options)
    prepared = prepare(options)
    check_names((task.task for task in prepared.evaluate), mask_files or ())
    laid = lay_out(options, prepared)
    # Told before a conversion of hours.
    check_memory(options, prepared, laid)
    prepared = with_store(prepared, announce=terminal.say, progress=terminal.progress)
    gathered = Gathered()
    for mask_file in (mask_files or {}).values():
        warning = check_fits(mask_file, prepared.mask_model)
        gathered.warnings += [warning] if warning else []
    masks = {name: mask_file.mask for name, mask_file in (mask_files or {}).items()}
    device = resolved_device(options.device)
    identity = identity_of(options, device.type, prepared.store.manifest.digest, prepared.tasks_digest, masks)
    with open_folder(folder, identity, announce=terminal.say) as opened:
        parts = opened.parts
        plan = make_plan(
            options,
            prepared,
            laid,
            masks=tuple(masks.values()),
            hours=None if options.hours is None else options.hours - (time.monotonic() - began) / 3600,
            finished=parts.has,
        )
        show_plan(plan, terminal.err)
        note = slow_product_note() if options.weights == "int8" else None
        gathered.warnings += [note] if note else []
        opened.begin(options, prepared, plan.as_json())
        page = _Page(options, prepared, opened, gathered)
        memory = plan.memory
        with (
            StreamedModel(prepared.store, device=device, resident_bytes=memory.resident_bytes) as model,
            CleanCache(memory.cache_bytes, memory.spill_bytes, parts.folder) as cache,
        ):
            now = time.monotonic()
            work = Work(
                options,
                prepared,
                model,
                plan.limits,
                cache,
                parts,
                terminal.progress,
                stop_at={name: now + seconds for name, seconds in plan.stop_after.items()},
                skipped=plan.skipped,
            )
            planned = {stage.experiment: stage for stage in plan.stages}
            started, read = time.monotonic(), 0
            for name in run_stages(work, gathered, masks):
                if name is None:
                    page.publish_now_and_then()
                    continue
                stage = planned.get(name)
                actuals = StageActuals(
                    seconds=round(time.monotonic() - started, 2),
                    planned_seconds=round(stage.seconds, 2) if stage else 0.0,
                    read_bytes=model.read_bytes - read,
                    planned_read_bytes=stage.read_bytes if stage else 0,
                )
                opened.add_stage(name, actuals)
                page.publish_now_and_then()
                page.write_record()
                started, read = time.monotonic(), model.read_bytes
        for warning in gathered.warnings + gathered.left:
            logger.warning(warning)
            terminal.say(f"warning: {warning}")
        page.publish()
        opened.finish("out of time" if gathered.left else "finished")
    return Finished(folder, gathered, opened.record)


class _Page:
    """Writes what a run has so far: record, tables, masks and page."""

    def __init__(
        self, options: RunOptions, prepared: Prepared, opened: RunFolder, gathered: Gathered
    ) -> None:
        self._options, self._prepared, self._opened = options, prepared, opened
        self._folder, self._gathered = opened.path, gathered
        self._published = time.monotonic()

    def write_record(self) -> None:
        """Write run.json."""
        self._opened.write_record(
            warnings=self._gathered.warnings + self._gathered.left, fields=self._gathered.record
        )

    def publish(self) -> None:
        """Write everything."""
        _write_tables(self._options, self._prepared, self._folder, self._gathered)
        self.write_record()
        write_report([self._folder], self._folder / "report.html")
        self._published = time.monotonic()

    def publish_now_and_then(self) -> None:
        """Write everything, unless that was done a moment ago."""
        if time.monotonic() - self._published >= SECONDS_BETWEEN_PAGES:
            self.publish()


def _write_tables(options: RunOptions, prepared: Prepared, folder: Path, gathered: Gathered) -> None:
    """Write tables and masks into the run folder, and the masks into --masks-dir."""
    constants = {
        "protocol": options.protocol,
        "demonstrations": options.demonstrations,
        "model": prepared.store.manifest.source.id,
        "weights": prepared.store.manifest.weights,
        "seed": options.seed,
    }
    rows, columns = (
        list(itertools.chain.from_iterable(parts.values())) for parts in (gathered.results, gathered.columns)
    )
    results = pl.concat(
        [rows_frame("results", rows, constants), columns_frame("results", columns, constants)]
    )
    write_table(results, "results", folder / "results.parquet")
    effects = list(itertools.chain.from_iterable(gathered.effects.values()))
    write_table(columns_frame("effects", effects), "effects", folder / "effects.parquet")
    write_table(columns_frame("answers", gathered.answers), "answers", folder / "answers.parquet")
    for made in gathered.masks:
        mask_file = _mask_file(options, prepared, made)
        for target in (folder / "masks", *([options.masks_dir] if options.masks_dir else [])):
            write_mask(target / f"{made.name}.json", mask_file)


def _mask_file(options: RunOptions, prepared: Prepared, made: MadeMask) -> MaskFile:
    tasks = [made.task] if made.task != "aggregate" else list(dict.fromkeys(t.task for t in prepared.train))
    return MaskFile(
        name=made.name,
        mask=made.mask,
        model=prepared.mask_model,
        made={
            "method": made.method,
            "tasks": tasks,
            "shots": [made.shots],
            "documents": made.documents,
            "seed": made.seed,
            "protocol": options.protocol,
            "version": __version__,
            "date": datetime.date.today().isoformat(),
        }
        | ({"note": made.note} if made.note else {}),
        scores=made.scores,
    )
