"""A model whose layers come from a store one after the other; what lies outside the layers stays in memory."""

from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import load_file
from torch import Tensor

from lowmem_icl.model.allocator import keep_freed_memory
from lowmem_icl.model.int8 import FIXED_ROWS, matmul_in_fixed_rows
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.reading import LayerReader
from lowmem_icl.model.store import OUTSIDE, Store

VOCABULARY_BLOCK = 2048
HEAD_ROWS = 8 * FIXED_ROWS


class StreamedModel:
    """Embedding, decoder layers by stream, and unembedding of a store.

    `resident_bytes`: how much of the layers may stay between passes, in the device's memory. Use as a context manager.
    """

    def __init__(self, store: Store, *, device: torch.device, resident_bytes: int) -> None:
        keep_freed_memory()
        self.store = store
        self.skeleton = store.skeleton
        self.device = device
        self._layer = DecoderLayer(self.skeleton, store.manifest.weights, device)
        self._reader = LayerReader(store.layer_paths, resident_layers(store, resident_bytes), device)
        for name, tensor in load_file(store.folder / OUTSIDE).items():
            # The two vocabulary tables keep the source's precision, the rest is small and computes in float32.
            value = tensor if tensor.shape[0] == self.skeleton.vocabulary else tensor.float()
            set_module_tensor_to_device(self.skeleton.model, name, device, value=value, dtype=value.dtype)
        self.skeleton.model.tie_weights()
        self._unembedding: Tensor = self.skeleton.model.get_output_embeddings().weight.detach()

    def __enter__(self) -> "StreamedModel":
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

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, DecoderLayer]]:
        """Yield (layer number, the layer filled with its weights); valid until the next one."""
        for number, tensors in self._reader.layers(order):
            self._layer.fill(tensors)
            yield number, self._layer

    def log_probabilities(self, residual: Tensor, read_at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability (nats, float32) of each target and whether it is the most likely token, [A].

        residual: [P, D] after the last layer; answer a is targets[a] predicted at residual[read_at[a]].
        """
        with torch.no_grad():
            hidden = self.skeleton.family.unembed_input(self.skeleton.model, residual)
            logprobs = residual.new_empty(len(targets))
            greedy = torch.empty(len(targets), dtype=torch.bool, device=residual.device)
            for start in range(0, len(hidden), HEAD_ROWS):
                here = ((read_at >= start) & (read_at < start + HEAD_ROWS)).nonzero()[:, 0]
                logits, largest, total = self._normaliser(
                    hidden[start : start + HEAD_ROWS], read_at[here] - start, targets[here]
                )
                logprobs[here] = logits - total
                greedy[here] = logits >= largest
        return logprobs, greedy

    def _normaliser(self, hidden: Tensor, read_at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each answer's logit, the largest logit and the logarithm of the summed exponentials beside it."""
        largest = hidden.new_full((len(hidden),), float("-inf"))
        summed = hidden.new_zeros(len(hidden))
        chosen = hidden.new_zeros(len(targets))
        for start, block in self._vocabulary_blocks():
            logits = matmul_in_fixed_rows(hidden, block.t())
            inside = (targets >= start) & (targets < start + len(block))
            chosen[inside] = logits[read_at[inside], targets[inside] - start]
            higher = torch.maximum(largest, logits.amax(1))
            summed = summed * (largest - higher).exp_() + logits.sub_(higher[:, None]).exp_().sum(1)
            largest = higher
        return chosen, largest[read_at], (largest + summed.log())[read_at]

    def _vocabulary_blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self._unembedding), VOCABULARY_BLOCK):
            yield start, self._unembedding[start : start + VOCABULARY_BLOCK].float()

    def answer_gradient(self, residual: Tensor, read_at: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of Σ_a log p(target a) with respect to the residual after the last layer, [P, D].

        For one answer it is W[target] − Σ_v p(v) W[v], carried back through the final norm.
        """
        residual = residual.detach().requires_grad_()
        hidden = self.skeleton.family.unembed_input(self.skeleton.model, residual)
        with torch.no_grad():
            fixed = hidden.detach()
            gradient = torch.zeros_like(fixed)
            for start in range(0, len(fixed), HEAD_ROWS):
                part = fixed[start : start + HEAD_ROWS]
                here = (read_at >= start) & (read_at < start + HEAD_ROWS)
                gradient[start : start + HEAD_ROWS] = self._head_gradient(
                    part, read_at[here] - start, targets[here]
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
        for _, block in self._vocabulary_blocks():
            likely = (matmul_in_fixed_rows(hidden, block.t()) - total[:, None]).exp() * answers[:, None]
            gradient -= matmul_in_fixed_rows(likely, block)
        return gradient.index_add_(0, read_at, self._unembedding[targets].float())


def resident_layers(store: Store, resident_bytes: int) -> frozenset[int]:
    """Return the layers that are kept in memory under this allowance, the first ones; the rest stream."""
    return frozenset(range(min(store.skeleton.layers, resident_bytes // store.layer_bytes)))
