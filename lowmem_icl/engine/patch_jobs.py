"""What patching asks for, and how it is cut to the memory: data that a pass runs and a plan counts.

Axis letters: P tokens that are patched, D width, Z the heads' outputs' width, G heads of keys and values, d
head width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.schedule import FLOAT_BYTES
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.rows import Integers, Row, with_stems


@dataclass(frozen=True)
class TokenBytes:
    """What is held of a token, in bytes: `clean`, in a row's clean run; `changed`, under one change."""

    clean: int
    changed: int

    @classmethod
    def of(cls, skeleton: Skeleton) -> "TokenBytes":
        """Return what a model's sizes come to."""
        width, attention_width = skeleton.width, skeleton.attention_width
        # What takes queries, keys and values from the residual says how wide they are, [Z + 2 · G · d, D];
        # where it gives more besides, keys and values are no wider than those of all heads.
        inputs = skeleton.weights_by_part[0] // width
        keys_and_values = min(inputs - attention_width, 2 * attention_width)
        # The residual before and after the layer in work, the FFN's output, z, keys and values.
        clean = 3 * width + attention_width + keys_and_values
        return cls(clean * FLOAT_BYTES, width * FLOAT_BYTES)


@dataclass(frozen=True, eq=False)
class RowTokens:
    """Some tokens of a row, [P], by their indices in it."""

    row: Row
    tokens: Integers


@dataclass(frozen=True)
class Addition:
    """A vector, by its name, that is added to the residual at a layer's output."""

    layer: int
    vector: str

    @property
    def first_layer(self) -> int:
        """The layer from whose output on the model differs from the clean run."""
        return self.layer


Change = Mask | Addition


@dataclass(frozen=True, eq=False)
class PatchJob:
    """Changes to a row's clean run, each by itself, after which the row's answers are read.

    into: the row, and where it is changed; its stem never is. changes: units, in whose place stands what
    `source` gives, and additions, of `vectors` [D]. source: tokens of a row, one for each of `into`, whose
    clean run gives every unit's value there; a table, the same at all tokens; None for zeros.
    """

    into: RowTokens
    changes: tuple[Change, ...]
    source: RowTokens | UnitMeans | None = None
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows that are run clean, stems first."""
        source = [self.source.row] if isinstance(self.source, RowTokens) else []
        return with_stems([self.into.row, *source])

    @cached_property
    def firsts(self) -> Integers:
        """The first layer that every change touches; -1 for the clean run."""
        found = (-1 if change.first_layer is None else change.first_layer for change in self.changes)
        return np.fromiter(found, np.int64, len(self.changes))


@dataclass(frozen=True, eq=False)
class PatchMember:
    """Some changes of a job, by index and ascending by first layer, that go together."""

    job: int
    changes: Integers


@dataclass(frozen=True, eq=False)
class PatchBlock:
    """Changes that go through all layers together, and the rows that are run clean with them, stems first."""

    rows: list[Row]
    members: list[PatchMember]

    def held_bytes(self, jobs: Sequence[PatchJob], sizes: TokenBytes) -> int:
        """Return what is held of all rows and changes while they are in a layer."""
        changed = sum(len(member.changes) * len(jobs[member.job].into.row) for member in self.members)
        return sum(map(len, self.rows)) * sizes.clean + changed * sizes.changed


def patch_blocks(
    jobs: Sequence[PatchJob], wanted: Sequence[Integers], sizes: TokenBytes, most_bytes: int
) -> Iterator[PatchBlock]:
    """Cut changes, `wanted` [of each job, by index], into blocks of which no more than `most_bytes` are held.

    Raises DoesNotFit where not even one change and the rows that it needs do.
    """
    left = [
        PatchMember(number, of_job[np.argsort(job.firsts[of_job], kind="stable")])
        for number, (job, of_job) in enumerate(zip(jobs, wanted, strict=True))
        if len(of_job)
    ]
    while left:
        rows: dict[Row, None] = {}
        members: list[PatchMember] = []
        room = most_bytes
        while left:
            job, member = jobs[left[0].job], left[0]
            new = sum(len(row) for row in job.rows if row not in rows) * sizes.clean
            change = len(job.into.row) * sizes.changed
            fitting = min(len(member.changes), (room - new) // change)
            if fitting < 1:
                break
            rows.update(dict.fromkeys(job.rows))
            members.append(PatchMember(member.job, member.changes[:fitting]))
            room -= new + fitting * change
            left[0] = PatchMember(member.job, member.changes[fitting:])
            if not len(left[0].changes):
                del left[0]
        if not members:
            tokens = sum(map(len, with_stems([job.into.row])))
            raise DoesNotFit(
                f"a prompt of {tokens} tokens and one change to it take {new + change} bytes, "
                f"{most_bytes} are left; give more --memory"
            )
        yield PatchBlock(list(rows), members)


def patch_cost(
    jobs: Sequence[PatchJob], wanted: Sequence[Integers], layers: int, sizes: TokenBytes, most_bytes: int
) -> SweepCost:
    """Return what changes take, `wanted` [of each job, by index], in a model of so many layers."""
    total = SweepCost()
    for block in patch_blocks(jobs, wanted, sizes, most_bytes):
        clean = layers * sum(map(len, block.rows))
        total += SweepCost(clean, clean, clean, layers_read=layers)
        for member in block.members:
            total += changes_cost(jobs[member.job], member.changes, layers)
    return total


def changes_cost(job: PatchJob, changes: Integers, layers: int) -> SweepCost:
    """Return what changes take from their first layers on; in these, attention is the clean run's."""
    row, into = job.into.row, job.into.tokens
    at_last = len(np.intersect1d(row.reads, into))
    attention = finished = spared = 0
    for number in changes.tolist():
        change, first = job.changes[number], int(job.firsts[number])
        if first < 0:
            continue
        after = layers - 1 - first
        attention += after * len(row)
        if isinstance(change, Mask):
            # In the last layer only what is read goes on.
            finished += after * len(row) + len(row.reads)
            spared += sum(at_last if layer == layers - 1 else len(into) for layer in change.ffns)
        elif after:
            finished += (after - 1) * len(row) + len(row.reads)
    answers = len(changes) * len(row.reads)
    return SweepCost(attention, finished, finished - spared, answers=answers)
