"""Which rows of a task a part scores, in which order, and which rows are shown before them.

The rows of a split are shuffled by `Random(42)`, and the same generator then draws every document's
demonstrations in that order, as the harness of the paper did (paper.md 6.1). So the first N documents are the
same under every limit at least N and at every shot count.
"""

import hashlib
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import datasets
import pyarrow as pa
from lm_eval.api.task import ConfigurableTask

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import Protocol
from lowmem_icl.tasks.demonstrations import Dealer, DemonstrationDraw, Demonstrations

PROTOCOL_SEED = 42
BATCH_ROWS = 4096
DECODED_TOGETHER = 64

Part = Literal["evaluate", "train", "importance"]


@dataclass(eq=False)
class SplitRows:
    """Rows of a split by index, each decoded once."""

    table: Any = field(repr=False)
    _decoded: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows."""
        summed = hashlib.sha256()
        if isinstance(self.table, datasets.Dataset):
            for batch in self.table.with_format("arrow").iter(BATCH_ROWS):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as stream:
                    stream.write_table(batch)
                summed.update(sink.getvalue())
        else:
            for index in range(len(self)):
                summed.update(repr(self(index)).encode())
        return summed.hexdigest()

    def __call__(self, index: int) -> dict[str, Any]:
        """Return the row at an index."""
        if index not in self._decoded:
            self._decode(index)
        return self._decoded[index]

    def _decode(self, index: int) -> None:
        if not isinstance(self.table, datasets.Dataset):
            self._decoded[index] = self.table[index]
            return
        # A row alone takes twenty times as long as a row of a batch.
        first = index - index % DECODED_TOGETHER
        columns = self.table[first : first + DECODED_TOGETHER]
        for number, values in enumerate(zip(*columns.values(), strict=True), start=first):
            self._decoded.setdefault(number, dict(zip(columns, values, strict=True)))


@dataclass(frozen=True)
class Member:
    """One of the lm-eval tasks that make up a task: its number among them, and its rows.

    `train` is None where demonstrations and training documents come from the evaluated split.
    """

    number: int
    task: ConfigurableTask
    evaluation: SplitRows
    train: SplitRows | None

    def scored(self, part: Part) -> SplitRows:
        """Return the rows that a part scores."""
        return self.evaluation if part == "evaluate" or self.train is None else self.train

    @property
    def shown(self) -> SplitRows:
        """The rows that demonstrations come from."""
        return self.evaluation if self.train is None else self.train


@dataclass(frozen=True)
class RowRequest:
    """Which documents of a task are asked for."""

    task: str
    shots: int
    part: Part
    demonstrations: Demonstrations
    protocol: Protocol


@dataclass(frozen=True)
class SelectedRow:
    """A row that becomes a document: its index, what it clusters and is judged with, what it is shown."""

    index: int
    row: dict[str, Any] = field(repr=False)
    cluster: str
    unit: str
    draw: DemonstrationDraw


def selected_rows(member: Member, request: RowRequest, limit: int | None) -> Iterator[SelectedRow]:
    """Yield a member's rows of a part, in order, with their demonstrations; `limit` is this member's share.

    Raises InputError where there are too few rows to draw demonstrations from.
    """
    metadata = member.task.config.metadata or {}
    unit_of: Callable[[Any], Hashable] | None = metadata.get("scored_together")
    cluster_of: Callable[[Any], str] | None = metadata.get("cluster")
    scored = member.scored(request.part)
    rng = _generator(member)
    order, pool = _order_and_pool(member, request.part, request.protocol, rng)
    dealer = Dealer(request.demonstrations, rng, pool, request.shots, _scores_the_pool(member, request))
    if dealer.needed > len(pool):
        raise InputError(
            f"--shots {request.shots}: task {request.task} has {len(pool)} rows "
            f"to draw demonstrations from, {dealer.needed} are needed; ask for fewer"
        )
    units: dict[Hashable, int] = {}
    for index in order:
        row = scored(index)
        cluster = f"{member.number}:{index}" if cluster_of is None else cluster_of(row)
        draw = dealer.deal(index, cluster)
        unit = (member.number, index) if unit_of is None else unit_of(row)
        if unit not in units and limit is not None and len(units) >= limit:
            if unit_of is None:
                return
            continue
        units.setdefault(unit, len(units))
        yield SelectedRow(index, row, cluster, f"{member.number}:{units[unit]}", draw)


def demonstration_pool(member: Member, part: Part, protocol: Protocol) -> Sequence[int]:
    """Return the indices of the rows that demonstrations of a part come from."""
    return _order_and_pool(member, part, protocol, _generator(member))[1]


def scored_order(member: Member, part: Part, protocol: Protocol) -> Sequence[int]:
    """Return the indices of all rows that a part scores under no limit, in order."""
    return _order_and_pool(member, part, protocol, _generator(member))[0]


def answer_pool(member: Member, part: Part, protocol: Protocol) -> Sequence[int]:
    """Return the indices of the rows that demonstrations of a part come from, with those of other answers
    where only some answers are shown.
    """
    return _shuffled_order_and_pool(member, part, protocol, _generator(member))[1]


def _generator(member: Member) -> random.Random:
    # A group's members are drawn apart, else they would all ask and show the rows of the same indices.
    return random.Random(PROTOCOL_SEED + member.number)


def _order_and_pool(
    member: Member, part: Part, protocol: Protocol, rng: random.Random
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the indices a part scores, in order, and those that demonstrations come from."""
    order, pool = _shuffled_order_and_pool(member, part, protocol, rng)
    restricted = (member.task.config.metadata or {}).get("demonstrations_with") or {}
    for name, wanted in restricted.items():
        column = list(member.shown.table[name])
        pool = [index for index in pool if column[index] == wanted]
    return order, pool


def _shuffled_order_and_pool(
    member: Member, part: Part, protocol: Protocol, rng: random.Random
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the indices a part scores, in order, and all of the rows that it may show.

    Without a training split the shuffled evaluation rows are halved: the first half is evaluated on, the
    second is for training and demonstrations; under `reference` all rows are for everything.
    """
    shuffled = list(range(len(member.scored(part))))
    rng.shuffle(shuffled)
    if member.train is not None or protocol.one_split_for_all:
        order, pool = shuffled, list(range(len(member.shown)))
    else:
        half = (len(shuffled) + 1) // 2
        order = shuffled[:half] if part == "evaluate" else shuffled[half:]
        pool = sorted(shuffled[half:])
    if part != "evaluate" and protocol.training_in_file_order:
        order = sorted(order)
    return order, pool


def _scores_the_pool(member: Member, request: RowRequest) -> bool:
    """Tell whether a scored document may be among the rows it could be shown, and must not be."""
    is_for_training = request.part != "evaluate"
    if member.train is not None:
        return is_for_training and not request.protocol.may_show_scored
    # Here the reference, too, draws one more than it shows.
    return is_for_training or request.protocol.one_split_for_all
