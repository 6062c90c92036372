"""Scores of every head from one pass over random sequences: what is asked, what is kept, and one layer's part of it.

Axis letters: S sequences, L layers, H heads, N tokens of a micro-batch, T tokens of a row, D width, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.copying import (
    DEFAULT_COPYING,
    CopyingForm,
    HeadLogits,
    copying_eigenvalues,
    copying_scores,
)
from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.patterns import QUERY_ROWS, pattern_scores, patterns
from lowmem_icl.engine.schedule import FLOAT_BYTES, BlockRow
from lowmem_icl.model.families import Skeleton
from lowmem_icl.model.layer import Attended, DecoderLayer
from lowmem_icl.model.streamed import VOCABULARY_BLOCK, StreamedModel
from lowmem_icl.rows import Row

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HeadQuestions:
    """Rows to score heads on: sequence s has `base_tokens[s]` different tokens four times over, and a row without repeats.

    `form`: how copying is scored; `spurious`: with the reference code's extra entries of prefix matching.
    """

    repeated: tuple[Row, ...]
    unrepeated: tuple[Row, ...]
    base_tokens: tuple[int, ...]
    form: CopyingForm = DEFAULT_COPYING
    spurious: bool = False

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows: the repeated ones, then the others."""
        return self.repeated + self.unrepeated

    def goes_on(self, place: int) -> bool:
        """Tell whether a row changes from layer to layer; the reference's copying feeds every layer the embeddings."""
        return place < len(self.repeated) or not self.form.own_token


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores by sequence, [S, L, H], and of the weights alone, [L, H]; NaN where still to be made.

    `finished` [2S]: which rows are.
    """

    prefix_matching: Values
    previous_token: Values
    duplicate_token: Values
    copying: Values
    copying_eigenvalues: Values
    finished: NDArray[np.bool_]

    @classmethod
    def unmade(cls, sequences: int, layers: int, heads: int) -> "HeadScores":
        """Return scores that are all still to be made."""
        by_sequence = (sequences, layers, heads)
        return cls(
            np.full(by_sequence, np.nan), np.full(by_sequence, np.nan), np.full(by_sequence, np.nan),
            np.full(by_sequence, np.nan), np.full((layers, heads), np.nan), np.zeros(2 * sequences, dtype=np.bool_),
        )  # fmt: skip

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Journey:
    """Rows on their way: places [R] among all rows, residuals [N, D] one row after the other, the next layer as [1]."""

    places: NDArray[np.int64]
    residuals: NDArray[np.float32]
    next_layer: NDArray[np.int64]

    @classmethod
    def of(cls, block: Sequence[BlockRow], width: int) -> "Journey":
        """Return the journey of a block of rows before it begins; a row's place stands as its job."""
        tokens = sum(len(member.row) for member in block)
        return cls(
            np.array([member.job for member in block], dtype=np.int64),
            np.zeros((tokens, width), dtype=np.float32),
            np.zeros(1, dtype=np.int64),
        )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class HeadReader:
    """Turns what the attention of one layer after the other saw into scores."""

    def __init__(self, model: StreamedModel, questions: HeadQuestions, results: HeadScores) -> None:
        self._model, self._questions, self._results = model, questions, results
        self._products: Tensor | None = None
        self._logits: HeadLogits | None = None

    def enter(self, number: int, layer: DecoderLayer) -> None:
        """Take up a layer's weights; must come before its rows."""
        # The last layer's go before this one's are made.
        self._logits = None
        scores = self._results.copying_eigenvalues[number]
        if np.isnan(scores).any():
            if self._products is None:
                self._products = self._model.token_products()
            scores[:] = copying_eigenvalues(layer, self._products, len(scores)).numpy()
        self._logits = HeadLogits(self._model, layer, self._questions.form)

    def read(self, number: int, members: Sequence[BlockRow], attended: Attended) -> None:
        """Score the rows of a micro-batch, whose places stand as their jobs, in the layer taken up last."""
        assert attended.queries is not None
        assert self._logits is not None
        sequences, form = len(self._questions.base_tokens), self._questions.form
        outputs = attended.values if form.own_token else self._by_head(attended.z)
        start, copied = 0, []
        for member in members:
            here = slice(start, start + len(member.row))
            start = here.stop
            queries, keys = attended.queries[:, here], attended.keys[:, here]
            if member.job < sequences:
                self._score_patterns(number, member.job, queries, keys)
            else:
                copied.append((member, queries, keys, outputs[:, here]))
        totals: Sequence[Tensor | None] = [None] * len(copied)
        if form.softmax and copied:
            totals = self._logits.totals([of_row for _, _, _, of_row in copied])
        for (member, queries, keys, of_row), total in zip(copied, totals, strict=True):
            directions = self._model.token_outputs(torch.from_numpy(member.row.tokens))
            scores = copying_scores(self._logits, directions, queries, keys, of_row, total)
            self._results.copying[member.job - sequences, number] = scores.cpu().numpy()

    def _score_patterns(self, number: int, sequence: int, queries: Tensor, keys: Tensor) -> None:
        questions, results = self._questions, self._results
        scores = pattern_scores(
            patterns(queries, keys), questions.base_tokens[sequence], spurious=questions.spurious
        )
        for name, values in scores._asdict().items():
            getattr(results, name)[sequence, number] = values.cpu().numpy()

    def _by_head(self, z: Tensor) -> Tensor:
        """Return z [N, D] as [H, N, d]."""
        return z.unflatten(1, (self._model.skeleton.heads, -1)).transpose(0, 1)


def heads_cost(
    tokens: int,
    copied: int,
    skeleton: Skeleton,
    form: CopyingForm,
    micro_batch_tokens: int,
    layers_read: float,
) -> SweepCost:
    """Return what scoring heads takes on so many tokens, of which so many stand in rows without repeats.

    Products in floating point count as places at which the vocabulary is read.
    """
    layers, width, vocabulary = skeleton.layers, skeleton.width, skeleton.vocabulary
    per_product = width * width / (vocabulary * skeleton.embedding_width)
    # Every candidate through the output projection; the eigenvalues' products; the vocabulary's with itself, once.
    answers = per_product * (layers * (copied + 2 * width) + vocabulary)
    if form.softmax:
        answers += layers * copied * (1 + width / micro_batch_tokens)
    finished = (layers - 1) * tokens
    return SweepCost(layers * tokens, finished, finished, answers=answers, layers_read=layers_read)


def reading_bytes(skeleton: Skeleton, longest_tokens: int, form: CopyingForm) -> int:
    """Return what scoring heads holds at the widest moment, beside a micro-batch's queries, keys, values and z."""
    width, heads = skeleton.width, skeleton.heads
    # The output projection and what is made of it, the values' projection, the vocabulary's products.
    weights = 5 * width * width + 2 * VOCABULARY_BLOCK * width
    # A row's candidates through the projection; scores of a block of queries and what is made of them.
    of_row = 4 * longest_tokens * width + 5 * QUERY_ROWS * heads * longest_tokens
    if form.softmax:
        of_row += 4 * QUERY_ROWS * heads * VOCABULARY_BLOCK + 2 * VOCABULARY_BLOCK * width
    return FLOAT_BYTES * (weights + of_row)
