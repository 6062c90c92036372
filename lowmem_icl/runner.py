"""The whole story of a run in order: check, plan, stages, tables, masks, page; continued where it stopped."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.experiments.order import run_stages
from lowmem_icl.masks.files import MaskFile, write_mask
from lowmem_icl.masks.given import misfits, tables_of
from lowmem_icl.masks.naming import check_names
from lowmem_icl.model.int8 import slow_product_note
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.hours import Deadlines
from lowmem_icl.planning.outlook import Outlook
from lowmem_icl.planning.plan import Plan, StagePlan, check_memory, make_plan
from lowmem_icl.report.files import publish_run
from lowmem_icl.report.findings.first_results import first_result
from lowmem_icl.session.folder import RunFolder, check_output, open_folder
from lowmem_icl.session.identity import identity_of
from lowmem_icl.session.leftovers import clear_shared_folders
from lowmem_icl.session.prepare import Prepared, prepare, with_store
from lowmem_icl.session.publish import Publisher
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.run_form import StageActuals, State
from lowmem_icl.session.work import Work
from lowmem_icl.system.machine import device_in_use, resolved_device
from lowmem_icl.system.memory import check_memory_given
from lowmem_icl.system.progress import Progress, RunView, unseen, unwatched
from lowmem_icl.tracking.catalogue import check_installed
from lowmem_icl.tracking.run_tracking import tracked

logger = logging.getLogger("lowmem_icl")


Watch = Callable[[Outlook, Sequence[str]], AbstractContextManager[RunView]]


COUNTING = "counting what there is to do"


@dataclass(frozen=True)
class Audience:
    """Whom a run tells what it does: messages for people, progress, its plan, and then its stages, by
    outlook and names; `waiting`: what is done that may take a while and shows no progress; `wants_figures`:
    whether the page ends with figures, which take longer than it.
    """

    announce: Callable[[str], None] = lambda text: None
    progress: Progress = unseen
    show_plan: Callable[[Plan], None] = lambda plan: None
    watch: Watch = lambda outlook, experiments: unwatched()
    waiting: Callable[[str], AbstractContextManager[None]] = lambda doing: nullcontext()
    wants_figures: bool = True


@dataclass(frozen=True)
class RunOutcome:
    """A run that has ended: its folder, what its stages found, and the content of run.json."""

    folder: Path
    results: Mapping[str, StageResult]
    record: dict[str, Any]


def run(
    options: RunOptions, audience: Audience = Audience(), mask_files: Mapping[str, MaskFile] | None = None
) -> RunOutcome:
    """Do everything that the options ask for; parts finished by an earlier run of the same options are
    reused.

    With `mask_files` only `evaluate` runs, clean and under each of them. Tables and page are written at the
    end, and before that every two minutes or so. Settings whose values are not finite fail, and the run goes
    on: the record's `failures` lists them. Raises InputError, DoesNotFit or InUse before any long work; on
    Ctrl-C, and when --hours are over, what is finished stays and is in tables and page.
    """
    started = time.monotonic()
    check_installed(options.track)
    check_memory_given(options.memory)
    folder = check_output(options)
    mask_files = mask_files or {}
    prepared = _prepared_with_store(options, mask_files, audience)
    warnings = _warnings(prepared, mask_files)
    device = resolved_device(options.device)
    weights, tasks = prepared.store.manifest.digest, prepared.tasks_digest
    identity = identity_of(options, device.type, weights, tasks, prepared.masks, prepared.given.digest)
    with open_folder(folder, identity, announce=audience.announce) as opened:
        hours, now = None, time.monotonic()
        if options.hours is not None:
            hours = max(0.0, options.hours - (now - started) / 3600)
        with audience.waiting(f"{COUNTING}, measuring this machine"):
            plan = make_plan(prepared, hours=hours, finished=opened.parts.has)
        audience.show_plan(plan)
        opened.begin(options, prepared, plan.as_record())
        for name, mask_file in mask_files.items():
            # So the folder says by itself what was removed.
            write_mask(folder / "masks" / f"{name}.json", mask_file)
        write_page = _write_page if audience.wants_figures else _write_page_alone
        publisher = Publisher(prepared, opened, warnings, write_page)
        with tracked(options, opened, audience.announce) as publisher.follower:
            try:
                # Planning takes of the hours too.
                _run_stages(prepared, plan, Deadlines(plan, now), opened, publisher, audience)
            except BaseException as error:
                if not isinstance(error, Exception):
                    publisher.publish_stopped(audience.announce)
                raise
            _tell(publisher, audience)
            state: State = "out of time" if publisher.unfinished else "finished"
            publisher.publish(state)
            opened.finish(state)
    return RunOutcome(folder, publisher.results, opened.record)


def _tell(publisher: Publisher, audience: Audience) -> None:
    """Say what there is to be warned of; what failed is logged, and told by whoever asked."""
    for warning in publisher.warnings:
        logger.warning(warning)
        audience.announce(f"warning: {warning}")
    for failure in publisher.failures:
        logger.error("failed: %s", failure.sentence)


def _prepared_with_store(
    options: RunOptions, mask_files: Mapping[str, MaskFile], audience: Audience
) -> Prepared:
    clear_shared_folders(options)
    with audience.waiting("reading tasks and tokenising their prompts"):
        prepared = _with_masks(prepare(options, progress=audience.progress, needs_weights=True), mask_files)
    if not prepared.store.is_written:
        # Before a conversion of hours.
        with audience.waiting(COUNTING):
            check_memory(prepared)
    return with_store(prepared, announce=audience.announce, progress=audience.progress)


def _with_masks(prepared: Prepared, mask_files: Mapping[str, MaskFile]) -> Prepared:
    """Return the run with masks to be evaluated, and the tables of means that they name."""
    masks = {name: mask_file.mask for name, mask_file in mask_files.items()}
    check_names((), masks)
    return replace(prepared, masks=masks, given_means=tables_of(mask_files.values()))


def _warnings(prepared: Prepared, mask_files: Mapping[str, MaskFile]) -> list[str]:
    """Return what is to be said of masks and weights; raise InputError for a mask that does not fit."""
    widths = prepared.skeleton.attention_width, prepared.skeleton.width
    found = misfits(mask_files.values(), prepared.mask_model, widths)
    slow = slow_product_note() if prepared.options.weights == "int8" else None
    return found if slow is None else [*found, slow]


def _write_page(folder: Path, ends_as: State | None) -> None:
    # Figures take longer than the page.
    publish_run(folder, ends_as=ends_as, with_figures=ends_as is not None)


def _write_page_alone(folder: Path, ends_as: State | None) -> None:
    publish_run(folder, ends_as=ends_as, with_figures=False)


def _run_stages(
    prepared: Prepared,
    plan: Plan,
    deadlines: Deadlines,
    opened: RunFolder,
    publisher: Publisher,
    audience: Audience,
) -> None:
    """Run the stages on the opened model, publishing what they find as they find it."""
    memory, planned = plan.memory, {stage.experiment: stage for stage in plan.stages}
    outlook = Outlook(plan)
    opened.estimate = lambda: outlook.seconds_left
    with ExitStack() as stack:
        view = stack.enter_context(audience.watch(outlook, prepared.options.experiments_in_order))
        device = resolved_device(prepared.options.device)
        stack.enter_context(device_in_use(device, prepared.options.device_memory))
        model = stack.enter_context(
            StreamedModel(
                prepared.store,
                device=device,
                resident_bytes=memory.resident_bytes,
                tables_in_memory=memory.tables_in_memory,
            )
        )
        cache = stack.enter_context(CleanCache(memory.cache_bytes, memory.spill_bytes, opened.parts.folder))
        work = Work(
            prepared,
            model,
            plan.limits,
            cache,
            opened.parts,
            outlook.following(view.part),
            wants_results=publisher.is_due,
            after_part=publisher.publish_if_due,
        )
        taken = _Taken(model)
        for stage, result, is_over in run_stages(work, deadlines):
            publisher.fold(stage.name, result)
            seconds, read_bytes = taken.by(stage.name)
            if is_over:
                actuals = _actuals(planned.get(stage.name), seconds, read_bytes, result)
                if actuals.finished:
                    deadlines.learn(stage.name, seconds)
                outlook.over(stage.name)
                publisher.stage_over(stage.name, actuals)
                view.over(stage.name, seconds, result.unfinished or first_result(stage.name, result.results))
            publisher.publish_if_due()


def _actuals(planned: StagePlan | None, seconds: float, read_bytes: int, result: StageResult) -> StageActuals:
    return StageActuals(
        seconds=round(seconds, 2),
        planned_seconds=round(planned.seconds, 2) if planned else 0.0,
        read_bytes=read_bytes,
        planned_read_bytes=planned.read_bytes if planned else 0,
        finished=not result.unfinished,
    )


class _Taken:
    """What every stage has taken so far, in seconds and bytes read; a stage may go on after another."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, int] = {}
        self._at = time.monotonic(), model.read_bytes

    def by(self, stage: str) -> tuple[float, int]:
        """Add what was taken since the last call to a stage; return all that it has taken."""
        now = time.monotonic(), self._model.read_bytes
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now[0] - self._at[0]
        self._bytes[stage] = self._bytes.get(stage, 0) + now[1] - self._at[1]
        self._at = now
        return self._seconds[stage], self._bytes[stage]
