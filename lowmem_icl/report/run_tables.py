"""What a run's folder holds, as pages and sentences are made of it: for runs of any age, finished or not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl

from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import NAME_PATTERN, MaskFile, read_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.session.folder import state_of
from lowmem_icl.session.record import run_record
from lowmem_icl.tables.guessing import clean_records, settings_at_chance
from lowmem_icl.tables.mask_table import Judging, mask_table
from lowmem_icl.tables.schema import read_table
from lowmem_icl.tables.unit_table import unit_table

Setting = tuple[str, int]
"""A task, or the mean over tasks, at a shot count."""
PromptSetting = tuple[str, int | None]
"""Likewise, or the name of a file of prompts that a user gave, which have no shot count."""


@dataclass(frozen=True, eq=False)
class RunTables:
    """A run: `record` is its run.json, `results` its table, `units` and `masks` the tables made of it, and
    `mask_files` the files that a table names, by their names, as far as they are there.
    """

    folder: Path
    record: Mapping[str, Any]
    results: pl.DataFrame
    units: pl.DataFrame
    masks: pl.DataFrame
    mask_files: Mapping[str, MaskFile]

    @cached_property
    def settings(self) -> list[PromptSetting]:
        """The run's tasks at all shot counts, then files of prompts that were given, then the mean over tasks
        where the tables hold one.
        """
        own = list(dict.fromkeys(task["task"] for task in self.record["tasks"]))
        mean = [AGGREGATE] if (self.results["task"] == AGGREGATE).any() else []
        counts: list[int] = sorted(self.record["shots"])
        given: list[PromptSetting] = [(name, None) for name in given_prompts(self.results)]
        return [*product(own, counts), *given, *product(mean, counts)]

    @cached_property
    def tasks(self) -> list[str]:
        """The run's tasks in their order, files of prompts that were given, and after them the mean over
        tasks where the tables hold one.
        """
        return list(dict.fromkeys(task for task, _ in self.settings))

    @cached_property
    def shots(self) -> list[int | None]:
        """The numbers of demonstrations, ascending; at the end None where prompts were given."""
        counts = dict.fromkeys(n_shots for _, n_shots in self.settings)
        return sorted(counts, key=lambda n_shots: (n_shots is None, n_shots))

    @cached_property
    def at_chance(self) -> frozenset[Setting]:
        """Where the clean model is no better than guessing."""
        return settings_at_chance(clean_records(self.results))

    @cached_property
    def greedy_masks(self) -> dict[Setting, MaskFile]:
        """The files of greedy masks by what they were searched for."""
        searched = self.results.filter(
            (pl.col("experiment") == "prune")
            & (pl.col("procedure") == "greedy")
            & (pl.col("method") == "greedy")
            & (pl.col("mask_task") == pl.col("task"))
        )
        found = searched.select("task", "shots", "mask").unique(maintain_order=True)
        return {
            (task, shots): self.mask_files[mask]
            for task, shots, mask in found.iter_rows()
            if mask in self.mask_files
        }

    def mask_of(self, task: str, n_shots: int | None) -> MaskFile | None:
        """Return the file of a setting's greedy mask, or None."""
        return None if n_shots is None else self.greedy_masks.get((task, n_shots))

    def n_units(self, kind: str) -> int:
        """Return how many heads or FFNs the model has."""
        model = self.record["model"]
        return int(model["layers"] * (model["heads"] if kind == "head" else 1))

    def kept(self, mask: Mask) -> int:
        """Return how many units a mask leaves."""
        return self.n_units("head") + self.n_units("ffn") - len(mask)


def given_prompts(results: pl.DataFrame) -> list[str]:
    """Return the names of files of prompts that were patched."""
    is_given = (pl.col("experiment") == "patch") & pl.col("shots").is_null()
    return results.filter(is_given)["task"].drop_nulls().unique(maintain_order=True).to_list()


def read_run(folder: Path) -> RunTables:
    """Return a run's tables, those of units and masks made anew.

    Raises InputError naming the folder where it holds no run, or a table or mask that cannot be read.
    """
    record, results = run_record(folder), read_table(folder / "results.parquet", "results")
    record["state"] = state_of(folder, record)
    _check_units(folder, record, results)
    files = _mask_files(folder, results)
    masks = mask_table(results, files, judging_of(record))
    return RunTables(folder, record, results, unit_table(results, masks), masks, files)


def _check_units(folder: Path, record: Mapping[str, Any], results: pl.DataFrame) -> None:
    """Raise InputError where results are of units that the run's model does not have."""
    for name, count in (("layer", record["model"]["layers"]), ("head", record["model"]["heads"])):
        last = results[name].max()
        if isinstance(last, int) and last >= count:
            raise InputError(
                f"{folder / 'results.parquet'}: is of {name} {last}, and the model has {count}, from 0; run "
                "the same command again, which writes it anew from the folder's parts"
            )


def judging_of(record: Mapping[str, Any]) -> Judging:
    """Return what a run judges masks by."""
    model, options = record["model"], record["options"]
    return Judging(model["layers"], model["heads"], options["objective"], options["tolerance"])


def _mask_files(folder: Path, results: pl.DataFrame) -> dict[str, MaskFile]:
    names = results["mask"].drop_nulls().unique(maintain_order=True).to_list()
    # A table may come from anyone: what is no mask's name would lead out of the folder.
    own = [name for name in names if name != CLEAN and re.fullmatch(NAME_PATTERN, name)]
    paths = {name: folder / "masks" / f"{name}.json" for name in own}
    return {name: read_mask(path) for name, path in paths.items() if path.is_file()}
