"""What is outside the layers at work: tokens into the residual, and the residual into log-probabilities.

Embedding rows are gathered, the unembedding goes by in blocks, and log-softmax is exact over all of them, so
neither table need be in memory. Axis letters: T tokens, C ids, P residuals, A answers, V vocabulary, D width,
E width of a table's row.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from lowmem_icl.model.contents import check_non_layer
from lowmem_icl.model.families.family import NormForm
from lowmem_icl.model.int8 import FIXED_ROWS, matmul_in_fixed_rows
from lowmem_icl.model.reading import read_header
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.tables import VocabularyTable

READ_ROWS = 1024
NARROW_WIDTH = 1024
LOWEST_EXPONENT = -80.0


class Vocabulary:
    """A model's embedding and unembedding, and what stands beside them outside the layers.

    The skeleton is filled with the latter. `in_memory`: whether the tables are held, which changes no result.
    """

    def __init__(
        self, skeleton: Skeleton, non_layer: Path, device: torch.device, *, in_memory: bool = True
    ) -> None:
        self.skeleton, self.device = skeleton, device
        locations = read_header(non_layer)[0]
        names = {skeleton.embedding_name, skeleton.unembedding_name}
        check_non_layer(non_layer, locations, skeleton)
        with safe_open(non_layer, framework="pt") as opened:
            small = {name: opened.get_tensor(name) for name in locations if name not in names}
        skeleton.fill_non_layer(small, device)
        self._tables = {
            name: VocabularyTable(non_layer, locations[name], device, in_memory=in_memory) for name in names
        }
        self._embedding = self._tables[skeleton.embedding_name]
        self._unembedding = self._tables[skeleton.unembedding_name]
        bias = getattr(skeleton.model.get_output_embeddings(), "bias", None)
        self._bias: Tensor | None = None if bias is None else bias.detach()
        self._form = skeleton.logit_form

    def close(self) -> None:
        """Close the tables' files."""
        for table in self._tables.values():
            table.close()

    @property
    def read_bytes(self) -> int:
        """Bytes of tables read from disk so far."""
        return sum(table.read_bytes for table in self._tables.values())

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the residual at the first layer's input, [T, D] in float32, for ids [T] at positions [T]."""
        with torch.no_grad():
            rows = self._embedding.rows(tokens)
            return self.skeleton.family.embed(self.skeleton.model, rows, positions.to(self.device))

    def token_outputs(self, tokens: Tensor) -> Tensor:
        """Return what reads the logits of ids [C] off a residual, final norm left out: [C, D] in float32."""
        with torch.no_grad():
            return self.skeleton.family.token_outputs(self.skeleton.model, self._unembedding.rows(tokens))

    def vocabulary_outputs(self) -> Iterator[Tensor]:
        """Yield `token_outputs` of the whole vocabulary, a block at a time."""
        for _, block in self._unembedding.blocks():
            with torch.no_grad():
                outputs = self.skeleton.family.token_outputs(self.skeleton.model, block)
            yield outputs

    def token_products(self) -> Tensor:
        """Return Σ_v e_v u_vᵀ over the vocabulary, [D, D]: embeddings times what reads their logits."""
        width = self.skeleton.width
        total = torch.zeros(width, width, device=self.device)
        blocks = zip(self._embedding.blocks(), self.vocabulary_outputs(), strict=True)
        with torch.no_grad():
            for (_, rows), outputs in blocks:
                total.addmm_(self.skeleton.family.token_inputs(self.skeleton.model, rows).t(), outputs)
        return total

    @property
    def final_norm(self) -> NormForm | None:
        """The norm before the unembedding; None where the model has none."""
        return self.skeleton.final_norm()

    @property
    def head_rows(self) -> int:
        """How many residuals go through the unembedding in one product."""
        return head_rows(self.skeleton.width)

    def log_probabilities(self, residual: Tensor, read_at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability (nats, float32) of each target and whether it is the most likely token,
        [A].

        residual: [P, D] after the last layer; answer a is targets[a] predicted at residual[read_at[a]].
        """
        with torch.no_grad():
            hidden = self.skeleton.before_head(residual)
            logprobs = residual.new_empty(len(targets))
            greedy = torch.empty(len(targets), dtype=torch.bool, device=residual.device)
            for part, answers in _parts(len(hidden), read_at):
                logits, largest, total = self._normaliser(
                    hidden[part], read_at[answers] - part.start, targets[answers]
                )
                logprobs[answers] = logits - total
                greedy[answers] = logits >= largest
        return logprobs, greedy

    def _logits(self, products: Tensor, start: int) -> Tensor:
        """Turn products with a block of the unembedding, from word `start` on, into logits, in place."""
        if self._bias is not None:
            products += self._bias[start : start + products.shape[1]]
        if self._form.scale != 1.0:
            products *= self._form.scale
        if self._form.softcap is not None:
            products.div_(self._form.softcap).tanh_().mul_(self._form.softcap)
        return products

    def _normaliser(self, hidden: Tensor, read_at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each answer's logit, and the largest and log-sum-exp of all logits where it is read, [A]."""
        rows = self.head_rows
        filled = pad(hidden, (0, 0, 0, -len(hidden) % rows))
        largest = hidden.new_full((len(filled),), float("-inf"))
        summed = hidden.new_zeros(len(filled))
        target_logits = hidden.new_zeros(len(targets))
        for start, block in self._unembedding.blocks():
            in_block = ((targets >= start) & (targets < start + len(block))).nonzero()[:, 0]
            for first in range(0, len(filled), rows):
                part = slice(first, first + rows)
                # All of one shape, so that a row's result does not depend on how many come with it.
                logits = self._logits(filled[part] @ block.t(), start)
                answers = in_block[(read_at[in_block] >= first) & (read_at[in_block] < first + rows)]
                target_logits[answers] = logits[read_at[answers] - first, targets[answers] - start]
                higher = torch.maximum(largest[part], logits.amax(1))
                # Exponentials too small for a normal number take many times as long, and add nothing.
                exponentials = logits.sub_(higher[:, None]).clamp_(min=LOWEST_EXPONENT).exp_()
                summed[part] = summed[part] * (largest[part] - higher).exp_() + exponentials.sum(1)
                largest[part] = higher
        return target_logits, largest[read_at], (largest + summed.log())[read_at]

    def answer_gradient(self, residual: Tensor, read_at: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of Σ_a log p(target a) with respect to the residual after the last layer, [P,
        D].

        For one answer it is W[target] − Σ_v p(v) W[v], carried back through the final norm; where logits are
        capped, c · tanh(x / c) takes its own derivative 1 − (logit / c)².
        """
        residual = residual.detach().requires_grad_()
        hidden = self.skeleton.before_head(residual)
        with torch.no_grad():
            fixed = hidden.detach()
            gradient = torch.zeros_like(fixed)
            for part, answers in _parts(len(fixed), read_at):
                gradient[part] = self._head_gradient(
                    fixed[part], read_at[answers] - part.start, targets[answers]
                )
        (back,) = torch.autograd.grad(hidden, residual, gradient)
        return back

    def _head_gradient(self, hidden: Tensor, read_at: Tensor, targets: Tensor) -> Tensor:
        everywhere = torch.arange(len(hidden), device=hidden.device)
        asked = torch.cat([everywhere, read_at]), torch.cat([torch.zeros_like(everywhere), targets])
        asked_logits, _, totals = self._normaliser(hidden, *asked)
        target_logits, total = asked_logits[len(hidden) :], totals[: len(hidden)]
        answers = torch.zeros(len(hidden), device=hidden.device).index_add_(
            0, read_at, torch.ones(len(read_at), device=hidden.device)
        )
        gradient = torch.zeros_like(hidden)
        rows = self.head_rows
        for start, block in self._unembedding.blocks():
            logits = self._logits(matmul_in_fixed_rows(hidden, block.t(), rows), start)
            slope = self._slope(logits)
            likely = logits.sub_(total[:, None]).clamp_(min=LOWEST_EXPONENT).exp_() * answers[:, None]
            if slope is not None:
                likely *= slope
            gradient -= matmul_in_fixed_rows(likely, block, rows)
        slope = self._slope(target_logits)
        target_rows = self._unembedding.rows(targets)
        gradient.index_add_(0, read_at, target_rows if slope is None else target_rows * slope[:, None])
        return gradient if self._form.scale == 1.0 else gradient * self._form.scale

    def _slope(self, logits: Tensor) -> Tensor | None:
        """Return how logits grow with what they were before the cap; None without a cap."""
        softcap = self._form.softcap
        return None if softcap is None else 1.0 - (logits / softcap).square_()


def head_rows(width: int) -> int:
    """Return how many residuals go through the unembedding in one product: more where padding is cheap."""
    return READ_ROWS if width <= NARROW_WIDTH else 2 * FIXED_ROWS


def _parts(rows: int, read_at: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of at most READ_ROWS rows, and which answers are read there."""
    for start in range(0, rows, READ_ROWS):
        answers = ((read_at >= start) & (read_at < start + READ_ROWS)).nonzero()[:, 0]
        yield slice(start, start + READ_ROWS), answers
