"""Documents of a task: plain records of what is scored, and of what tells their scores apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lowmem_icl.protocols import PromptForm

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

OptionTexts = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Document:
    """A scored row of a task: its options as (context, continuation) texts, in the order of the hub's labels.

    `index`: 0-based index in the split's file; in a group the indices run on through its members. `gold`: a
    flag per option. `cluster`: the passage that intervals cluster by, or the document itself.
    `demonstrations`: indices of the rows shown before it, in prompt order. `unit`: documents of one unit are
    right only together (MultiRC). `set_number`: which of the shared sets of demonstrations it was dealt to,
    None where they are its own; `dropped`: how many of that set were left out so that all its documents fit
    the model's context.
    """

    index: int
    options: OptionTexts
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

    `chance`: expected accuracy of a uniform guess; `majority`: that of always giving the option that is right
    most often; both exact over these documents. `metric`: the task's main metric. `labels`: whose answers
    their demonstrations show, or how their prompts are corrupted.
    """

    task: str
    shots: int
    split: str
    documents: tuple[Document, ...]
    metric: str
    members: "tuple[ConfigurableTask, ...]" = field(repr=False, compare=False)
    labels: PromptForm = "right"

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

        def share_right(option: int) -> float:
            by_unit = self._by_unit(lambda gold: float(any(gold[option : option + 1])))
            return float(np.mean([np.prod(right) for right in by_unit]))

        return max(share_right(option) for option in range(options))

    @cached_property
    def clusters(self) -> list[str]:
        """What intervals cluster by, a name per document: its passage, or the demonstrations it shares.

        Documents whose prompts are the same are one document, however often it is drawn; clusters that share
        one are one cluster. Without demonstrations some tasks have only a few prompts.
        """
        named = [
            document.cluster
            if document.set_number is None
            else f"set {document.member}:{document.set_number}"
            for document in self.documents
        ]
        first_cluster: dict[tuple[tuple[str, str], ...], str] = {}
        merged: dict[str, str] = {}
        for document, name in zip(self.documents, named, strict=True):
            other = _root(merged, first_cluster.setdefault(tuple(document.options), name))
            if (own := _root(merged, name)) != other:
                merged[own] = other
        return [_root(merged, name) for name in named]

    def unrelated_to(self, others: "TaskRows") -> "TaskRows":
        """Return the documents that share no cluster with others of the task and shot count, and are none of
        them.
        """
        both = replace(self, documents=(*others.documents, *self.documents))
        taken = set(both.clusters[: len(others.documents)])
        own = zip(self.documents, both.clusters[len(others.documents) :], strict=True)
        return replace(self, documents=tuple(document for document, cluster in own if cluster not in taken))

    def _by_unit(self, value: Callable[[tuple[bool, ...]], float]) -> list[list[float]]:
        units: dict[str, list[float]] = {}
        for document in self.documents:
            units.setdefault(document.unit, []).append(value(document.gold))
        return list(units.values())


def _root(merged: dict[str, str], name: str) -> str:
    """Return the cluster that a cluster was merged into, if any."""
    while name in merged:
        name = merged[name]
    return name
