"""Parts that patch prompts, and those that patches take means from, as data that a plan counts."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lowmem_icl.engine.cost import SweepCost, gradients_cost
from lowmem_icl.engine.fills import Donor, Fills, RowValues
from lowmem_icl.engine.patch_jobs import PatchBlock, PatchJob, TokenBytes, patch_blocks, patch_cost
from lowmem_icl.engine.schedule import BlockRow, SweepLimits, head_blocks, row_blocks
from lowmem_icl.engine.unit_means import means_cost
from lowmem_icl.rows import Integers, PackedRows, Row, stem_of
from lowmem_icl.session.prepare import Prepared

FROM_THE_OTHER = "other prompt"


@dataclass(frozen=True, eq=False)
class PatchPart:
    """Changes to prompts, all from the same reads of the weights; `reads_before`: how often these are read
    for what is put in.
    """

    name: str
    label: str
    jobs: tuple[PatchJob, ...]
    reads_before: int = 0

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
        sizes = TokenBytes.of(skeleton)
        cost = patch_cost(self.jobs, self._wanted, skeleton.layers, sizes, limits.alive_bytes)
        blocks = self.reads_before + sum(1 for _ in self._blocks(sizes, limits))
        return replace(cost, layers_read=blocks * (skeleton.layers - len(resident)))

    def held_bytes(self, prepared: Prepared, limits: SweepLimits) -> int:
        """Return what is held of the largest block."""
        sizes = TokenBytes.of(prepared.skeleton)
        return max((block.held_bytes(self.jobs, sizes) for block in self._blocks(sizes, limits)), default=0)

    @property
    def _wanted(self) -> list[Integers]:
        return [np.arange(len(job.changes)) for job in self.jobs]

    def _blocks(self, sizes: TokenBytes, limits: SweepLimits) -> Iterator[PatchBlock]:
        return patch_blocks(self.jobs, self._wanted, sizes, limits.alive_bytes)


@dataclass(frozen=True, eq=False)
class EndMeansPart:
    """The means of all units' outputs at the last tokens of prompts, [tokens] each, by group; at all of them
    where they are not `ends_only`.
    """

    name: str
    label: str
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    ends_only: bool = True

    @cached_property
    def packed(self) -> list[PackedRows]:
        """The prompts as rows, by group."""
        return [PackedRows(tuple(stem_of(prompt) for prompt in group), 0) for group in self.groups]

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Collection[int]) -> SweepCost:
        """Return what a pass over all prompts takes."""
        skeleton = prepared.skeleton
        rows = [BlockRow(index, row) for index, group in enumerate(self.packed) for row in group.rows]
        blocks = head_blocks(rows, skeleton.width, skeleton.layers, limits)
        layers_read = (skeleton.layers - len(resident)) * len(blocks)
        return replace(means_cost(self.packed, skeleton.layers), layers_read=layers_read)


@dataclass(frozen=True, eq=False)
class PatchEstimatesPart:
    """First-order estimates of patches: the gradients of rows without stems, and whose values would stand in
    theirs.
    """

    name: str
    label: str
    rows: tuple[Row, ...]
    donors: Mapping[Row, Donor]

    @property
    def fills(self) -> Fills:
        """What stands in units' place, by the one name there is."""
        return {FROM_THE_OTHER: RowValues(self.donors)}

    def cost(self, prepared: Prepared, limits: SweepLimits, resident: Collection[int]) -> SweepCost:
        """Return what a pass forward and back takes, with the donors along."""
        skeleton = prepared.skeleton
        members = [BlockRow(0, row) for row in self.rows]
        blocks = row_blocks(
            members, skeleton.width, skeleton.layers, limits, keeps_clean=True, fills=[self.fills]
        )
        layers_read = 2 * len(blocks) * (skeleton.layers - len(resident))
        donated = (
            2
            * skeleton.layers
            * sum(len(member.row) for block in blocks for member in block if member.is_donor)
        )
        own = gradients_cost([PackedRows(self.rows, len(self.rows))], skeleton.layers)
        return replace(own + SweepCost(donated, donated, donated), layers_read=layers_read)
