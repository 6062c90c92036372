"""A decoder layer of Hugging Face's, filled from a store, run in two halves: what heads see, and the rest.

Between the halves lies z, the heads' outputs side by side before the output projection. Heads are cut there;
a variant that differs from the clean run in this layer only takes the clean run's z and needs the second half
alone.

Axis letters: N tokens of a micro-batch, V variants (a row under one mask each), T tokens of a row, D width,
H query heads, G heads of keys and values, d head width, Z = H · d, which need not be D.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowmem_icl.model.activation import steady_activations
from lowmem_icl.model.attention import ATTENTION, AttentionForm, RowAttention, Segment
from lowmem_icl.model.families.family import NormForm
from lowmem_icl.model.int8 import (
    FIXED_ROWS,
    Int8Linear,
    check_outlier_columns,
    dequantise_rows,
    replace_linears,
)
from lowmem_icl.model.nf4 import Nf4Linear, replace_with_nf4
from lowmem_icl.model.positions import RotaryAngles
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.stand_ins import (
    Given,
    KnownAttention,
    Nothing,
    OutputEnd,
    StopAtZ,
    share_leaves,
    with_stand_ins,
)
from lowmem_icl.model.store import Weights
from lowmem_icl.model.watch import norms_of

FFN_ELEMENTS = 1 << 24


def finish_tokens(ffn_width: int) -> int:
    """Return how many tokens go through an FFN of this inner width at once, so that what is between its
    linears stays small however long a row is.
    """
    return max(FIXED_ROWS, FFN_ELEMENTS // ffn_width // FIXED_ROWS * FIXED_ROWS)


@dataclass(frozen=True, eq=False)
class AttentionOutput:
    """The first half's output: z [N, Z], the heads' outputs side by side; keys, values [G, N, d].

    queries [H, N, d], scaled, so that attention is what `form` makes of their products with the keys; None
    unless asked for.
    """

    z: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor | None = None
    form: AttentionForm = field(default_factory=AttentionForm)


@dataclass(frozen=True, eq=False)
class LayerCut:
    """What a layer lacks: keep_heads [N, H] of 0 and 1 by token, None where all are there; and its FFN.

    head_fill [N, Z], ffn_fill [N, D]: what stands in their place, or would, None for zeros.
    """

    keep_heads: Tensor | None = None
    without_ffn: bool = False
    head_fill: Tensor | None = None
    ffn_fill: Tensor | None = None

    def apply(self, z: Tensor) -> Tensor:
        """Return z [N, Z] with something else in the slices of removed heads."""
        if self.keep_heads is None:
            return z
        fill = None if self.head_fill is None else self.head_fill[:, None]
        return cut_heads(z[:, None], self.keep_heads, fill)[:, 0]

    def finish(self, layer: "DecoderLayer", residual: Tensor, z: Tensor) -> Tensor:
        """Return the layer's output, [N, D], from the residual at its input and the whole z."""
        fill = self.ffn_fill if self.without_ffn else None
        return layer.finish(residual, self.apply(z), without_ffn=self.without_ffn, ffn_fill=fill)


WHOLE = LayerCut()


@dataclass(frozen=True, eq=False)
class CapturedRun:
    """A layer's output [N, D], z before any head is cut [N, Z], and what the FFN writes into the residual,
    [N, D]: parts of one autograd graph.

    ffn: None where the FFN is removed.
    """

    output: Tensor
    z: Tensor
    ffn: Tensor | None


@dataclass(frozen=True)
class _Halves:
    """One kind of layer as it is run: up to z, from there on, and that without its FFN, or with `given` in
    its place.
    """

    attending: nn.Module
    finishing: nn.Module
    without_ffn: nn.Module
    with_fill: nn.Module
    given: Given


