"""Documents of a task in the paper's protocol: which ones, in which order, with which demonstrations.

The documents of a split are shuffled by `Random(42)`, and the same generator then draws every document's
demonstrations in that order, as the harness of the paper did (paper.md 6.1). So the first N documents are the same
under every limit at least N and at every shot count.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import BARE_DEMONSTRATION_TASKS, CORRECTED, Protocol
from lowmem_icl.tasks.demonstrations import PER_DOCUMENT, Dealer, Demonstrations, Shown
from lowmem_icl.tasks.sources import ROW_ERRORS, load_members

PROTOCOL_SEED = 42

Part = Literal["evaluate", "train"]
Fits = Callable[[Sequence[tuple[str, str]]], bool]


@dataclass(frozen=True)
class Document:
    """A scored row of a task: its options as (context, continuation) texts, in the order of the hub's labels.

    `index`: 0-based place in the split's file; in a group the places run on through its members. `gold`: a flag an
    option. `cluster`: the passage that intervals cluster by, or the document itself. `demonstrations`: places of
    the rows shown before it, in prompt order. `unit`: documents of one unit are right only together (MultiRC).
    `set_number`: which of the shared sets of demonstrations it was dealt to, None where they are its own;
    `dropped`: how many of that set were left out so that all its documents fit the model's context.
    """

    index: int
    options: tuple[tuple[str, str], ...]
    gold: tuple[bool, ...]
    cluster: str
    demonstrations: tuple[int, ...]
    unit: str
    member: int
    row: dict[str, Any] = field(repr=False, hash=False, compare=False)
    set_number: int | None = None
    dropped: int = 0


@dataclass(frozen=True)
class TaskRows:
    """Documents of one task at one shot count from one split, and what scores them.

    `chance`: expected accuracy of a uniform guess; `majority`: that of always giving the option that is right most
    often; both exact over these documents. `metric`: the task's main metric.
    """

    task: str
    shots: int
    split: str
    documents: tuple[Document, ...]
    metric: str
    members: tuple[ConfigurableTask, ...] = field(repr=False, compare=False)

    @cached_property
    def chance(self) -> float:
        """Expected accuracy of a uniform guess; 0 for a continuation without alternatives."""

        def share_right(gold: tuple[bool, ...]) -> float:
            return float(np.mean(gold)) if len(gold) > 1 else 0.0

        return float(np.mean([np.prod(shares) for shares in self._by_unit(share_right)]))

    @cached_property
    def majority(self) -> float:
        """Accuracy of the best constant answer."""
        options = max(len(document.gold) for document in self.documents)

        def share_right(place: int) -> float:
            by_unit = self._by_unit(lambda gold: float(any(gold[place : place + 1])))
            return float(np.mean([np.prod(right) for right in by_unit]))

        return max(share_right(place) for place in range(options))

    @cached_property
    def clusters(self) -> list[str]:
        """What intervals cluster by, a name a document: its passage, or where several sets are shared, its set.

        With one set, what is said holds for that set.
        """
        sets = {document.set_number for document in self.documents}
        if None in sets or len(sets) < 2:
            return [document.cluster for document in self.documents]
        return [f"set {document.member}:{document.set_number}" for document in self.documents]

    def _by_unit(self, value: Callable[[tuple[bool, ...]], float]) -> list[list[float]]:
        units: dict[str, list[float]] = {}
        for document in self.documents:
            units.setdefault(document.unit, []).append(value(document.gold))
        return list(units.values())


class _DrawnSampler(ContextSampler):
    """Hands lm-eval the demonstrations that were drawn for the document at hand."""

    drawn: Sequence[dict[str, Any]] = ()

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[dict[str, Any]]:
        assert len(self.drawn) == n
        return self.drawn


@dataclass
class OpenTask:
    """A task whose rows are loaded; `rows` gives documents for a shot count and a part of the protocol."""

    name: str
    members: list[ConfigurableTask]

    @property
    def metric(self) -> str:
        """The task's main metric: `em` where it has one, else the first it lists."""
        listed = list(self.members[0].aggregation())
        return "em" if "em" in listed else "acc" if "acc" in listed else listed[0]

    @cached_property
    def has_train(self) -> bool:
        """Whether demonstrations and training documents come from a split of their own."""
        return all(member.has_training_docs() for member in self.members)

    @property
    def evaluation_split(self) -> str:
        """The file's name of the split that is evaluated on: test if the task has one, else validation."""
        first = self.members[0]
        return str(first.config.test_split if first.has_test_docs() else first.config.validation_split)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows a split."""
        sizes = {self.evaluation_split: sum(len(member.eval_docs) for member in self.members)}
        if self.has_train:
            sizes = {"train": sum(len(member.training_docs()) for member in self.members)} | sizes
        return sizes

    def rows(
        self,
        *,
        shots: int,
        part: Part,
        limit: int | None,
        demonstrations: Demonstrations = PER_DOCUMENT,
        protocol: Protocol = CORRECTED,
        fits: Fits = lambda options: True,
    ) -> TaskRows:
        """Return the documents of a part; `limit` counts documents (MultiRC: questions), None takes all.

        Documents that share a set of demonstrations stand together. `fits` tells whether options fit the model's
        context; where those of a set do not, its first demonstrations are left out. Raises InputError for a limit below 1,
        for more demonstrations than there are rows to draw from, and for a row that lacks a field.
        """
        if limit is not None and limit < 1:
            raise InputError(f"--limit: expected at least 1, got {limit}")
        documents: list[Document] = []
        for number, (member, share) in enumerate(zip(self.members, self._shares(limit), strict=True)):
            offset = sum(len(self._split(other, part)) for other in self.members[:number])
            if share != 0:
                wanted = _Wanted(number, member, part, shots, share, offset, demonstrations, protocol)
                documents += _fitted(self._chosen(wanted), wanted, fits)
        if not documents:
            raise InputError(
                f"task {self.name}: no row is left for its {part} part; without a train split it needs at least 2 rows"
            )
        documents.sort(key=lambda document: (document.member, document.set_number or 0))
        split = "train" if part == "train" and self.has_train else self.evaluation_split
        return TaskRows(self.name, shots, split, tuple(documents), self.metric, tuple(self.members))

    def _shares(self, limit: int | None) -> list[int | None]:
        """Deal a limit evenly over a group's members, the first ones getting what does not divide."""
        if limit is None:
            return [None] * len(self.members)
        whole, rest = divmod(limit, len(self.members))
        return [whole + (number < rest) for number in range(len(self.members))]

    def _split(self, member: ConfigurableTask, part: Part) -> Any:
        """Return the rows of a member that a part scores."""
        return member.eval_docs if part == "evaluate" or not self.has_train else member.training_docs()

    def _places(
        self, shuffled: list[int], part: Part, training_rows: int, protocol: Protocol
    ) -> tuple[list[int], list[int]]:
        """Return the places a part scores, in order, and those that demonstrations come from.

        Without a training split the shuffled evaluation rows are halved: the first half is evaluated on, the
        second is for training and demonstrations; under `reference` all rows are for everything.
        """
        if self.has_train or protocol.one_split_for_all:
            return shuffled, list(range(training_rows))
        half = (len(shuffled) + 1) // 2
        return shuffled[:half] if part == "evaluate" else shuffled[half:], sorted(shuffled[half:])

    def _chosen(self, wanted: "_Wanted") -> Iterator["_Chosen"]:
        """Yield a member's documents of a part, in order, with their demonstrations."""
        member, part = wanted.member, wanted.part
        metadata = member.config.metadata or {}
        unit_of: Callable[[Any], Hashable] | None = metadata.get("scored_together")
        cluster_of: Callable[[Any], str] | None = metadata.get("cluster")
        scored = self._split(member, part)
        shown = member.training_docs() if self.has_train else scored
        # A group's members are drawn apart, else they would all ask and show the rows of the same places.
        rng = random.Random(PROTOCOL_SEED + wanted.number)
        shuffled = list(range(len(scored)))
        rng.shuffle(shuffled)
        protocol = wanted.protocol
        order, pool = self._places(shuffled, part, len(shown), protocol)
        for name, value in (metadata.get("demonstrations_with") or {}).items():
            pool = [place for place in pool if shown[place][name] == value]
        if part == "train" and protocol.training_in_file_order:
            order = sorted(order)
        if self.has_train:
            kept_out = part == "train" and not protocol.may_show_scored
        else:
            # Here the reference, too, draws one more than it shows.
            kept_out = part == "train" or protocol.one_split_for_all
        dealer = Dealer(wanted.demonstrations, rng, pool, wanted.shots, kept_out)
        if dealer.needed > len(pool):
            raise InputError(
                f"--shots {wanted.shots}: task {member.config.task} has {len(pool)} rows to draw demonstrations from, "
                f"{dealer.needed} are needed; ask for fewer"
            )
        units: dict[Hashable, int] = {}
        for place in order:
            row = scored[place]
            cluster = f"{wanted.number}:{place}" if cluster_of is None else cluster_of(row)
            dealt = dealer.deal(place, cluster)
            unit = (wanted.number, place) if unit_of is None else unit_of(row)
            if unit not in units and wanted.limit is not None and len(units) >= wanted.limit:
                if unit_of is None:
                    return
                continue
            units.setdefault(unit, len(units))
            rows = [shown[demonstration] for demonstration in dealt.places]
            yield _Chosen(place, row, cluster, f"{wanted.number}:{units[unit]}", dealt, rows)


