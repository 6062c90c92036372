"""The whole story of a run in order: check, plan, stages, tables, masks, page; continued where it stopped."""

import datetime
import fcntl
import hashlib
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

import psutil
import torch

from lowmem_icl import __version__
from lowmem_icl.config import RunOptions
from lowmem_icl.errors import InputError, InUse
from lowmem_icl.files import write_text_atomic
from lowmem_icl.machine import chosen_device, peak_resident_bytes
from lowmem_icl.masks import Mask, MaskFile, check_fits, write_mask
from lowmem_icl.model.int8 import slow_product_note
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.parts import Parts
from lowmem_icl.plan import Plan, check_memory, lay_out, make_plan
from lowmem_icl.prepare import Prepared, prepare, with_store
from lowmem_icl.report.page import write_report
from lowmem_icl.results import columns_frame, rows_frame, write_table
from lowmem_icl.stages.order import run_evaluate, run_stages
from lowmem_icl.stages.work import Gathered, MadeMask, Work
from lowmem_icl.terminal import Terminal, show_plan

logger = logging.getLogger("lowmem_icl")

RUN_FILE = "run.json"
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

    With `mask_files` only `evaluate` runs, clean and under each of them. Raises InputError, DoesNotFit or InUse before
    any long work; on Ctrl-C finished parts stay.
    """
    folder = options.run_folder
    _refuse_foreign(folder)
    prepared = prepare(options)
    laid = lay_out(prepared)
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
        plan = make_plan(options, prepared, laid, only_evaluate_under=len(masks))
        terminal.say(f"run folder {folder}")
        show_plan(plan, terminal.err)
        record = _record(options, prepared, plan, identity)
        write_text_atomic(folder / RUN_FILE, json.dumps(record, indent=1) + "\n")
        note = slow_product_note() if options.weights == "int8" else None
        gathered.warnings += [note] if note else []
        device = chosen_device(options.device)
        parts = Parts(folder / "parts")
        for stale in parts.folder.glob("residuals-*"):
            # Left by a process that was killed; the lock says that nobody uses them.
            shutil.rmtree(stale, ignore_errors=True)
        with StreamedModel(prepared.store, device=device, resident_bytes=plan.memory.resident_bytes) as model:
            work = Work(
                options, prepared, model, plan.memory.sweep, parts, terminal.progress, folder / "parts"
            )
            record["stages"] = {}
            started, read = time.monotonic(), 0
            planned = {stage.experiment: stage for stage in plan.stages}
            stages = run_stages(work, gathered) if not masks else _only_evaluate(work, gathered, masks)
            for name in stages:
                record["stages"][name] = {
                    "seconds": round(time.monotonic() - started, 2),
                    "planned_seconds": round(planned[name].seconds, 2) if name in planned else 0.0,
                    "read_bytes": model.read_bytes - read,
                    "planned_read_bytes": planned[name].read_bytes if name in planned else 0,
                }
                logger.info("%s finished in %.1f s", name, record["stages"][name]["seconds"])
                write_text_atomic(folder / RUN_FILE, json.dumps(record, indent=1) + "\n")
                started, read = time.monotonic(), model.read_bytes
        for warning in gathered.warnings:
            logger.warning(warning)
            terminal.say(f"warning: {warning}")
        _write(options, prepared, folder, gathered)
        record |= {
            "state": "finished",
            "finished": _now(),
            "warnings": gathered.warnings,
            "peak_resident_bytes": peak_resident_bytes(),
            "parts": {"reused": parts.reused, "made": parts.made},
        }
        write_text_atomic(folder / RUN_FILE, json.dumps(record, indent=1) + "\n")
        write_report([folder], folder / "report.html")
    return Finished(folder, gathered, record)


def _only_evaluate(work: Work, gathered: Gathered, masks: Mapping[str, Mask]) -> Iterator[str]:
    run_evaluate(work, gathered, masks)
    yield "evaluate"


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
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN_FILE).is_file():
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
        "warnings": [],
    }


def _write(options: RunOptions, prepared: Prepared, folder: Path, gathered: Gathered) -> None:
    """Write tables and masks into the run folder, and the masks into --masks-dir."""
    constants = {
        "protocol": options.protocol,
        "demonstrations": options.demonstrations,
        "model": prepared.store.manifest.source.id,
        "weights": prepared.store.manifest.weights,
        "seed": options.seed,
    }
    write_table(rows_frame("results", gathered.results, constants), "results", folder / "results.parquet")
    write_table(columns_frame("effects", gathered.effects), "effects", folder / "effects.parquet")
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
        },
        scores=made.scores,
    )
