"""One of Hugging Face's decoder layers, filled from a store, with heads and FFNs cut and captured by hooks.

Axis letters: R rows (variants of one packed row), T tokens, D width, H heads, d head width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from lowmem_icl.model.families import Skeleton
from lowmem_icl.model.int8 import Int8Linear, replace_linears
from lowmem_icl.model.store import Weights


@dataclass
class Captured:
    """What a layer computed inside: z [R, T, D], the heads' outputs side by side; ffn [R, T, D], the FFN's output."""

    z: Tensor
    ffn: Tensor


class DecoderLayer:
    """A decoder layer whose weights are replaced layer by layer.

    `run` maps the residual at the layer's input, [R, T, D], to that at its output. The layer is one module,
    filled anew for every layer of the model.
    """

    def __init__(self, skeleton: Skeleton, weights: Weights, device: torch.device) -> None:
        self._heads = skeleton.heads
        self._device = device
        self._module: Any = skeleton.empty_layer()
        if weights == "int8":
            replace_linears(self._module, skeleton.family.shared_inputs)
        self._attention_output = self._module.get_submodule(skeleton.family.attention_output)
        self._ffn_output = self._module.get_submodule(skeleton.family.ffn_output)
        self._linears = [module for module in self._module.modules() if isinstance(module, Int8Linear)]

    @property
    def int8_linears(self) -> dict[str, Int8Linear]:
        """The layer's int8 linears by name; empty in other forms."""
        return {
            name: module for name, module in self._module.named_modules() if isinstance(module, Int8Linear)
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of one layer file; nothing is copied on the CPU unless its precision changes."""
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight_format":
                continue
            if leaf == "outlier_columns":
                # Its length differs from layer to layer.
                self._module.get_submodule(owner).outlier_columns = tensor.to(self._device)
                continue
            value = tensor if tensor.dtype == torch.int8 else tensor.float()
            set_module_tensor_to_device(self._module, name, self._device, value=value)
        self._module.requires_grad_(False)
        for linear in self._linears:
            linear.refresh()

    def run(
        self,
        residual: Tensor,
        attention_mask: Tensor,
        keep_heads: Tensor | None = None,
        keep_ffn: Tensor | None = None,
    ) -> Tensor:
        """Return the residual at the layer's output, [R, T, D].

        attention_mask: additive, 0 and -inf, broadcast to [R, 1, T, T]. keep_heads: [R, H] of 0 and 1, heads with
        0 have their slice of the output projection's input zeroed, whose bias stays. keep_ffn: [R] of 0 and 1, an
        FFN with 0 adds nothing to the residual.
        """
        with self._cut(residual.shape, keep_heads, keep_ffn):
            return self._module(residual, attention_mask=attention_mask)

    def run_captured(self, residual: Tensor, attention_mask: Tensor) -> tuple[Tensor, Captured]:
        """Return the clean output and what was captured on the way, as parts of one autograd graph."""
        seen: dict[str, Tensor] = {}
        shape = residual.shape

        def keep_z(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen["z"] = arguments[0]

        def keep_ffn(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            # The reshaped tensor goes on into the graph, so that gradients reach what was captured.
            seen["ffn"] = output.view(shape)
            return seen["ffn"].view(output.shape)

        handles = [
            self._attention_output.register_forward_pre_hook(keep_z),
            self._ffn_output.register_forward_hook(keep_ffn),
        ]
        try:
            output = self._module(residual, attention_mask=attention_mask)
        finally:
            for handle in handles:
                handle.remove()
        return output, Captured(seen["z"], seen["ffn"])

    @contextmanager
    def _cut(self, shape: torch.Size, keep_heads: Tensor | None, keep_ffn: Tensor | None) -> Iterator[None]:
        rows, tokens, width = shape
        handles = []

        def cut_heads(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            assert keep_heads is not None
            z = arguments[0].view(rows, tokens, self._heads, width // self._heads)
            return ((z * keep_heads[:, None, :, None]).view(arguments[0].shape),)

        def cut_ffn(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            assert keep_ffn is not None
            return (output.view(rows, tokens, width) * keep_ffn[:, None, None]).view(output.shape)

        if keep_heads is not None:
            handles.append(self._attention_output.register_forward_pre_hook(cut_heads))
        if keep_ffn is not None:
            handles.append(self._ffn_output.register_forward_hook(cut_ffn))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def tree_mask(ends: Tensor) -> Tensor:
    """Return the additive attention mask [1, 1, T, T] of a row from its subtree ends [T] (see rows.Row)."""
    places = torch.arange(len(ends), device=ends.device)
    seen = (places[None, :] <= places[:, None]) & (places[:, None] < ends[None, :])
    return torch.zeros(seen.shape, device=ends.device).masked_fill_(~seen, float("-inf"))[None, None]
