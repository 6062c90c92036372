"""Parts that patch prompts, and those that patches take means from, as data that a plan counts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lowmem_icl.engine.cost import SweepCost, gradients_cost
from lowmem_icl.engine.fills import Donor, Fills, RowValues
from lowmem_icl.engine.patch_jobs import PatchJob, TokenBytes, patch_blocks, patch_cost
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.engine.unit_means import means_cost
from lowmem_icl.rows import Integers, PackedRows, Row, stem_of
from lowmem_icl.session.failures import Setting
from lowmem_icl.session.part_jobs import PartJob, Source, patch_jobs, prompts_job
from lowmem_icl.session.prepare import Prepared

FROM_THE_OTHER = "other prompt"
NOBODY = Source(Setting(), "")


@dataclass(frozen=True, eq=False)
class PatchPart:
    """Changes to prompts, all from the same reads of the weights; `reads_before`: how often these are read
    for what is put in; `sources`: whose each job's prompt is.
    """

    name: str
    label: str
    jobs: tuple[PatchJob, ...]
    reads_before: int = 0
    sources: tuple[Source, ...] = ()

    @property
    def part_jobs(self) -> list[PartJob]:
        """Its jobs as they are kept."""
        return patch_jobs(self.jobs, self.sources)

    @cached_property
    def ablations(self) -> int:
        """How many times a prompt is scored under a change."""
        return sum(int((job.firsts >= 0).sum()) for job in self.jobs)

    @property
    def tokens(self) -> int:
        """Tokens of all rows that are run clean."""
        return sum(len(row) for job in self.jobs for row in job.rows)

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Collection[int]) -> SweepCost:
        """Return what patching takes; layers that are `resident` are not read."""
        skeleton = prepared.skeleton
        sizes, resting = TokenBytes.of(skeleton), skeleton.layers - len(resident)
        cost = patch_cost(self.jobs, self._wanted, skeleton.layers, sizes, limits.alive_bytes)
        reads = cost.layers_read // skeleton.layers + self.reads_before
        return replace(cost, layers_read=reads * resting)

    def held_bytes(self, prepared: Prepared, limits: SweepLimits) -> int:
        """Return what is held of the largest block."""
        sizes = TokenBytes.of(prepared.skeleton)
        blocks = patch_blocks(self.jobs, self._wanted, sizes, limits.alive_bytes)
        return max((block.held_bytes(self.jobs, sizes) for block in blocks), default=0)

    @property
    def _wanted(self) -> list[Integers]:
        return [np.arange(len(job.changes)) for job in self.jobs]


@dataclass(frozen=True, eq=False)
class PromptMeansPart:
    """The means of all units' outputs over the tokens of prompts, [tokens] each, by group; `ends_only`: of
    each prompt its last token alone. `sources`: whose the prompts are, by group.
    """

    name: str
    label: str
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    ends_only: bool = True
    sources: tuple[tuple[Source, ...], ...] = ()

    @property
    def part_jobs(self) -> list[PartJob]:
        """Its groups as they are kept."""
        sources = self.sources or [()] * len(self.groups)
        contents = ((group, self.ends_only) for group in self.groups)
        return [prompts_job(content, of) for content, of in zip(contents, sources, strict=True)]

    def packed(self, prepared: Prepared) -> list[PackedRows]:
        """Return the prompts as rows, by group."""
        return [PackedRows(tuple(stem_of(prompt) for prompt in group), 0) for group in self.groups]

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Collection[int]) -> SweepCost:
        """Return what a pass over all prompts takes."""
        return means_cost(self.packed(prepared), prepared.skeleton.size, limits, resident)


@dataclass(frozen=True, eq=False)
class PatchEstimatesPart:
    """First-order estimates of patches: the gradients of rows without stems, and whose values would stand in
    theirs. `sources`: whose prompts the rows are, one for each.
    """

    name: str
    label: str
    rows: tuple[Row, ...]
    donors: Mapping[Row, Donor]
    sources: tuple[Source, ...]

    @property
    def part_jobs(self) -> list[PartJob]:
        """All rows as one job, as it is kept; of several owners to a row each is from there."""
        content = [(row.digest, self.donors[row].row.digest) for row in self.rows]
        of_owner: dict[int, Source] = {}
        for row, source in zip(self.rows, self.sources, strict=True):
            of_owner.update(dict.fromkeys(row.owners.tolist(), source))
        owners = range(max(of_owner, default=-1) + 1)
        return [prompts_job(content, [of_owner.get(owner, NOBODY) for owner in owners])]

    @property
    def fills(self) -> Fills:
        """What stands in units' place, by the one name there is."""
        return {FROM_THE_OTHER: RowValues(self.donors)}

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Collection[int]) -> SweepCost:
        """Return what a pass forward and back takes, with the donors along."""
        packed = [PackedRows(self.rows, len(self.rows))]
        return gradients_cost(packed, [self.fills], prepared.skeleton.size, limits, resident)
