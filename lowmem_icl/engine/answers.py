"""Places where answers are read, of many rows and variants, for few large calls of the unembedding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.model.streamed import READ_ROWS, StreamedModel
from lowmem_icl.rows import Row


@dataclass(frozen=True, eq=False)
class Scores:
    """Option scores of one job: logprobs [M, O] in nats, summed in float64; greedy [M, O], for M masks, O options.

    A score that is still to be made is NaN.
    """

    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]

    @classmethod
    def unmade(cls, masks: int, options: int) -> "Scores":
        """Return scores that are all still to be made."""
        return cls(np.full((masks, options), np.nan), np.zeros((masks, options), dtype=np.bool_))

    def missing(self, row: Row) -> NDArray[np.bool_]:
        """Return under which masks [M] the row is still to be scored."""
        return np.asarray(np.isnan(self.logprobs[:, row.answered]).any(1))


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Hidden states [V, R, D] of a row under `masks` [V]."""

    scores: Scores
    masks: NDArray[np.int64]
    row: Row
    hidden: Tensor

    @property
    def reads(self) -> int:
        """Places of one variant."""
        return self.hidden.shape[1]

    @property
    def places(self) -> int:
        """Places of all variants."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    def split(self, variants: int) -> tuple["_Waiting", "_Waiting"]:
        """Return the first so many variants, and the others."""
        return tuple(
            replace(self, masks=self.masks[part], hidden=self.hidden[part])
            for part in (slice(None, variants), slice(variants, None))
        )  # type: ignore[return-value]


class AnswerReader:
    """Collects hidden states at the places where rows are read, and turns them into scores, many at a time."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._waiting: list[_Waiting] = []
        self._places = 0

    def add(self, scores: Scores, masks: NDArray[np.int64], row: Row, hidden: Tensor) -> None:
        """Take a row's hidden states [V, R, D] under `masks` [V], places in the job's list; they count to `scores`."""
        self._waiting.append(_Waiting(scores, masks, row, hidden))
        self._places += self._waiting[-1].places
        if self._places >= READ_ROWS:
            # A whole number of products of the unembedding; a variant is never split.
            self._read(self._first(self._places // self._model.head_rows * self._model.head_rows))

    def flush(self) -> None:
        """Turn all that is waiting into option scores."""
        self._read(self._first(self._places))

    def _first(self, most: int) -> list[_Waiting]:
        """Take away the first variants, of at most so many places together."""
        taken: list[_Waiting] = []
        while self._waiting:
            first = self._waiting[0]
            fitting = min(len(first.masks), most // first.reads)
            if fitting < len(first.masks):
                head, self._waiting[0] = first.split(fitting)
                taken += [head] if fitting else []
                break
            taken.append(self._waiting.pop(0))
            most -= first.places
        self._places -= sum(waiting.places for waiting in taken)
        return taken

    def _read(self, members: Sequence[_Waiting]) -> None:
        if not members:
            return
        read_at, targets, ends = _questions(members)
        hidden = torch.cat([member.hidden.flatten(0, 1) for member in members])
        logprobs, greedy = self._model.log_probabilities(
            hidden, torch.from_numpy(read_at).to(hidden.device), torch.from_numpy(targets).to(hidden.device)
        )
        of_rows = np.split(logprobs.double().cpu().numpy(), ends)
        greedy_of_rows = np.split(greedy.cpu().numpy(), ends)
        for member, values, flags in zip(members, of_rows, greedy_of_rows, strict=True):
            shape = (len(member.masks), -1)
            # An option's answers stand together; of every option the first.
            starts = np.unique(member.row.options, return_index=True)[1]
            place = np.ix_(member.masks, member.row.answered)
            member.scores.greedy[place] = np.logical_and.reduceat(flags.reshape(shape), starts, axis=1)
            # Last: that it is a number says that the score is made.
            member.scores.logprobs[place] = np.add.reduceat(values.reshape(shape), starts, axis=1)


def _questions(
    members: Sequence[_Waiting],
) -> tuple[NDArray[np.int64], NDArray[np.int64], Sequence[int]]:
    """Return for all answers the place read and the token asked for, and where each row's answers end."""
    places, targets, first = [], [], 0
    for member in members:
        variants = len(member.masks)
        of_answer = np.searchsorted(member.row.reads, member.row.read_at)
        places.append((first + np.arange(variants)[:, None] * member.reads + of_answer).ravel())
        targets.append(np.tile(member.row.targets, variants))
        first += member.places
    ends = np.cumsum([len(of_row) for of_row in places])[:-1]
    return np.concatenate(places), np.concatenate(targets), ends.tolist()
