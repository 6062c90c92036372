"""A model whose layers come from a store one after the other; all that is no layer stays in memory."""

import copy
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from lowmem_icl.model.families import Skeleton
from lowmem_icl.model.int8 import FIXED_ROWS, matmul_in_fixed_rows
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.reading import LayerReader
from lowmem_icl.model.store import NON_LAYER, Store
from lowmem_icl.system.allocator import keep_freed_memory

VOCABULARY_BLOCK = 2048
READ_ROWS = 1024
NARROW_WIDTH = 1024
LOWEST_EXPONENT = -80.0


class StreamedModel:
    """Embedding, decoder layers by stream, and unembedding of a store.

    `resident_bytes`: how much of the layers may stay between passes, in the device's memory. Use as a context
    manager.
    """

    def __init__(self, store: Store, *, device: torch.device, resident_bytes: int) -> None:
        keep_freed_memory()
        self.store = store
        # Its own, since it holds weights: a store, and another model of it, are never written to.
        self.skeleton = Skeleton(copy.deepcopy(store.skeleton.config))
        self.device = device
        self._layer = DecoderLayer(self.skeleton, store.manifest.weights, device)
        self._reader = LayerReader(store.layer_paths, resident_layers(store, resident_bytes), device)
        self.skeleton.fill_non_layer(load_file(store.folder / NON_LAYER), device)
        self._unembedding: Tensor = self.skeleton.model.get_output_embeddings().weight.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    @property
    def read_bytes(self) -> int:
        """Bytes of layers read from disk so far."""
        return self._reader.read_bytes

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the residual at the first layer's input, [T, D] in float32, for ids [T] at positions [T]."""
        with torch.no_grad():
            return self.skeleton.family.embed(
                self.skeleton.model, tokens.to(self.device), positions.to(self.device)
            )

    def token_outputs(self, tokens: Tensor) -> Tensor:
        """Return what reads the logits of ids [C] off a residual, final norm left out: [C, D] in float32."""
        with torch.no_grad():
            return self.skeleton.family.token_outputs(self.skeleton.model, tokens.to(self.device))

    def vocabulary_outputs(self) -> Iterator[Tensor]:
        """Yield `token_outputs` of the whole vocabulary, VOCABULARY_BLOCK ids at a time."""
        for ids in torch.arange(self.skeleton.vocabulary).split(VOCABULARY_BLOCK):
            yield self.token_outputs(ids)

    def token_products(self) -> Tensor:
        """Return Σ_v e_v u_vᵀ over the vocabulary, [D, D]: embeddings times what reads their logits."""
        width = self.skeleton.width
        total = torch.zeros(width, width, device=self.device)
        with torch.no_grad():
            for ids in torch.arange(self.skeleton.vocabulary, device=self.device).split(VOCABULARY_BLOCK):
                put_in = self.skeleton.family.token_inputs(self.skeleton.model, ids)
                total.addmm_(put_in.t(), self.token_outputs(ids))
        return total

    @property
    def final_norm(self) -> nn.LayerNorm | None:
        """The norm before the unembedding; None where the model has none."""
        return self.skeleton.family.final_norm(self.skeleton.model)

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, DecoderLayer]]:
        """Yield (layer number, the layer filled with its weights); valid until the next one."""
        for number, tensors in self._reader.layers(order):
            self._layer.fill(tensors)
            yield number, self._layer

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
            hidden = self.skeleton.family.unembed_input(self.skeleton.model, residual)
            logprobs = residual.new_empty(len(targets))
            greedy = torch.empty(len(targets), dtype=torch.bool, device=residual.device)
            for part, answers in _parts(len(hidden), read_at):
                logits, largest, total = self._normaliser(
                    hidden[part], read_at[answers] - part.start, targets[answers]
                )
                logprobs[answers] = logits - total
                greedy[answers] = logits >= largest
        return logprobs, greedy

    def _normaliser(self, hidden: Tensor, read_at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each answer's logit, and the largest and log-sum-exp of all logits where it is read, [A]."""
        rows = self.head_rows
        filled = pad(hidden, (0, 0, 0, -len(hidden) % rows))
        largest = hidden.new_full((len(filled),), float("-inf"))
        summed = hidden.new_zeros(len(filled))
        target_logits = hidden.new_zeros(len(targets))
        for start, block in self._vocabulary_blocks():
            in_block = ((targets >= start) & (targets < start + len(block))).nonzero()[:, 0]
            for first in range(0, len(filled), rows):
                part = slice(first, first + rows)
                # All of one shape, so that a row's result does not depend on how many come with it.
                logits = filled[part] @ block.t()
                answers = in_block[(read_at[in_block] >= first) & (read_at[in_block] < first + rows)]
                target_logits[answers] = logits[read_at[answers] - first, targets[answers] - start]
                higher = torch.maximum(largest[part], logits.amax(1))
                # Exponentials too small for a normal number take many times as long, and add nothing.
                exponentials = logits.sub_(higher[:, None]).clamp_(min=LOWEST_EXPONENT).exp_()
                summed[part] = summed[part] * (largest[part] - higher).exp_() + exponentials.sum(1)
                largest[part] = higher
        return target_logits, largest[read_at], (largest + summed.log())[read_at]

    def _vocabulary_blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self._unembedding), VOCABULARY_BLOCK):
            yield start, self._unembedding[start : start + VOCABULARY_BLOCK].float()

    def answer_gradient(self, residual: Tensor, read_at: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of Σ_a log p(target a) with respect to the residual after the last layer, [P,
        D].

        For one answer it is W[target] − Σ_v p(v) W[v], carried back through the final norm.
        """
        residual = residual.detach().requires_grad_()
        hidden = self.skeleton.family.unembed_input(self.skeleton.model, residual)
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
        _, _, total = self._normaliser(hidden, everywhere, torch.zeros_like(everywhere))
        answers = torch.zeros(len(hidden), device=hidden.device).index_add_(
            0, read_at, torch.ones(len(read_at), device=hidden.device)
        )
        gradient = torch.zeros_like(hidden)
        rows = self.head_rows
        for _, block in self._vocabulary_blocks():
            logits = matmul_in_fixed_rows(hidden, block.t(), rows)
            likely = logits.sub_(total[:, None]).clamp_(min=LOWEST_EXPONENT).exp_() * answers[:, None]
            gradient -= matmul_in_fixed_rows(likely, block, rows)
        return gradient.index_add_(0, read_at, self._unembedding[targets].float())


def head_rows(width: int) -> int:
    """Return how many residuals go through the unembedding in one product: more where padding is cheap."""
    return READ_ROWS if width <= NARROW_WIDTH else 2 * FIXED_ROWS


def _parts(rows: int, read_at: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of at most READ_ROWS rows, and which answers are read there."""
    for start in range(0, rows, READ_ROWS):
        answers = ((read_at >= start) & (read_at < start + READ_ROWS)).nonzero()[:, 0]
        yield slice(start, start + READ_ROWS), answers


def resident_layers(store: Store, resident_bytes: int) -> frozenset[int]:
    """Return the layers that are kept in memory under this allowance, the first ones; the rest stream."""
    return frozenset(range(min(store.skeleton.layers, resident_bytes // store.layer_bytes)))
