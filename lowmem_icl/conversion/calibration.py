"""Outlier columns of a store's int8 linears, found once by a clean pass over a fixed text.

The first half of the text decides which input columns are outliers; the second half measures how many large
activations lie outside them. The text goes through the layers as they are converted, so no weight is read
twice.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_icl.model.attention import whole_row
from lowmem_icl.model.int8 import OUTLIER_THRESHOLD, Int8Linear
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.vocabulary import Vocabulary

ROW_TOKENS = 512
FIXED_TEXT = "calibration.txt"


def fixed_text() -> str:
    """Return the bundled text."""
    return files("lowmem_icl.conversion").joinpath(FIXED_TEXT).read_text(encoding="utf-8")


@dataclass(frozen=True)
class CalibrationText:
    """The fixed text as token ids, and the BOS that stands before every row of it, if prompts have one."""

    tokens: Sequence[int]
    bos: int | None = None

    def rows(self, context_tokens: int) -> list[Tensor]:
        """Cut the text into an even number of rows of one length, at most ROW_TOKENS and the context."""
        front = [] if self.bos is None else [self.bos]
        count = len(self.tokens)
        length = min(ROW_TOKENS, context_tokens - len(front), max(1, count // 2))
        pairs = max(1, min(2, count // (2 * length)))
        return [torch.tensor([*front, *self.tokens[length * i : length * (i + 1)]]) for i in range(2 * pairs)]


@dataclass
class CalibrationPass:
    """The fixed text's residuals between two layers, and counts of what was seen so far.

    residuals: per row of the text [T, D]; the first half decides, the second half measures.
    """

    layer: DecoderLayer
    residuals: list[Tensor]
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def start(cls, vocabulary: Vocabulary, rows: Sequence[Tensor]) -> "CalibrationPass":
        """Embed the rows."""
        residuals = [vocabulary.embed(row, torch.arange(len(row))) for row in rows]
        return cls(DecoderLayer(vocabulary.skeleton, "int8", torch.device("cpu")), residuals)

    def columns_of(self, number: int, tensors: Mapping[str, Tensor], *, decide: bool) -> dict[str, Tensor]:
        """Run the text through the next layer, by its number; return the outlier columns of its linears under
        their names in a store.

        With `decide` they are found from the text's first half; else those among the layer's tensors stay.
        The second half counts what lies outside them.
        """
        linears = self.layer.int8_linears
        none = {f"{name}.outlier_columns": torch.empty(0, dtype=torch.int64) for name in linears}
        self.layer.fill(number, none | dict(tensors))
        deciding = len(self.residuals) // 2
        with torch.no_grad():
            if decide:
                self._find_columns(self.residuals[:deciding])
            handles = [linear.register_forward_pre_hook(self._count) for linear in linears.values()]
            measured = [_run(self.layer, row) for row in self.residuals[deciding:]]
            for handle in handles:
                handle.remove()
            # Run again with all columns found: the rows that decided must not depend on their order.
            self.residuals = [_run(self.layer, row) for row in self.residuals[:deciding]] + measured
        columns = {
            f"{name}.outlier_columns": linear.outlier_columns.clone() for name, linear in linears.items()
        }
        self.counts["columns"] += sum(len(found) for found in columns.values())
        return columns

    def _find_columns(self, rows: Sequence[Tensor]) -> None:
        linears = self.layer.int8_linears.values()
        for linear in linears:
            linear.calibrating = True
        for row in rows:
            _run(self.layer, row)
        for linear in linears:
            linear.calibrating = False

    def _count(self, linear: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(linear, Int8Linear)
        large = arguments[0].reshape(-1, arguments[0].shape[-1]).abs() >= OUTLIER_THRESHOLD
        self.counts["activations"] += large.numel()
        self.counts["beyond"] += int(large.sum())
        self.counts["beyond_outside"] += int(large.sum()) - int(large[:, linear.outlier_columns].sum())


def _run(layer: DecoderLayer, residual: Tensor) -> Tensor:
    return layer.run(residual, [whole_row(len(residual))])