@dataclass(frozen=True)
class _Wanted:
    """Which documents of a group's member are asked for; its rows are counted from `offset`."""

    number: int
    member: ConfigurableTask
    part: Part
    shots: int
    limit: int | None
    offset: int
    demonstrations: Demonstrations
    protocol: Protocol


@dataclass(frozen=True)
class _Chosen:
    """A row to be made a document, with the rows shown before it."""

    place: int
    row: dict[str, Any]
    cluster: str
    unit: str
    dealt: Shown
    shown: list[dict[str, Any]]


def _fitted(chosen: Iterable[_Chosen], wanted: _Wanted, fits: Fits) -> list[Document]:
    """Return the documents; a set of demonstrations loses its first ones until all its documents fit."""
    documents: list[Document] = []
    of_set: dict[int, list[_Chosen]] = {}
    for one in chosen:
        if one.dealt.set_number is None:
            documents.append(_document(one, wanted))
        else:
            of_set.setdefault(one.dealt.set_number, []).append(one)
    for members in of_set.values():
        for dropped in range(wanted.shots + 1):
            made = [_document(one, wanted, dropped) for one in members]
            if dropped == wanted.shots or all(fits(document.options) for document in made):
                documents += made
                break
    return documents


def _document(chosen: _Chosen, wanted: _Wanted, dropped: int = 0) -> Document:
    """Lay a row out as lm-eval does, without the first `dropped` of its demonstrations."""
    member = wanted.member
    sampler = _DrawnSampler()
    sampler.drawn = chosen.shown[dropped:]
    member.sampler = sampler
    if member.config.task in BARE_DEMONSTRATION_TASKS:
        bare = wanted.protocol.bare_continuations
        member.fewshot_cfg.target_delimiter = "" if bare else member.config.target_delimiter
    try:
        options, gold = _options_and_gold(member, chosen.row, len(sampler.drawn))
    except ROW_ERRORS as error:
        raise InputError(
            f"task {member.config.task}, row {chosen.place + 1} of its {wanted.part} rows does not have the expected "
            f"fields ({error!r})"
        ) from error
    return Document(
        index=wanted.offset + chosen.place,
        options=options,
        gold=gold,
        cluster=chosen.cluster,
        demonstrations=chosen.dealt.places[dropped:],
        unit=chosen.unit,
        member=wanted.number,
        row=chosen.row,
        set_number=chosen.dealt.set_number,
        dropped=dropped,
    )


