"""Scores of every head from one pass over random sequences: what is asked, kept, and done per layer.

Axis letters: S sequences, L layers, H heads, N tokens of a micro-batch, T tokens of a row, D width, d head
width.
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
from lowmem_icl.engine.patterns import QUERY_ROWS, RowStates, pattern_scores, patterns
from lowmem_icl.engine.schedule import FLOAT_BYTES, BlockRow
from lowmem_icl.model.layer import AttentionOutput, DecoderLayer
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.model.tables import VOCABULARY_BLOCK
from lowmem_icl.rows import Row

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HeadQuestions:
    """Rows to score heads on: of every sequence one with repeats and one without.

    Sequence s has `base_tokens[s]` different tokens, four times over in its repeated row. `form`: how copying
    is scored; `spurious`: with the reference code's extra entries of prefix matching.
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

    def continues(self, index: int) -> bool:
        """Tell whether a row goes through the layers; else each layer is fed its embeddings."""
        return index < len(self.repeated) or not self.form.own_token


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores by sequence, [S, L, H], and of the weights alone, [L, H].

    `finished` [2S]: which rows are scored in all layers; `weights_scored` [L]: which layers have their
    copying_eigenvalues. What is not made yet is NaN, and so is what is made of values that are not finite.
    """

    prefix_matching: Values
    previous_token: Values
    duplicate_token: Values
    copying: Values
    copying_eigenvalues: Values
    finished: NDArray[np.bool_]
    weights_scored: NDArray[np.bool_]

    @classmethod
    def empty(cls, sequences: int, layers: int, heads: int) -> "HeadScores":
        """Return scores of which none is made."""
        by_sequence = (sequences, layers, heads)
        return cls(
            np.full(by_sequence, np.nan), np.full(by_sequence, np.nan), np.full(by_sequence, np.nan),
            np.full(by_sequence, np.nan), np.full((layers, heads), np.nan),
            np.zeros(2 * sequences, dtype=np.bool_), np.zeros(layers, dtype=np.bool_),
        )  # fmt: skip

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class PassCheckpoint:
    """Rows between two layers, from which a stopped pass continues.

    row_indices [R]: which of all rows they are; residuals [N, D], one row after the other; next_layer [1].
    """

    row_indices: NDArray[np.int64]
    residuals: NDArray[np.float32]
    next_layer: NDArray[np.int64]

    @classmethod
    def of(cls, block: Sequence[BlockRow], width: int) -> "PassCheckpoint":
        """Return the checkpoint of a block before the first layer; a row's index stands as its job."""
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
    """Turns what the attention of one layer after the other saw into scores; `layer` is the one it is at."""

    def __init__(self, model: StreamedModel, questions: HeadQuestions, results: HeadScores) -> None:
        self.questions = questions
        self._model, self._results = model, results
        self._products: Tensor | None = None
        self._logits: HeadLogits | None = None

    def enter(self, number: int, layer: DecoderLayer) -> None:
        """Take up a layer's weights; must come before its rows."""
        self.number, self.layer = number, layer
        # The last layer's go before this one's are made.
        self._logits = None
        results = self._results
        if not results.weights_scored[number]:
            if self._products is None:
                self._products = self._model.vocabulary.token_products()
            heads = self._model.skeleton.heads
            results.copying_eigenvalues[number] = copying_eigenvalues(layer, self._products, heads).numpy()
            results.weights_scored[number] = True
        self._logits = HeadLogits(self._model, layer, self.questions.form)

    def read(self, members: Sequence[BlockRow], attention: AttentionOutput) -> None:
        """Score the rows of a micro-batch, whose indices stand as their jobs, in the layer it is at."""
        assert attention.queries is not None
        assert self._logits is not None
        sequences, form = len(self.questions.base_tokens), self.questions.form
        keys_by_head = self._by_query_head(attention.keys)
        outputs = self._by_query_head(attention.values) if form.own_token else self._by_head(attention.z)
        start, copied = 0, []
        for member in members:
            here = slice(start, start + len(member.row))
            start = here.stop
            seen = RowStates(attention.queries[:, here], keys_by_head[:, here], attention.form)
            if member.job < sequences:
                self._score_patterns(member.job, seen)
            else:
                copied.append((member, seen, outputs[:, here]))
        totals: Sequence[Tensor | None] = [None] * len(copied)
        if form.softmax and copied:
            totals = self._logits.totals([row_outputs for _, _, row_outputs in copied])
        for (member, seen, row_outputs), total in zip(copied, totals, strict=True):
            directions = self._model.vocabulary.token_outputs(torch.from_numpy(member.row.tokens))
            scores = copying_scores(self._logits, directions, seen, row_outputs, total)
            self._results.copying[member.job - sequences, self.number] = scores.cpu().numpy()

    def _score_patterns(self, sequence: int, seen: RowStates) -> None:
        questions, results = self.questions, self._results
        scores = pattern_scores(patterns(seen), questions.base_tokens[sequence], spurious=questions.spurious)
        for name, values in scores._asdict().items():
            getattr(results, name)[sequence, self.number] = values.cpu().numpy()

    def _by_query_head(self, states: Tensor) -> Tensor:
        """Return keys or values [G, N, d] for every query head, [H, N, d]."""
        return states.repeat_interleave(self._model.skeleton.heads // len(states), 0)

    def _by_head(self, z: Tensor) -> Tensor:
        """Return z [N, Z] as [H, N, d]."""
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

    Products in floating point count as answers, at which the vocabulary is read.
    """
    layers, width, vocabulary = skeleton.layers, skeleton.width, skeleton.vocabulary
    per_product = width * skeleton.attention_width / (vocabulary * skeleton.embedding_width)
    # Candidates through the output projection; the eigenvalues' products; the vocabulary with itself.
    answers = per_product * (layers * (copied + 2 * width) + vocabulary)
    if form.softmax:
        answers += layers * copied * (1 + width / micro_batch_tokens)
    finished = (layers - 1) * tokens
    return SweepCost(layers * tokens, finished, finished, answers=answers, layers_read=layers_read)


def kept_bytes(skeleton: Skeleton, form: CopyingForm) -> int:
    """Return the bytes that scoring heads holds all the while: the vocabulary's products, and the output
    projection of the layer in work.
    """
    # Where a norm's scale or mean is in it, it is made from another of its size.
    projections = 2 if form.final_norm or skeleton.family.attention_norm is not None else 1
    return FLOAT_BYTES * skeleton.width * (skeleton.width + projections * skeleton.attention_width)


def reading_bytes(skeleton: Skeleton, longest_tokens: int, form: CopyingForm) -> int:
    """Return the bytes that scoring heads holds at its peak, on top of a micro-batch's q, k, v and z."""
    width, heads = max(skeleton.width, skeleton.attention_width), skeleton.heads
    # A head's two projections; all circuits, at last as complex numbers; blocks of the vocabulary's tables.
    weights = 4 * width * skeleton.head_width + 4 * VOCABULARY_BLOCK * width
    weights += 8 * heads * skeleton.head_width**2
    # A row's candidates through the projection; scores of a block of queries and what is made of them.
    row = 4 * longest_tokens * width + 5 * QUERY_ROWS * heads * longest_tokens
    if form.final_norm:
        # The projection's square by head.
        weights += heads * skeleton.head_width**2
    if form.softmax:
        row += 4 * QUERY_ROWS * heads * VOCABULARY_BLOCK + 2 * VOCABULARY_BLOCK * width
    return kept_bytes(skeleton, form) + FLOAT_BYTES * (weights + row)
