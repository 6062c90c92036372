"""What a run puts in removed units' place: its names, and the tables of means that they stand for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.engine.unit_means import MeanSums, means_cost
from lowmem_icl.masks.mask import Mask, ablation_of, resampling
from lowmem_icl.masks.means import UnitMeans, mean_of_tables
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.rows import PackedRows
from lowmem_icl.session.part_jobs import PartJob, task_jobs
from lowmem_icl.session.parts import Parts
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.tasks.documents import TaskRows

PART = "means"


def fill_for(options: RunOptions, task: str, shots: int) -> str | None:
    """Return the name of what stands in place of units that are removed for a task, or for all tasks together
    (AGGREGATE), at a shot count.
    """
    if options.ablation == "resample":
        return resampling(options.seed)
    return None if options.ablation == "zero" else f"mean:{task}:{shots}"


def fill_for_all(options: RunOptions) -> str | None:
    """Return the name of what stands in place of units that are removed for no task of their own."""
    if options.ablation == "resample":
        return resampling(options.seed)
    return None if options.ablation == "zero" else f"mean:{AGGREGATE}"


def clean_beside(fill: str | None) -> Mask:
    """Return the clean run that masks are compared with in one sweep: where each document has rows of its own
    under them, it goes over these, so that differences are of the masks alone.
    """
    return Mask(fill=fill) if ablation_of(fill) == "resample" else Mask()


def expected_mask(options: RunOptions, mask: Mask) -> Mask:
    """Return a mask that stands in a plan for one that is found later, with what stands for its units."""
    return mask.filled(fill_for_all(options)) if mask else mask


def filled(options: RunOptions, task: TaskRows, mask: Mask) -> Mask:
    """Return a mask with what stands in its units' place where they are removed for a task of their own; the
    clean run stays what it is.
    """
    return mask.filled(fill_for(options, task.task, task.shots)) if mask else mask


@dataclass(frozen=True)
class MeansPart:
    """The means of all units' outputs over the documents of tasks with their right answers, by task."""

    name: str
    label: str
    tasks: tuple[TaskRows, ...]

    ends_only: ClassVar[bool] = False

    @property
    def part_jobs(self) -> list[PartJob]:
        """Its tasks as they are kept."""
        return task_jobs(self.tasks)

    def packed(self, prepared: Prepared) -> list[PackedRows]:
        """Return the rows of every task."""
        return [prepared.pack(task, gold_only=True).packed for task in self.tasks]

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Collection[int]) -> SweepCost:
        """Return what a pass over all documents takes."""
        packed = [prepared.outline(task, gold_only=True) for task in self.tasks]
        return means_cost(packed, prepared.skeleton.size, limits, resident)


def means_parts(prepared: Prepared) -> list[MeansPart]:
    """Return the pass that what removes units needs first; none where no means stand in their place."""
    if prepared.options.ablation != "mean":
        return []
    return [MeansPart(PART, "means of units", prepared.train)]


def kept_tables(prepared: Prepared, parts: Parts) -> Mapping[str, UnitMeans]:
    """Return the tables of a run whose first part is there; none where no means stand in units' place."""
    for part in means_parts(prepared):
        kept = parts.jobs(part.name)
        found = [
            (task, MeanSums(**kept[job.name]))
            for task, job in zip(part.tasks, part.part_jobs, strict=True)
            if job.name in kept
        ]
        return tables_of([task for task, _ in found], [sums for _, sums in found])
    return {}


def tables_of(tasks: Sequence[TaskRows], sums: Sequence[MeanSums]) -> Mapping[str, UnitMeans]:
    """Return the tables by the names of `fill_for` and `fill_for_all`: of every task at each shot count, of
    all tasks together at each, and of all tasks wherever there are demonstrations.

    Together every task counts the same; tasks that are out of domain do not count.
    """
    tables = {f"mean:{task.task}:{task.shots}": of.means() for task, of in zip(tasks, sums, strict=True)}

    def together(members: Sequence[TaskRows]) -> UnitMeans:
        counted = [task for task in members if in_domain(task.task)] or members
        return mean_of_tables([tables[f"mean:{task.task}:{task.shots}"] for task in counted])

    for shots in {task.shots for task in tasks}:
        tables[f"mean:{AGGREGATE}:{shots}"] = together([task for task in tasks if task.shots == shots])
    tables[f"mean:{AGGREGATE}"] = together([task for task in tasks if task.shots] or tasks)
    return tables
