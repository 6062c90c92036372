"""Scores of tasks under masks, and what every unit is worth alone: tables, by the code of the experiments."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.api.mask import Mask
from lowmem_icl.api.open_model import OpenModel
from lowmem_icl.api.progress import Shown, progress_of
from lowmem_icl.api.task import Task
from lowmem_icl.api.words import python_errors
from lowmem_icl.errors import InputError
from lowmem_icl.experiments.ablate import claims, measure
from lowmem_icl.experiments.ablate.stage import removed_units
from lowmem_icl.experiments.ablate.sweeps import Pass, Selection, units_of
from lowmem_icl.experiments.evaluate import stage as evaluate
from lowmem_icl.masks.files import MaskFile
from lowmem_icl.masks.given import misfits, tables_of
from lowmem_icl.masks.mask import Mask as RemovedUnits
from lowmem_icl.masks.mask import Unit
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.options import did_you_mean
from lowmem_icl.protocols import ABLATIONS, Ablation
from lowmem_icl.session.fills import fill_for
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import stamp
from lowmem_icl.tables import blocks
from lowmem_icl.tables.schema import empty_frame
from lowmem_icl.tables.unit_table import unit_table
from lowmem_icl.tasks.documents import TaskRows

Kinds = Literal["heads", "ffns", "all"]
KINDS: tuple[Kinds, ...] = ("heads", "ffns", "all")
FIRST = ("unit", "mask", "metric", "drop", "value", "stderr", "low", "high", "q_value")
"""Columns that stand first, so that a table that is cut shows them."""
SHARED = ("experiment", "protocol", "demonstrations", "labels", "model", "weights", "seed", "exact")
"""Columns of results.parquet that say nothing here."""


@python_errors
def score(
    model: OpenModel, task: Task, masks: Sequence[Mask] = (), *, progress: Shown = True
) -> pl.DataFrame:
    """Return what a task scores, clean and under each mask: a record per mask and metric, with its interval.

    All masks share every read of the weights. Metrics of the clean model and under masks: the task's own (as
    `acc`), gold_logprob (nats), gold_prob, margin, top_answer_share; what a mask costs on the same documents:
    acc_drop, gold_logprob_drop, gold_prob_drop, clean minus masked. Columns are those of results.parquet that
    have a value. A mask whose ablation is `mean` and that brings no means gets those of the task's training
    documents. Raises InputError for a mask that does not fit the model and for two masks of one name,
    NotFinite where the model's values are NaN, infinite or too large.

    >>> import lowmem_icl as icl
    >>> with icl.open_model("demo") as model:
    ...     task = icl.load_task("recall", shots=16, limit=16)
    ...     frame = icl.score(model, task, [icl.Mask.parse("L0H0")], progress=False)
    >>> frame.filter(metric="acc").select("mask", "value").rows()
    [('clean', 0.9375), ('L0H0', 0.1875)]
    """
    named = _named_masks(model, masks)
    ablations = {mask.ablation for mask in named.values() if mask.units.fill is None} - {"zero"}
    shown = progress_of(progress)
    prepared = model.prepared(
        task, shown, experiments=("evaluate",), labels=("right",), ablation=_only(ablations)
    )
    filled = {name: _filled(mask, prepared, task) for name, mask in named.items()}
    tables = tables_of(_files_of(named))
    prepared = replace(prepared, evaluate=(_rows(prepared, task),), masks=filled, given_means=tables)
    with model.work(prepared, shown) as work:
        *_, result = evaluate.run(work)
    for warning in result.warnings:
        warnings.warn(warning, stacklevel=3)
    return _said(result.results)


@python_errors
def ablate(
    model: OpenModel,
    task: Task,
    units: Kinds | Sequence[str] = "heads",
    ablation: Ablation = "zero",
    *,
    progress: Shown = True,
) -> pl.DataFrame:
    """Return what a task loses without each unit alone: a record per unit, costliest first.

    units: `heads`, `ffns`, `all`, or names such as `L0H3`. ablation: what stands in a removed unit's place:
    `zero`, `mean` (over the task's training documents) or `resample` (another document's values). drop: mean
    loss of gold log-probability in nats, with the bounds of its 95 % interval and the q-value of the claim
    that more documents are hurt than helped, or the reverse, among these units; likewise acc_drop,
    gold_prob_drop and margin_drop. Columns are those of units.parquet that have a value. Raises as `score`.

    >>> import lowmem_icl as icl
    >>> with icl.open_model("demo") as model:
    ...     task = icl.load_task("recall", shots=16, limit=16)
    ...     drops = icl.ablate(model, task, units="heads", progress=False)
    >>> drops["unit"].head(3).to_list()
    ['L0H0', 'L1H0', 'L1H1']
    """
    if ablation not in ABLATIONS:
        hint = did_you_mean(str(ablation), ABLATIONS)
        raise InputError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {ablation!r}{hint}")
    shown = progress_of(progress)
    prepared = model.prepared(task, shown, experiments=("ablate",), ablation=ablation)
    every = units_of(prepared)
    indices = _indices(units, every)
    rows = _rows(prepared, task)
    with model.work(prepared, shown) as work:
        swept = Pass.over(prepared, [rows], [Selection(indices, indices[:0])], is_control=False)
        scores = [work.sweep(part)[0] for part in swept.parts]
    ((_, _, removed),) = removed_units(prepared, swept, [scores])
    assert removed is not None, "all its documents are scored"
    found = measure.drop_blocks(removed.own.task, [every[index] for index in indices], removed.drops)
    found += claims.claim_blocks(every, [removed.own])
    results = blocks.frame("results", found, stamp(prepared, "ablate"))
    table = unit_table(results, empty_frame("masks"))
    return _said(table.sort("drop", descending=True, nulls_last=True, maintain_order=True))


def _rows(prepared: Prepared, task: Task) -> TaskRows:
    """Return a task's documents among those that were prepared."""
    return (prepared.evaluate if task.part == "evaluate" else prepared.train)[0]


