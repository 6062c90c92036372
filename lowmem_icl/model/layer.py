"""One of Hugging Face's decoder layers, filled from a store, with heads and FFNs cut and captured by hooks.

What goes through a layer is a micro-batch: the tokens of several rows, each under one or several masks, one after the
other. Linears and norms see them all at once; attention sees each row by itself.

Axis letters: N tokens of a micro-batch, V variants (a row under one mask each), T tokens of a row, D width, H heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from lowmem_icl.model.families import Skeleton
from lowmem_icl.model.int8 import Int8Linear, replace_linears
from lowmem_icl.model.store import Weights

ATTENTION = "lowmem_icl_by_row"


@dataclass(frozen=True, eq=False)
class Segment:
    """One row's part of a micro-batch: `variants` times its tokens, all seen through one mask.

    attention_mask: additive, 0 and -inf, [T, T] (see `tree_mask`).
    """

    variants: int
    attention_mask: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return len(self.attention_mask)

    @property
    def size(self) -> int:
        """Places it takes in the micro-batch."""
        return self.variants * self.tokens


@dataclass
class Captured:
    """What a layer computed inside: z [N, D], the heads' outputs side by side; ffn [N, D], the FFN's output."""

    z: Tensor
    ffn: Tensor


class DecoderLayer:
    """A decoder layer whose weights are replaced layer by layer.

    `run` maps the residual at the layer's input, [N, D], to that at its output. The layer is one module,
    filled anew for every layer of the model.
    """

    def __init__(self, skeleton: Skeleton, weights: Weights, device: torch.device) -> None:
        self._heads = skeleton.heads
        self._device = device
        self._module: Any = skeleton.empty_layer()
        if weights == "int8":
            replace_linears(self._module, skeleton.family.shared_inputs)
        for module in self._module.modules():
            if isinstance(config := getattr(module, "config", None), PretrainedConfig):
                config._attn_implementation = ATTENTION
            if isinstance(module, nn.ReLU):
                # The widest tensor of a layer is not made a second time.
                module.inplace = True
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
        segments: Sequence[Segment],
        keep_heads: Tensor | None = None,
        keep_ffn: Tensor | None = None,
    ) -> Tensor:
        """Return the residual at the layer's output, [N, D]; the segments tell whose tokens the N are, in order.

        keep_heads: [V, H] of 0 and 1 for the V variants of all segments; heads with 0 have their slice of the output
        projection's input zeroed, whose bias stays. keep_ffn: [V] of 0 and 1, an FFN with 0 adds nothing to the
        residual.
        """
        with self._cut(segments, keep_heads, keep_ffn):
            return self._module(residual[None], attention_mask=segments)[0]

    def run_captured(self, residual: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Captured]:
        """Return the clean output and what was captured on the way, as parts of one autograd graph."""
        seen: dict[str, Tensor] = {}

        def keep_z(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            seen["z"] = arguments[0].view(residual.shape)
            return (seen["z"].view(arguments[0].shape),)

        def keep_ffn(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            # The reshaped tensor goes on into the graph, so that gradients reach what was captured.
            seen["ffn"] = output.view(residual.shape)
            return seen["ffn"].view(output.shape)

        handles = [
            self._attention_output.register_forward_pre_hook(keep_z),
            self._ffn_output.register_forward_hook(keep_ffn),
        ]
        try:
            output = self._module(residual[None], attention_mask=segments)[0]
        finally:
            for handle in handles:
                handle.remove()
        return output, Captured(seen["z"], seen["ffn"])

    @contextmanager
    def _cut(
        self, segments: Sequence[Segment], keep_heads: Tensor | None, keep_ffn: Tensor | None
    ) -> Iterator[None]:
        handles = []

        def cut_heads(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            assert keep_heads is not None
            z = arguments[0].unflatten(-1, (self._heads, -1)).flatten(0, -3)
            return ((z * _by_token(keep_heads, segments)[:, :, None]).view(arguments[0].shape),)

        def cut_ffn(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            assert keep_ffn is not None
            ffn = output.flatten(0, -2)
            return (ffn * _by_token(keep_ffn, segments)[:, None]).view(output.shape)

        if keep_heads is not None:
            handles.append(self._attention_output.register_forward_pre_hook(cut_heads))
        if keep_ffn is not None:
            handles.append(self._ffn_output.register_forward_hook(cut_ffn))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _by_token(values: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Repeat what is given by variant, [V, ...], for every token of the variant, [N, ...]."""
    tokens = [segment.tokens for segment in segments for _ in range(segment.variants)]
    return values.repeat_interleave(torch.tensor(tokens, device=values.device), dim=0)


def _attention_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sequence[Segment],
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within every row of a micro-batch: query, key, value [1, H, N, d] to [1, N, H, d].

    What a row gets does not depend on the other segments: it is one call of torch's attention on its own tokens.
    """
    outputs = []
    start = 0
    for segment in attention_mask:
        places = slice(start, start + segment.size)
        q, k, v = (
            states[0, :, places].unflatten(1, (segment.variants, segment.tokens)).transpose(0, 1)
            for states in (query, key, value)
        )
        attended = scaled_dot_product_attention(q, k, v, attn_mask=segment.attention_mask, scale=scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        start += segment.size
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


AttentionInterface.register(ATTENTION, _attention_by_row)


def tree_mask(ends: Tensor) -> Tensor:
    """Return the additive attention mask [T, T] of a row from its subtree ends [T] (see rows.Row)."""
    places = torch.arange(len(ends), device=ends.device)
    seen = (places[None, :] <= places[:, None]) & (places[:, None] < ends[None, :])
    return torch.zeros(seen.shape, device=ends.device).masked_fill_(~seen, float("-inf"))


def whole_row(tokens: int) -> Segment:
    """Return the segment of one plain row, in which every token sees all before it."""
    return Segment(1, tree_mask(torch.full((tokens,), tokens, dtype=torch.int64)))