class DecoderLayer:
    """A decoder layer whose weights are replaced layer by layer.

    `attend` maps the residual at the layer's input, [N, D], to z; `finish` maps both to the residual at its
    output. There is one set of weights, filled anew for every layer of the model, and around it an empty
    layer of every kind that the model has.
    """

    def __init__(self, skeleton: Skeleton, weights: Weights, device: torch.device) -> None:
        self.device = device
        self._skeleton, self._family = skeleton, skeleton.family
        first, *others = skeleton.empty_layers()
        if weights == "int8":
            replace_linears(first, (self._family.attention_inputs, self._family.ffn_inputs))
        elif weights == "nf4":
            replace_with_nf4(first)
        for other in others:
            share_leaves(first, other)
        for layer in (first, *others):
            steady_activations(layer)
        self._module: Any = first
        self._kinds = [self._halves(layer) for layer in (first, *others)]
        self._kind = 0
        self._checked: set[int] = set()
        self._int8 = list(self.int8_linears.values())
        self._quantised = [part for part in first.modules() if isinstance(part, Int8Linear | Nf4Linear)]
        rotary = skeleton.rotary
        self._angles = None if rotary is None else RotaryAngles(rotary, skeleton.context_tokens, device)

    def _halves(self, layer: nn.Module) -> _Halves:
        family = self._family
        for module in layer.modules():
            if isinstance(config := getattr(module, "config", None), PretrainedConfig):
                config._attn_implementation = ATTENTION
            if isinstance(module, nn.ReLU):
                # The widest tensor of a layer is not made a second time.
                module.inplace = True
        attention, _, _ = family.attention_output.rpartition(".")
        known = {attention: KnownAttention(layer.get_submodule(family.attention_output))}
        nothing: dict[str, nn.Module] = {name: Nothing() for name in family.ffn_inputs}
        nothing[family.ffn_output] = Nothing(self._skeleton.width)
        given = Given()
        return _Halves(
            with_stand_ins(layer, {family.attention_output: OutputEnd()}),
            with_stand_ins(layer, known),
            with_stand_ins(layer, known | nothing),
            with_stand_ins(layer, known | nothing | {self._written_by: given}),
            given,
        )

    @property
    def _written_by(self) -> str:
        """The part whose output is what the FFN writes into the residual."""
        return self._family.ffn_norm or self._family.ffn_output

    @property
    def int8_linears(self) -> dict[str, Int8Linear]:
        """The layer's int8 linears by name; empty in other forms."""
        return {
            name: module for name, module in self._module.named_modules() if isinstance(module, Int8Linear)
        }

    @property
    def norms(self) -> list[nn.Module]:
        """The norms of all kinds of layers, which share them."""
        return norms_of(self._module)

    def fill(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Become a layer of the model, by its number and the tensors of its file; nothing is copied on the
        CPU unless its precision changes.

        Raises ValueError for outlier columns that do not fit.
        """
        self._kind = self._skeleton.kind_of_layer[number]
        for name, tensor in tensors.items():
            linear, _, part = name.partition(".weight.")
            if part:
                self._module.get_submodule(linear).take(part, tensor.to(self.device))
                continue
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight_format":
                continue
            if leaf == "outlier_columns":
                # Its length differs from layer to layer.
                self._module.get_submodule(owner).outlier_columns = tensor.to(self.device)
                continue
            value = tensor.float() if tensor.is_floating_point() else tensor
            # Else it would empty the device's allocator after every tensor.
            set_module_tensor_to_device(self._module, name, self.device, value=value, clear_cache=False)
        self._module.requires_grad_(False)
        if number not in self._checked:
            # Once, since on a CUDA device it waits for the numbers.
            check_outlier_columns(self.int8_linears)
            self._checked.add(number)
        for quantised in self._quantised:
            quantised.refresh()

    @property
    def output_weight(self) -> Tensor:
        """The attention's output projection in float32, [D, Z]: from z, by head, to the residual.

        Where what attention writes is normed, times the norm's scale: what is left out is its division, a
        positive number per token.
        """
        weight = _float_rows(self._module.get_submodule(self._family.attention_output), slice(None))
        scale = self._written_scale
        return weight if scale is None else weight * scale[:, None]

    @property
    def output_bias(self) -> Tensor | None:
        """The bias of the attention's output projection, [D], scaled likewise."""
        bias: Tensor | None = self._module.get_submodule(self._family.attention_output).bias
        scale = self._written_scale
        return bias if bias is None or scale is None else bias * scale

    @property
    def _written_scale(self) -> Tensor | None:
        if self._family.attention_norm is None:
            return None
        norm = self._module.get_submodule(self._family.attention_norm)
        return NormForm.of(norm, plus_one=self._family.normed_plus_one).scale

    def written_by(self, part: Tensor, whole: Tensor) -> Tensor:
        """Return what some heads write into the residual, [N, D], where all heads give `whole` [N, Z] and
        these `part` [N, Z], the others' slices being zero; the projection's bias is nobody's.

        Where what attention writes is normed or scaled, it is by as much as for the whole.
        """
        weight, bias = self.output_weight, self.output_bias
        projected = whole @ weight.T if bias is None else whole @ weight.T + bias
        written = self.finish(torch.zeros_like(projected), whole, without_ffn=True)
        return part @ weight.T * (written.norm(dim=-1) / projected.norm(dim=-1))[:, None]

    def head_weights(self, head: int) -> tuple[Tensor, Tensor]:
        """Return a query head's projection to its values, [d, D], and its part of `output_weight`, [D, d].

        Both in float32, and nothing of the other heads is.
        """
        skeleton, values = self._skeleton, self._module.get_submodule(self._family.attention_inputs[-1])
        rows: Sequence[int] = range(values.out_features)
        if self._family.fused is not None:
            rows = self._family.fused.value_rows(len(rows), skeleton.config, skeleton.head_width)
        group = head * (len(rows) // skeleton.head_width) // skeleton.heads
        of_group = list(rows[group * skeleton.head_width : (group + 1) * skeleton.head_width])
        value = _float_rows(values, of_group)
        output = self._module.get_submodule(self._family.attention_output)
        columns = slice(head * skeleton.head_width, (head + 1) * skeleton.head_width)
        leaving = _float_rows(output, slice(None), columns)
        scale = self._written_scale
        return value, leaving if scale is None else leaving * scale[:, None]

    def attend(
        self, residual: Tensor, segments: Sequence[Segment], *, with_queries: bool = False
    ) -> AttentionOutput:
        """Return z and what the attention saw, for the residual at the layer's input [N, D].

        The segments tell whose tokens the N are, in order.
        """
        seen = RowAttention(segments, with_queries)
        arguments = dict(self._family.layer_arguments)
        if self._angles is not None:
            positions = [segment.mask.positions.repeat(segment.variants) for segment in segments]
            arguments["position_embeddings"] = self._angles.at(
                positions[0] if len(positions) == 1 else torch.cat(positions),
                max(segment.mask.deepest for segment in segments),
                self._skeleton.layer_type(self._kind),
            )
        try:
            self._kinds[self._kind].attending(residual[None], attention_mask=seen, **arguments)
        except StopAtZ as stopped:
            assert seen.keys is not None
            assert seen.values is not None
            return AttentionOutput(stopped.z[0], seen.keys, seen.values, seen.queries, seen.form)
        raise AssertionError("the layer never reached its output projection")

    def finish(
        self, residual: Tensor, z: Tensor, *, without_ffn: bool = False, ffn_fill: Tensor | None = None
    ) -> Tensor:
        """Return the residual at the layer's output, [N, D], from that at its input and z, [N, Z].

        Tokens do not meet in this half, so any of them can be asked for. `without_ffn`: the FFN is removed;
        ffn_fill [N, D]: what it then writes all the same, None for nothing.
        """
        halves = self._kinds[self._kind]
        module = halves.without_ffn if without_ffn else halves.finishing
        if ffn_fill is not None:
            assert without_ffn, "an FFN that is there needs no fill"
            module = halves.with_fill

        def finished(part: slice) -> Tensor:
            if ffn_fill is not None:
                halves.given.values = ffn_fill[part]
            output = module(
                residual[None, part], attention_mask=z[None, part], **self._family.layer_arguments
            )
            # Some layers give their attention's weights as well.
            return (output[0] if isinstance(output, tuple) else output)[0]

        together, tokens = finish_tokens(self._skeleton.ffn_width), len(residual)
        # A graph holds everything anyway, and outlier columns are sought in all tokens at once.
        calibrating = any(linear.calibrating for linear in self._int8)
        if tokens <= together or torch.is_grad_enabled() or calibrating:
            return finished(slice(None))
        out = torch.empty_like(residual)
        for start in range(0, tokens, together):
            part = slice(start, start + together)
            out[part] = finished(part)
        return out

    def run(self, residual: Tensor, segments: Sequence[Segment], cut: LayerCut = WHOLE) -> Tensor:
        """Return the output of the whole layer, [N, D], without what is cut."""
        return cut.finish(self, residual, self.attend(residual, segments).z)

    def run_captured(
        self, residual: Tensor, segments: Sequence[Segment], cut: LayerCut = WHOLE
    ) -> CapturedRun:
        """Run the whole layer, [N, D], without what is cut, and keep its units' outputs for gradients."""
        return self.finish_captured(residual, self.attend(residual, segments).z, cut)

    def finish_captured(self, residual: Tensor, z: Tensor, cut: LayerCut = WHOLE) -> CapturedRun:
        """Return the same from the residual at the layer's input, [N, D], and z, [N, Z]."""
        with self._capturing_ffn() as captured:
            output = cut.finish(self, residual, z)
        if cut.without_ffn:
            return CapturedRun(output, z, None)
        # Many tokens go through the FFN in several parts, where no graph is kept.
        return CapturedRun(output, z, captured[0] if len(captured) == 1 else torch.cat(captured))

    @contextmanager
    def _capturing_ffn(self) -> Iterator[list[Tensor]]:
        """Give a list that gets what the FFN writes into the residual, [N, D] each time it is run."""
        captured: list[Tensor] = []

        def keep_ffn(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            # A copy continues in the graph: gradients reach what was captured, and a layer that adds to it in
            # place leaves that alone.
            captured.append(output.view(-1, output.shape[-1]))
            return captured[-1].view(output.shape).clone()

        handle = self._module.get_submodule(self._written_by).register_forward_hook(keep_ffn)
        try:
            yield captured
        finally:
            handle.remove()


def _float_rows(linear: Any, rows: list[int] | slice, columns: slice = slice(None)) -> Tensor:
    """Return some rows and columns of a linear's weight in float32."""
    if isinstance(linear, Nf4Linear):
        return linear.float_rows(rows, columns)
    weight = linear.weight.detach()[rows, columns]
    return dequantise_rows(weight, linear.SCB[rows]) if isinstance(linear, Int8Linear) else weight.float()


def cut_heads(z: Tensor, keep_heads: Tensor, fill: Tensor | None = None) -> Tensor:
    """Return z under each mask, [V, T, Z]: z [V, T, Z], or [T, Z] for all, times keep_heads [V, H] of 0 and
    1.

    A removed head's slice of the output projection's input becomes zero, or that of `fill` [V or 1, T or 1,
    Z]; the projection's bias stays.
    """
    heads = keep_heads.shape[1]
    by_head, keep = z.unflatten(-1, (heads, -1)), keep_heads[:, None, :, None]
    if fill is None:
        return (by_head * keep).flatten(-2)
    return torch.where(keep > 0, by_head, fill.unflatten(-1, (heads, -1))).flatten(-2)
