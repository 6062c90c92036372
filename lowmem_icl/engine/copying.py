"""Copying: whether what a head writes makes the token it attends to more likely; and from weights alone.

Axis letters: H heads, T tokens of a row, Q queries of a block, K tokens up to a query, C tokens asked for, d
head width, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_icl.engine.patterns import RowStates, attention_logits, query_blocks
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.model.vocabulary import LOWEST_EXPONENT


@dataclass(frozen=True)
class CopyingForm:
    """How a head's output becomes scores of tokens.

    final_norm: through the model's last norm, as if it stood alone; softmax: over the whole vocabulary,
    before the mean is taken off; bias: with the whole bias of the output projection; own_token: the reference
    code's: what the head makes of the token at a position itself instead of what it attends to there, and
    embeddings fed to every layer.
    """

    final_norm: bool = False
    softmax: bool = False
    bias: bool = False
    own_token: bool = False


DEFAULT_COPYING = CopyingForm()
REFERENCE_COPYING = CopyingForm(softmax=True, bias=True, own_token=True)


class HeadLogits:
    """What the heads of one layer write, as logits of tokens: z or values, through the output projection."""

    def __init__(self, model: StreamedModel, layer: DecoderLayer, form: CopyingForm) -> None:
        self._model, self._form = model, form
        heads = model.skeleton.heads
        # [D, H, d]
        self._weight = layer.output_weight.unflatten(1, (heads, -1))
        self._bias = layer.output_bias if form.bias else None
        norm = model.vocabulary.final_norm if form.final_norm else None
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None
        if norm is not None:
            self._scale, self._shift, self._epsilon = norm.scale, norm.shift, norm.epsilon
            if norm.centred:
                # A norm takes the mean off; taken off the weights, no output needs to be made for it.
                self._weight = self._weight - self._weight.mean(0)
            by_head = self._weight.permute(1, 2, 0)
            self._squares = by_head @ by_head.transpose(1, 2) / len(self._weight)
            self._crossed: Tensor | None = None
            self._bias_square = 0.0
            if self._bias is not None:
                if norm.centred:
                    self._bias = self._bias - self._bias.mean()
                self._crossed = by_head @ self._bias / len(self._bias)
                self._bias_square = float(self._bias.square().mean())

    def readers(self, directions: Tensor) -> "_Readers":
        """Return what maps heads' outputs to logits of tokens; directions: [C, D], what reads these off."""
        scaled = directions if self._scale is None else directions * self._scale
        by_head = (scaled @ self._weight.flatten(1)).unflatten(1, self._weight.shape[1:]).permute(1, 2, 0)
        offset = None if self._bias is None else scaled @ self._bias
        shift = None if self._shift is None else directions @ self._shift
        return _Readers(by_head, offset, shift)

    def deviations(self, outputs: Tensor) -> Tensor | None:
        """Return the reciprocal deviation [H, T] of what heads write from outputs [H, T, d]; None: none."""
        if self._scale is None:
            return None
        variance = ((outputs @ self._squares) * outputs).sum(-1) + self._bias_square
        if self._crossed is not None:
            variance += 2 * (outputs @ self._crossed[:, :, None])[..., 0]
        return (variance + self._epsilon).rsqrt_()

    def totals(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the logarithm of the exponentials of all tokens' logits summed, [H, T], of outputs [H, T, d]
        each.

        The vocabulary goes by in blocks, all rows under each.
        """
        deviations = [self.deviations(outputs) for outputs in rows]
        largest = [outputs.new_full(outputs.shape[:2], float("-inf")) for outputs in rows]
        summed = [outputs.new_zeros(outputs.shape[:2]) for outputs in rows]
        for directions in self._model.vocabulary.vocabulary_outputs():
            readers = self.readers(directions)
            for outputs, deviation, high, total in zip(rows, deviations, largest, summed, strict=True):
                for span in query_blocks(outputs.shape[1]):
                    logits = readers.logits(outputs[:, span], _part(deviation, span))
                    higher = torch.maximum(high[:, span], logits.amax(-1))
                    powers = logits.sub_(higher[..., None]).clamp_(min=LOWEST_EXPONENT).exp_().sum(-1)
                    total[:, span] = total[:, span] * (high[:, span] - higher).exp_() + powers
                    high[:, span] = higher
        return [high + total.log() for high, total in zip(largest, summed, strict=True)]


@dataclass(frozen=True, eq=False)
class _Readers:
    """by_head [H, d, C], offset [C] before the norm's division, shift [C] after it."""

    by_head: Tensor
    offset: Tensor | None
    shift: Tensor | None

    def logits(self, outputs: Tensor, deviation: Tensor | None, tokens: int | None = None) -> Tensor:
        """Return the logits of the first so many tokens, [H, Q, C], for outputs [H, Q, d]."""
        logits = outputs @ self.by_head[:, :, :tokens]
        if self.offset is not None:
            logits += self.offset[:tokens]
        if deviation is not None:
            logits *= deviation[..., None]
        if self.shift is not None:
            logits += self.shift[:tokens]
        return logits


def _part(values: Tensor | None, span: slice) -> Tensor | None:
    return None if values is None else values[:, span]


def copying_scores(
    head_logits: HeadLogits,
    directions: Tensor,
    seen: RowStates,
    outputs: Tensor,
    totals: Tensor | None = None,
) -> Tensor:
    """Return how much each head copies on a row of different tokens, [H] in float64; 0 to 1.

    At position j the tokens up to it are candidates. Their logits u, off what the head writes there, become
    ReLU(u − mean u), and the score is the share of the token that the head attends to most; 0 where nothing
    is above the mean. Averaged over j ≥ 1 (Bansal et al. 2023, appendix A.4, algorithm 2).

    directions: [T, D], what reads the row's tokens off a residual; outputs [H, T, d]: z by head; totals [H,
    T]: of `HeadLogits.totals`, where u are to be probabilities.
    """
    readers = head_logits.readers(directions)
    deviation = head_logits.deviations(outputs)
    tokens = outputs.shape[1]
    total = torch.zeros(len(outputs), dtype=torch.float64, device=outputs.device)
    for span in query_blocks(tokens):
        most_attended = attention_logits(seen, span).argmax(-1, keepdim=True)
        scores = readers.logits(outputs[:, span], _part(deviation, span), span.stop)
        if totals is not None:
            scores.sub_(totals[:, span, None]).exp_()
        candidates = torch.arange(span.start + 1, span.stop + 1, device=scores.device)
        # Candidates of a query end at its own position.
        mean = scores.tril_(span.start).sum(-1, keepdim=True) / candidates[:, None]
        above = scores.sub_(mean).relu_().tril_(span.start)
        share = above.gather(-1, most_attended)[..., 0] / above.sum(-1)
        share = share.double().nan_to_num_(nan=0.0)
        total += share[:, 1:].sum(1) if span.start == 0 else share.sum(1)
    return total / (tokens - 1)


def copying_eigenvalues(layer: DecoderLayer, token_products: Tensor, heads: int) -> Tensor:
    """Return Σ Re λ / Σ |λ| over the eigenvalues λ of every head's circuit from tokens to logits, [H] in
    float64.

    1 where a token raises its own logit whatever is mixed, −1 where it lowers it (Elhage et al. 2021; Olsson
    et al. 2022). The circuit U W_O W_V Eᵀ is vocabulary by vocabulary; its eigenvalues other than 0 are those
    of W_V (Eᵀ U) W_O, [d, d]. Weights alone, without norms. token_products: Eᵀ U, [D, D]. Infinity where a
    circuit is not finite.
    """
    circuits = []
    for head in range(heads):
        # One at a time: all heads' would be three more tensors of the size of the products.
        entering, leaving = layer.head_weights(head)
        circuits.append((entering @ token_products) @ leaving)
    every = torch.stack(circuits).cpu().double()
    is_lost = ~every.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvals(every.masked_fill(is_lost[:, None, None], 0.0))
    return (values.real.sum(-1) / values.abs().sum(-1)).masked_fill(is_lost, float("inf"))
