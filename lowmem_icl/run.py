"""The whole story of a run in order: check, plan, stages, tables, masks, page; continued where it stopped."""

import datetime
import fcntl
import hashlib
import itertools
import json
import logging
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import torch

from lowmem_icl import __version__
from lowmem_icl.cli.terminal import Terminal, show_plan
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.errors import InputError, InUse
from lowmem_icl.experiments.order import run_stages
from lowmem_icl.masks.files import MaskFile, check_fits, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.int8 import slow_product_note
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.costs import lay_out
from lowmem_icl.planning.plan import Plan, check_memory, make_plan
from lowmem_icl.report.page import write_report
from lowmem_icl.session.parts import Parts
from lowmem_icl.session.prepare import Prepared, prepare, with_store
from lowmem_icl.session.work import Gathered, MadeMask, Work
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.system.machine import chosen_device, peak_resident_bytes
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
    folder = options.run_folder
    _refuse_foreign(folder)
    prepared = prepare(options)
    laid = lay_out(options, prepared)
    # Told before a conversion of hours.
    check_memory(options, prepared, laid)
    prepared = with_store(prepared, announce=terminal.say, progress=terminal.progress)
    gathered = Gathered()
    for mask_file in (mask_files or {}).values():
        warning = check_fits(mask_file, prepared.mask_model)
        gathered.warnings += [warning] if warning else []
    masks = {name: mask_file.mask for name, mask_file in (mask_files or {}).items()}
    identity = _identity(options, prepared, masks)
    with _locked(folder, identity), _logged(folder):
        parts = Parts(folder / "parts")
        plan = make_plan(
            options,
            prepared,
            laid,
            masks=tuple(masks.values()),
            hours=None if options.hours is None else options.hours - (time.monotonic() - began) / 3600,
            finished=parts.has,
        )
        terminal.say(f"run folder {folder}")
        show_plan(plan, terminal.err)
        note = slow_product_note() if options.weights == "int8" else None
        gathered.warnings += [note] if note else []
        for stale in parts.folder.glob("residuals-*"):
            # Left by a process that was killed; the lock says that nobody uses them.
            shutil.rmtree(stale, ignore_errors=True)
        record = _record(options, prepared, plan, identity)
        page = _Page(options, prepared, folder, record, gathered)
        page.write_record()
        memory = plan.memory
        with (
            StreamedModel(
                prepared.store, device=chosen_device(options.device), resident_bytes=memory.resident_bytes
            ) as model,
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
                record["stages"][name] = {
                    "seconds": round(time.monotonic() - started, 2),
                    "planned_seconds": round(planned[name].seconds, 2) if name in planned else 0.0,
                    "read_bytes": model.read_bytes - read,
                    "planned_read_bytes": planned[name].read_bytes if name in planned else 0,
                }
                logger.info("%s finished in %.1f s", name, record["stages"][name]["seconds"])
                page.publish_now_and_then()
                page.write_record()
                started, read = time.monotonic(), model.read_bytes
        for warning in gathered.warnings + gathered.left:
            logger.warning(warning)
            terminal.say(f"warning: {warning}")
        record |= {
            "state": "out of time" if gathered.left else "finished",
            "finished": _now(),
            "peak_resident_bytes": peak_resident_bytes(),
            "parts": {"reused": parts.reused, "made": parts.made},
        }
        page.publish()
    return Finished(folder, gathered, record)


class _Page:
    """Writes what a run has so far: record, tables, masks and page."""

    def __init__(
        self,
        options: RunOptions,
        prepared: Prepared,
        folder: Path,
        record: dict[str, Any],
        gathered: Gathered,
    ) -> None:
        self._options, self._prepared, self._folder = options, prepared, folder
        self._record, self._gathered = record, gathered
        self._published = time.monotonic()

    def write_record(self) -> None:
        """Write run.json."""
        self._record |= self._gathered.record
        self._record["warnings"] = self._gathered.warnings + self._gathered.left
        write_text_atomic(self._folder / RUN_FILE, json.dumps(self._record, indent=1) + "\n")

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


def _identity(options: RunOptions, prepared: Prepared, masks: Mapping[str, Mask]) -> dict[str, str]:
    """Return digests of all that results depend on; a folder's parts belong to one identity."""
    told = json.dumps({name: [str(unit) for unit in mask.units()] for name, mask in masks.items()})
    return {
        "options": options.digest,
        "weights": prepared.store.manifest.digest,
        "tasks": prepared.tasks_digest,
        "masks": hashlib.sha256(told.encode()).hexdigest(),
    }


def _refuse_foreign(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"--out {folder} is a file; give a folder")
    if (folder / RUN_FILE).is_file() or not folder.is_dir():
        return
    # A script may have begun to log what is printed there.
    if any(entry.suffix != ".log" for entry in folder.iterdir() if entry.name != ".lock"):
        raise InputError(f"--out {folder} is not empty and holds no run; choose another folder")


@contextmanager
def _locked(folder: Path, identity: dict[str, str]) -> Iterator[None]:
    """Hold a run folder for this process; refuse one that belongs to another run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InUse(
                f"{folder} is in use by another process; wait for it or choose another --out"
            ) from error
        if (folder / RUN_FILE).is_file():
            earlier = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("identity")
            differing = [name for name in identity if not earlier or earlier.get(name) != identity[name]]
            if differing:
                raise InputError(
                    f"--out {folder} holds a run with other {', '.join(differing)}; choose another folder"
                )
        yield


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Append what happens to run.log, with times in UTC."""
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.info("started: %s", shlex.join(["lowmem-icl", *sys.argv[1:]]))
    try:
        yield
        logger.info("finished")
    except BaseException as error:
        logger.info("ended early: %s %s", type(error).__name__, error)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _record(options: RunOptions, prepared: Prepared, plan: Plan, identity: dict[str, str]) -> dict[str, Any]:
    manifest, skeleton = prepared.store.manifest, prepared.store.skeleton
    return {
        "format": "lowmem-icl-run/1",
        "state": "running",
        "started": _now(),
        "command": shlex.join(["lowmem-icl", *sys.argv[1:]]),
        "options": options.model_dump(mode="json"),
        "shots": list(options.chosen_shots),
        "train_limit": options.chosen_train_limit,
        "identity": identity,
        "versions": {"lowmem_icl": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "model": {
            **prepared.mask_model.model_dump(),
            "width": skeleton.width,
            "weights": manifest.weights,
            "store": str(prepared.store.folder),
            "outliers": manifest.outliers.model_dump() if manifest.outliers else None,
        },
        "tasks": [
            {
                "task": task.task,
                "shots": task.shots,
                "split": task.split,
                "documents": len(task.documents),
                "train_documents": len(train.documents),
                "metric": task.metric,
                "chance": task.chance,
                "majority": task.majority,
            }
            for task, train in zip(prepared.evaluate, prepared.train, strict=True)
        ],
        "plan": plan.as_json(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": psutil.virtual_memory().total,
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "stages": {},
        "warnings": [],
    }


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
