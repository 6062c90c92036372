"""A decoder layer of Hugging Face's, filled from a store, run in two halves: what heads see, and the rest.

Between the halves lies z, the heads' outputs side by side before the output projection. Heads are cut there;
a variant that differs from the clean run in this layer only takes the clean run's z and needs the second half
alone.

What goes through a layer is a micro-batch: the tokens of several rows, each under one or several masks, one
after the other. Linears and norms see them all at once; attention sees each row by itself.

Axis letters: N tokens of a micro-batch, V variants (a row under one mask each), T tokens of a row, P tokens
of its stem, D width, H heads, d head width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from lowmem_icl.model.families import Skeleton
from lowmem_icl.model.int8 import Int8Linear, dequantise_rows, replace_linears
from lowmem_icl.model.store import Weights

ATTENTION = "lowmem_icl_by_row"
# 64 bytes of float32: with so many queries and keys every buffer of the attention starts on a full vector,
# whichever thread works on it. MKL's products differ in the last bit between aligned and unaligned buffers.
ROW_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class Segment:
    """One row's part of a micro-batch: `variants` times its tokens, all seen through one mask.

    mask: additive, 0 and -inf, [Q, K]: T and P + T, filled up to multiples of ROW_MULTIPLE (see
    `attention_mask`). stem_keys, stem_values: [V, H, P, d], what the row's stem put there under the same
    masks; None without a stem.
    """

    variants: int
    tokens: int
    mask: Tensor
    stem_keys: Tensor | None = None
    stem_values: Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens it takes in the micro-batch."""
        return self.variants * self.tokens


@dataclass(frozen=True, eq=False)
class AttentionOutput:
    """The first half's output: z [N, D], the heads' outputs side by side; keys, values [H, N, d].

    queries [H, N, d], scaled, so that attention is the softmax of their products with the keys; None unless
    asked for.
    """

    z: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor | None = None


class _StopAtZ(Exception):
    """Carries z out of a layer's forward: no error, but the end of the first half."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z


class _OutputEnd(nn.Module):
    """Stands for the output projection in the first half, and ends it."""

    def forward(self, z: Tensor) -> NoReturn:
        raise _StopAtZ(z)


class _KnownAttention(nn.Module):
    """Stands for the attention in the second half: z comes where the layer passes its attention mask."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        return self.output(attention_mask), None


class _Nothing(nn.Module):
    """Stands for the linears of a removed FFN: adds zero."""

    def forward(self, values: Tensor) -> Tensor:
        return values.new_zeros(*values.shape[:-1], 1)


class _RowAttention:
    """Passed where a layer passes its attention mask: the rows' segments, and where their states are left."""

    def __init__(self, segments: Sequence[Segment], with_queries: bool) -> None:
        self.segments = segments
        self.with_queries = with_queries
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerCut:
    """What a layer lacks: keep_heads [N, H] of 0 and 1 by token, None where all are there; and its FFN."""

    keep_heads: Tensor | None = None
    without_ffn: bool = False

    def apply(self, z: Tensor) -> Tensor:
        """Return z [N, D] without the slices of removed heads."""
        if self.keep_heads is None:
            return z
        return (z.unflatten(-1, (self.keep_heads.shape[1], -1)) * self.keep_heads[..., None]).flatten(-2)


WHOLE = LayerCut()


@dataclass(frozen=True, eq=False)
class CapturedRun:
    """A layer's output, z before any head is cut, and the FFN's output, [N, D] each, parts of one autograd
    graph.

    ffn: None where the FFN is removed.
    """

    output: Tensor
    z: Tensor
    ffn: Tensor | None


