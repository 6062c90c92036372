"""Answers of many rows and variants, read together in few large calls of the unembedding."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.model.vocabulary import READ_ROWS
from lowmem_icl.rows import Integers, Row


@dataclass(frozen=True, eq=False)
class Scores:
    """Option scores of one job under M masks, O options: what is scored, and what is still to be.

    logprobs [M, O]: nats, summed in float64; greedy [M, O]: whether an option is what the model would write;
    scored [M, O]: which of both are made; NaN among them is of rows that met what is not finite.
    """

    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]
    scored: NDArray[np.bool_]

    @classmethod
    def empty(cls, masks: int, options: int) -> "Scores":
        """Return scores of which none is made."""
        shape = (masks, options)
        return cls(np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_))

    def missing(self, row: Row) -> NDArray[np.bool_]:
        """Return under which masks [M] the row is still to be scored."""
        return np.asarray(~self.scored[:, row.answered].all(1))

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class PendingAnswers:
    """Hidden states [V, R, D] of a row under `masks` [V], indices in its job's list, not scored yet."""

    scores: Scores
    masks: Integers
    row: Row
    hidden: Tensor

    @property
    def reads(self) -> int:
        """How many tokens are read per variant."""
        return self.hidden.shape[1]

    @property
    def all_reads(self) -> int:
        """How many tokens are read in all."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    def split(self, variants: int) -> tuple["PendingAnswers", "PendingAnswers"]:
        """Return the first so many variants, and the others."""
        first, rest = (
            replace(self, masks=self.masks[part], hidden=self.hidden[part])
            for part in (slice(None, variants), slice(variants, None))
        )
        return first, rest


class AnswerReader:
    """Collects hidden states where rows are read, and turns them into scores, many at a time."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._pending: list[PendingAnswers] = []
        self._reads = 0

    def add(self, pending: PendingAnswers) -> None:
        """Take a row's hidden states, and score what fills whole products of the unembedding."""
        self._pending.append(pending)
        self._reads += pending.all_reads
        if self._reads >= READ_ROWS:
            # A variant is never split.
            rows = self._model.vocabulary.head_rows
            self._read(self._take(self._reads // rows * rows))

    def flush(self) -> None:
        """Score all that is pending."""
        self._read(self._take(self._reads))

    def _take(self, most: int) -> list[PendingAnswers]:
        """Take away the first variants, of read at most so often together."""
        taken: list[PendingAnswers] = []
        while self._pending:
            first = self._pending[0]
            fitting = min(len(first.masks), most // first.reads)
            if fitting < len(first.masks):
                head, self._pending[0] = first.split(fitting)
                taken += [head] if fitting else []
                break
            taken.append(self._pending.pop(0))
            most -= first.all_reads
        self._reads -= sum(pending.all_reads for pending in taken)
        return taken

    def _read(self, members: Sequence[PendingAnswers]) -> None:
        if not members:
            return
        read_at, targets, ends = _questions(members)
        hidden = torch.cat([member.hidden.flatten(0, 1) for member in members])
        logprobs, greedy = self._model.vocabulary.log_probabilities(
            hidden, torch.from_numpy(read_at).to(hidden.device), torch.from_numpy(targets).to(hidden.device)
        )
        row_logprobs = np.split(logprobs.double().cpu().numpy(), ends)
        row_greedy = np.split(greedy.cpu().numpy(), ends)
        for member, values, flags in zip(members, row_logprobs, row_greedy, strict=True):
            shape = (len(member.masks), -1)
            # An option's answers stand together; of every option the first.
            starts = np.unique(member.row.options, return_index=True)[1]
            where = np.ix_(member.masks, member.row.answered)
            scores = member.scores
            scores.greedy[where] = np.logical_and.reduceat(flags.reshape(shape), starts, axis=1)
            scores.logprobs[where] = np.add.reduceat(values.reshape(shape), starts, axis=1)
            # Last: a stop before this line makes the row again.
            scores.scored[where] = True


def _questions(members: Sequence[PendingAnswers]) -> tuple[Integers, Integers, Sequence[int]]:
    """Return where all answers are read, the tokens asked for, and where each row's answers end."""
    read_at, targets, first = [], [], 0
    for member in members:
        variants = len(member.masks)
        read = np.searchsorted(member.row.reads, member.row.read_at)
        read_at.append((first + np.arange(variants)[:, None] * member.reads + read).ravel())
        targets.append(np.tile(member.row.targets, variants))
        first += member.all_reads
    ends = np.cumsum([len(row_reads) for row_reads in read_at])[:-1]
    return np.concatenate(read_at), np.concatenate(targets), ends.tolist()