def _said(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the columns that have a value and differ from question to question."""
    kept = [name for name in frame.columns if name not in SHARED and frame[name].null_count() < len(frame)]
    return frame.select(sorted(kept, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)))


def _named_masks(model: OpenModel, masks: Sequence[Mask]) -> dict[str, Mask]:
    """Return masks by their names, without the clean model; raise InputError where one does not fit."""
    skeleton, named = model.skeleton, {}
    for mask in masks:
        if not isinstance(mask, Mask):
            raise InputError(f"masks: expected a sequence of Mask, got {mask!r}; use Mask.parse or Mask.read")
        if not mask:
            continue
        if mask.name in named or mask.name == CLEAN:
            raise InputError(f"masks: two are named '{mask.name}'; leave one out, or save it under another")
        last = Unit("head", skeleton.layers - 1, skeleton.heads - 1)
        for unit in mask.units.units():
            if unit.layer >= skeleton.layers or (unit.head or 0) >= skeleton.heads:
                raise InputError(f"mask {mask.name}: the model has no {unit}; its last head is {last}")
        named[mask.name] = mask
    widths = skeleton.attention_width, skeleton.width
    for warning in misfits(_files_of(named), model.mask_model, widths):
        warnings.warn(warning, stacklevel=4)
    return named


def _files_of(masks: Mapping[str, Mask]) -> list[MaskFile]:
    return [mask.origin for mask in masks.values() if mask.origin is not None]


def _only(ablations: set[Ablation]) -> Ablation:
    if len(ablations) > 1:
        raise InputError(
            "masks: expected one kind of ablation beside zero, got mean and resample; score them apart"
        )
    return next(iter(ablations), "zero")


def _filled(mask: Mask, prepared: Prepared, task: Task) -> RemovedUnits:
    """Return a mask's units with the name of what stands in their place."""
    if mask.ablation == "zero" or mask.units.fill is not None:
        return mask.units
    return mask.units.filled(fill_for(prepared.options, task.name, task.shots))


def _indices(units: Kinds | Sequence[str], every: Sequence[Unit]) -> NDArray[np.int64]:
    """Return the indices of units asked for among all, ascending; raise InputError for one that is not."""
    if isinstance(units, str):
        if units not in KINDS:
            raise InputError(
                f"units: expected {', '.join(KINDS)} or a list of names such as L0H3, got {units!r}"
                f"{did_you_mean(units, KINDS)}"
            )
        wanted = {"heads": ("head",), "ffns": ("ffn",), "all": ("head", "ffn")}[units]
        return np.array([index for index, unit in enumerate(every) if unit.kind in wanted], dtype=np.int64)
    units = list(units)
    place = {str(unit): index for index, unit in enumerate(every)}
    for name in units:
        if str(name) not in place:
            raise InputError(f"units: the model has no {name!r}; it has {every[0]} to {every[-1]}")
    if not units:
        raise InputError("units: expected at least one unit, got none")
    return np.array(sorted({place[str(name)] for name in units}), dtype=np.int64)