class DecoderLayer:
    """A decoder layer whose weights are replaced layer by layer.

    `attend` maps the residual at the layer's input, [N, D], to z; `finish` maps both to the residual at its
    output. The layer is one set of modules, filled anew for every layer of the model.
    """

    def __init__(self, skeleton: Skeleton, weights: Weights, device: torch.device) -> None:
        family = skeleton.family
        self.device = device
        self._family = family
        self._module: Any = skeleton.empty_layer()
        if weights == "int8":
            replace_linears(self._module, family.shared_inputs)
        for module in self._module.modules():
            if isinstance(config := getattr(module, "config", None), PretrainedConfig):
                config._attn_implementation = ATTENTION
            if isinstance(module, nn.ReLU):
                # The widest tensor of a layer is not made a second time.
                module.inplace = True
        output = self._module.get_submodule(family.attention_output)
        attention, _, _ = family.attention_output.rpartition(".")
        ffn_linears = [
            name
            for name in skeleton.linear_names()
            if name not in family.shared_inputs and name != family.attention_output
        ]
        known = {attention: _KnownAttention(output)}
        self._attending = _with_stand_ins(self._module, {family.attention_output: _OutputEnd()})
        self._finishing = _with_stand_ins(self._module, known)
        self._without_ffn = _with_stand_ins(self._module, known | {name: _Nothing() for name in ffn_linears})
        self._ffn_output = self._module.get_submodule(family.ffn_output)
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
                self._module.get_submodule(owner).outlier_columns = tensor.to(self.device)
                continue
            value = tensor if tensor.dtype == torch.int8 else tensor.float()
            set_module_tensor_to_device(self._module, name, self.device, value=value)
        self._module.requires_grad_(False)
        for linear in self._linears:
            linear.refresh()

    @property
    def output_weight(self) -> Tensor:
        """The attention's output projection in float32, [D, D]: from z, by head, to the residual."""
        return self._float_weight(self._family.attention_output)

    @property
    def output_bias(self) -> Tensor | None:
        """The bias of the attention's output projection, [D]."""
        bias: Tensor | None = self._module.get_submodule(self._family.attention_output).bias
        return bias

    @property
    def value_weight(self) -> Tensor:
        """The projection to the values in float32, [D, D]: from the normed input to values by head."""
        return self._float_weight(self._family.attention_value)

    def _float_weight(self, name: str) -> Tensor:
        linear = self._module.get_submodule(name)
        if isinstance(linear, Int8Linear):
            return dequantise_rows(linear.weight, linear.SCB)
        return linear.weight.detach().float()

    def attend(
        self, residual: Tensor, segments: Sequence[Segment], *, with_queries: bool = False
    ) -> AttentionOutput:
        """Return z and what the attention saw, for the residual at the layer's input [N, D].

        The segments tell whose tokens the N are, in order.
        """
        seen = _RowAttention(segments, with_queries)
        try:
            self._attending(residual[None], attention_mask=seen)
        except _StopAtZ as stopped:
            assert seen.keys is not None
            assert seen.values is not None
            return AttentionOutput(stopped.z[0], seen.keys, seen.values, seen.queries)
        raise AssertionError("the layer never reached its output projection")

    def finish(self, residual: Tensor, z: Tensor, *, without_ffn: bool = False) -> Tensor:
        """Return the residual at the layer's output, [N, D], from that at its input and z, [N, D] each.

        Tokens do not meet in this half, so any of them can be asked for. `without_ffn`: the FFN is removed.
        """
        module = self._without_ffn if without_ffn else self._finishing
        return module(residual[None], attention_mask=z[None])[0]

    def run(self, residual: Tensor, segments: Sequence[Segment], cut: LayerCut = WHOLE) -> Tensor:
        """Return the output of the whole layer, [N, D], without what is cut."""
        z = self.attend(residual, segments).z
        return self.finish(residual, cut.apply(z), without_ffn=cut.without_ffn)

    def run_captured(
        self, residual: Tensor, segments: Sequence[Segment], cut: LayerCut = WHOLE
    ) -> CapturedRun:
        """Run the whole layer, [N, D], without what is cut, and keep its units' outputs for gradients."""
        captured: list[Tensor] = []

        def keep_ffn(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            # The reshaped tensor continues in the graph, so that gradients reach what was captured.
            captured.append(output.view(residual.shape))
            return captured[-1].view(output.shape)

        handle = self._ffn_output.register_forward_hook(keep_ffn)
        try:
            z = self.attend(residual, segments).z
            output = self.finish(residual, cut.apply(z), without_ffn=cut.without_ffn)
        finally:
            handle.remove()
        return CapturedRun(output, z, captured[0] if captured else None)


def _with_stand_ins(layer: nn.Module, stand_ins: Mapping[str, nn.Module]) -> nn.Module:
    """Return a layer of the same modules, except those named; no weight is copied: filling one fills both."""
    copied = _shallow(layer)
    for name, stand_in in stand_ins.items():
        owner, _, leaf = name.rpartition(".")
        owner_module = copied
        for part in owner.split(".") if owner else []:
            child = _shallow(getattr(owner_module, part))
            setattr(owner_module, part, child)
            owner_module = child
        setattr(owner_module, leaf, stand_in)
    return copied


def _shallow(module: nn.Module) -> nn.Module:
    """Return a module of the same class, settings and children; replacing its children leaves the other's."""
    copied = module.__new__(type(module))
    copied.__dict__ = module.__dict__ | {"_modules": dict(module._modules)}
    return copied


def cut_heads(z: Tensor, keep_heads: Tensor) -> Tensor:
    """Return z under each mask, [V, T, D]: z [V, T, D], or [T, D] for all, times keep_heads [V, H] of 0 and
    1.

    A removed head's slice of the output projection's input becomes zero; the projection's bias stays.
    """
    by_head = z.unflatten(-1, (keep_heads.shape[1], -1))
    return (by_head * keep_heads[:, None, :, None]).flatten(-2)


# Arguments of attention functions that change nothing here, and why.
HARMLESS_ARGUMENTS = {
    "position_ids": "positions are in the queries and keys, or in the residual, before attention is called",
    "cache_position": "no keys are cached between calls",
    "use_cache": "no keys are cached between calls",
    "output_attentions": "the weights are given as None, which a layer hands through unread",
    "is_causal": "the mask of each row says what its tokens see",
}


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise NotImplementedError naming an argument that means something and that is not handled."""
    for name, value in arguments.items():
        if value is None or name in HARMLESS_ARGUMENTS or (name == "dropout" and not value):
            continue
        raise NotImplementedError(
            f"attention argument '{name}' = {value!r:.80}: this layer asks for what is not implemented; "
            f"implement it in {__name__}, or list it among its harmless arguments with the reason"
        )


def _attention_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _RowAttention,
    *,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within every row of a micro-batch: query, key, value [1, H, N, d] to [1, N, H, d].

    What a row gets does not depend on the other segments: torch's attention is called on its tokens alone.
    """
    _refuse_unknown(others)
    attention_mask.keys, attention_mask.values = key[0], value[0]
    if attention_mask.with_queries:
        attention_mask.queries = query[0] * scaling
    outputs = []
    start = 0
    for segment in attention_mask.segments:
        part = slice(start, start + segment.size)
        q, k, v = (
            states[0, :, part].unflatten(1, (segment.variants, segment.tokens)).transpose(0, 1)
            for states in (query, key, value)
        )
        queries, keys = segment.mask.shape
        z = scaled_dot_product_attention(
            _filled_up(None, q, queries),
            _filled_up(segment.stem_keys, k, keys),
            _filled_up(segment.stem_values, v, keys),
            attn_mask=segment.mask,
            scale=scaling,
        )
        outputs.append(z[:, :, : segment.tokens].transpose(1, 2).flatten(0, 1))
        start += segment.size
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


AttentionInterface.register(ATTENTION, _attention_by_row)


def _filled_up(stem_states: Tensor | None, states: Tensor, length: int) -> Tensor:
    """Return the stem's states, a row's [V, H, T, d] and zeros, `length` together, in one copy."""
    parts = [states] if stem_states is None else [stem_states, states]
    if missing := length - sum(part.shape[2] for part in parts):
        variants, heads, _, head_width = states.shape
        parts.append(states.new_zeros(1).expand(variants, heads, missing, head_width))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def attention_mask(ends: Tensor, stem_tokens: int = 0) -> Tensor:
    """Return the additive attention mask of a row from its subtree ends [T] (see rows.Row), filled up to [Q,
    K].

    A token sees its stem's P tokens, its ancestors and itself; nothing sees the filling.
    """
    tokens, device = len(ends), ends.device
    indices = torch.arange(tokens, device=device)
    seen = (indices[None, :] <= indices[:, None]) & (indices[:, None] < ends[None, :])
    mask = torch.full((_round_up(tokens), _round_up(stem_tokens + tokens)), float("-inf"), device=device)
    # The queries that fill up are read by nobody; they see something, so that their softmax is a number.
    mask[tokens:] = 0
    mask[:tokens, :stem_tokens] = 0
    mask[:tokens, stem_tokens : stem_tokens + tokens].masked_fill_(seen, 0)
    return mask


def _round_up(tokens: int) -> int:
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def whole_row(tokens: int) -> Segment:
    """Return the segment of one plain row, in which every token sees all before it."""
    return Segment(1, tokens, attention_mask(torch.full((tokens,), tokens, dtype=torch.int64)))
