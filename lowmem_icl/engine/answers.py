"""Places where answers are read, of many rows and variants, for few large calls of the unembedding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.model.streamed import StreamedModel
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
    scores: Scores
    masks: NDArray[np.int64]
    row: Row
    hidden: Tensor


class AnswerReader:
    """Collects hidden states [V, R, D] at the R places where rows are read, and turns them into scores."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._waiting: list[_Waiting] = []
        self._places = 0

    def add(self, scores: Scores, masks: NDArray[np.int64], row: Row, hidden: Tensor) -> None:
        """Take a row's hidden states under `masks` [V], places in the job's list; they count to `scores`."""
        self._waiting.append(_Waiting(scores, masks, row, hidden))
        self._places += hidden.shape[0] * hidden.shape[1]
        if self._places >= self._model.read_rows:
            self.flush()

    def flush(self) -> None:
        """Turn what is waiting into option scores."""
        if not self._waiting:
            return
        read_at, targets, ends = self._questions()
        hidden = torch.cat([waiting.hidden.flatten(0, 1) for waiting in self._waiting])
        logprobs, greedy = self._model.log_probabilities(
            hidden, torch.from_numpy(read_at).to(hidden.device), torch.from_numpy(targets).to(hidden.device)
        )
        of_rows = np.split(logprobs.double().cpu().numpy(), ends)
        greedy_of_rows = np.split(greedy.cpu().numpy(), ends)
        for waiting, values, flags in zip(self._waiting, of_rows, greedy_of_rows, strict=True):
            shape = (waiting.hidden.shape[0], -1)
            # An option's answers stand together; of every option the first.
            starts = np.unique(waiting.row.options, return_index=True)[1]
            place = np.ix_(waiting.masks, waiting.row.answered)
            waiting.scores.greedy[place] = np.logical_and.reduceat(flags.reshape(shape), starts, axis=1)
            # Last: that it is a number says that the score is made.
            waiting.scores.logprobs[place] = np.add.reduceat(values.reshape(shape), starts, axis=1)
        self._waiting.clear()
        self._places = 0

    def _questions(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Sequence[int]]:
        """Return for all answers the place read and the token asked for, and where each row's answers end."""
        places, targets, first = [], [], 0
        for waiting in self._waiting:
            variants, reads = waiting.hidden.shape[:2]
            of_answer = np.searchsorted(waiting.row.reads, waiting.row.read_at)
            places.append((first + np.arange(variants)[:, None] * reads + of_answer).ravel())
            targets.append(np.tile(waiting.row.targets, variants))
            first += variants * reads
        ends = np.cumsum([len(of_row) for of_row in places])[:-1]
        return np.concatenate(places), np.concatenate(targets), ends.tolist()