def _options_and_gold(
    member: ConfigurableTask, row: dict[str, Any], shots: int
) -> tuple[tuple[tuple[str, str], ...], tuple[bool, ...]]:
    """Return a row's (context, continuation) texts and which are right, from lm-eval's definition."""
    context = member.fewshot_context(row, shots)
    requests = member.construct_requests(row, context)
    listed = requests if isinstance(requests, list) else [requests]
    options = tuple((request.args[0], request.args[1]) for request in listed)
    gold_options = (member.config.metadata or {}).get("gold_options")
    if gold_options is not None:
        gold = gold_options(row)
    elif member.OUTPUT_TYPE == "loglikelihood":
        gold = [0]
    else:
        gold = member.doc_to_text(row) if member.multiple_input else member.doc_to_target(row)
        if isinstance(gold, str):
            gold = member.doc_to_choice(row).index(gold)
    right = gold if isinstance(gold, list) else [gold]
    if not right or not all(isinstance(place, int) and 0 <= place < len(options) for place in right):
        raise ValueError(f"no right option among {len(options)}: label {gold!r}")
    return options, tuple(place in right for place in range(len(options)))


def open_task(name: str, data_dir: Path | None) -> OpenTask:
    """Load a task's definition and rows: a plain name, `lm-eval:NAME` or a path to JSON lines.

    Raises InputError naming what is not known, missing or malformed.
    """
    return OpenTask(name, [task for _, task in load_members(name, data_dir)])
