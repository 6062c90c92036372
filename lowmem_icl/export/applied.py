"""A mask on a plain transformers model: hooks where the engine cuts, and nothing else is changed.

Axis letters: R rows, T tokens, Z the heads' outputs side by side, D width.
"""

import re
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskModel, fill_of_table
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.families.family import Family
from lowmem_icl.model.skeleton import Skeleton

TABLE = re.compile(r"mean:[0-9a-f]{64}")
"""How masks of files name their table of means."""


class AppliedMask:
    """A mask that is on a model, until it is removed or the `with` that it stands in ends."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self._handles = list(handles)

    @property
    def is_on(self) -> bool:
        """Whether the mask is still on."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the mask off; the model is what it was. Once more does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> "AppliedMask":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def applied(
    mask: Mask, model: PreTrainedModel, means: UnitMeans | None = None, made_on: MaskModel | None = None
) -> AppliedMask:
    """Put a mask on a plain transformers model at once; return what takes it off.

    A removed head's slice of the output projection's input becomes zero, or its mean; what a removed FFN
    writes into the residual likewise. No weight is changed, and several masks may be on together.
    `means`: the table of a mask that puts means in place. `made_on`: the model that the mask was made on,
    whose kind, layers and heads must be this one's. Raises InputError for a model of an unknown family or of
    another shape, for means that do not fit, and for masks that need other documents.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"model: expected a transformers model (PreTrainedModel), got {type(model).__name__}; of a "
            "wrapped one give the model inside"
        )
    skeleton = Skeleton(model.config)
    layers = decoder_layers(model, skeleton.family)
    check_shape(mask, (model.config.model_type, len(layers), skeleton.heads), made_on)
    check_table(mask, means)
    handles: list[RemovableHandle] = []
    try:
        for number, layer in enumerate(layers):
            handles += _on_layer(mask, number, layer, skeleton, means)
    except InputError:
        AppliedMask(handles).remove()
        raise
    return AppliedMask(handles)


def decoder_layers(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """Return a model's decoder layers, with the unembedding or without."""
    for name in (family.blocks, family.blocks.partition(".")[2]):
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise InputError(
        f"model: {type(model).__name__} has no decoder layers at '{family.blocks}'; give a causal language "
        "model, as AutoModelForCausalLM loads it"
    )


def check_shape(mask: Mask, shape: tuple[str, int, int], made_on: MaskModel | None = None) -> None:
    """Raise InputError where a mask was made on a model of another shape (type, layers, heads), or names a
    unit outside of it.
    """
    model_type, layers, heads = shape
    this = f"this model is {model_type} of {layers} layers with {heads} heads"
    if made_on is not None and made_on.shape != shape:
        expected = "{} of {} layers with {} heads".format(*made_on.shape)
        raise InputError(f"mask: made for {expected}, {this}; choose another mask or the model it is for")
    for unit in mask.units():
        if unit.layer >= layers or (unit.head or 0) >= heads:
            raise InputError(f"mask: removes {unit}, {this}, counted from 0; choose another mask")


def check_table(mask: Mask, means: UnitMeans | None) -> None:
    """Raise InputError where what a mask puts in units' place is not here: a table of means, or other
    documents.
    """
    if mask.ablation == "resample":
        raise InputError(
            "mask: puts other documents' values in place (ablation resample), which needs these documents; "
            "evaluate it with lowmem-icl, or give a mask of ablation zero or mean"
        )
    if (means is None) != (mask.ablation != "mean"):
        got = "none" if means is None else "a table"
        raise InputError(
            f"means: expected a table of means with ablation mean, and only there, got {got} with ablation "
            f"{mask.ablation}; read the mask's file, which names its table"
        )
    if means is not None and TABLE.fullmatch(str(mask.fill)) and mask.fill != fill_of_table(means):
        raise InputError(
            f"means: the table's digest is {means.digest[:16]}, the mask names {str(mask.fill)[5:21]}; give "
            "the table that the mask was made with"
        )


def _on_layer(
    mask: Mask, number: int, layer: nn.Module, skeleton: Skeleton, means: UnitMeans | None
) -> list[RemovableHandle]:
    family, heads = skeleton.family, mask.heads_in(number)
    handles = []
    if heads:
        keep = torch.ones(skeleton.heads, dtype=torch.bool)
        keep[list(heads)] = False
        fill = None if means is None else torch.from_numpy(means.heads[number])
        output = layer.get_submodule(family.attention_output)
        handles.append(output.register_forward_pre_hook(_cutting(keep, fill, input_width(output))))
    if number in mask.ffns:
        writing = layer.get_submodule(family.ffn_norm or family.ffn_output)
        given = None if means is None else torch.from_numpy(means.ffns[number])
        if given is not None and len(given) != skeleton.width:
            raise _other_width("ffns", len(given), skeleton.width)
        handles.append(writing.register_forward_hook(_replacing(given)))
    return handles


def _cutting(
    keep: Tensor, fill: Tensor | None, width: int
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return the hook that cuts heads where `keep` [H] is false; fill [Z]: what stands there, None for zeros.

    z is the heads' outputs side by side, [..., Z].
    """
    if fill is not None and len(fill) != width:
        raise _other_width("heads", len(fill), width)
    stays = keep.repeat_interleave(width // len(keep))

    def cut(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        z, *others = arguments
        if z.shape[-1] != width:
            raise InputError(
                f"model: the heads' outputs are {z.shape[-1]} numbers wide here, expected {width}; a model "
                "whose heads are split over devices is not supported"
            )
        other = z.new_zeros(()) if fill is None else fill.to(z)
        return (torch.where(stays.to(z.device), z, other), *others)

    return cut


def _replacing(given: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Return the hook that puts zeros, or the same vector [D] at all tokens, in place of an output."""

    def replace(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if given is None:
            return torch.zeros_like(output)
        # Of its own memory: a layer may add to it in place.
        return given.to(output).expand_as(output).clone()

    return replace


def input_width(linear: Any) -> int:
    """Return how many numbers a linear takes; Conv1D has its inputs first."""
    return int(getattr(linear, "in_features", None) or linear.weight.shape[0])


def _other_width(name: str, got: int, expected: int) -> InputError:
    return InputError(
        f"means: {name} have {got} numbers per layer, this model {expected}; give the table that the mask "
        "was made with"
    )
