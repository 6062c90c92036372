"""What stands for parts of Hugging Face's layer where it is run in halves, or without its FFN.

Axis letters: N tokens of a micro-batch, D width, Z the heads' outputs side by side.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn


class StopAtZ(Exception):
    """Carries z out of a layer's forward: no error, but the end of the first half."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z


class OutputEnd(nn.Module):
    """Stands for the output projection in the first half, and ends it."""

    def forward(self, z: Tensor) -> NoReturn:
        """Raise with z."""
        raise StopAtZ(z)


class KnownAttention(nn.Module):
    """Stands for the attention in the second half: z comes where the layer passes its attention mask."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Return what the attention writes, for z as the mask."""
        written = self.output(attention_mask)
        # Where a layer hands its residual to the attention, it is the attention that adds both.
        return (written if residual is None else residual + written), None


class Nothing(nn.Module):
    """Stands for the linears of a removed FFN: gives zeros, of the last one as many as it would write.

    Of the others two: a layer may halve what a fused one gives.
    """

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.width = width

    def forward(self, values: Tensor) -> Tensor:
        """Return zeros, whatever comes in."""
        return values.new_zeros(*values.shape[:-1], self.width)


class Given(nn.Module):
    """Stands for the last part of a removed FFN: gives what is put in place of what it would write."""

    values: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """Return the values given, in the shape of what comes in."""
        # A copy: a layer may add to it in place.
        return self.values.reshape(values.shape[:-1] + self.values.shape[-1:]).clone()


def share_leaves(source: nn.Module, target: nn.Module) -> None:
    """Put the innermost modules of one layer, which hold all weights, in the place of another's."""
    for name, module in source.named_modules():
        if not any(True for _ in module.children()):
            owner, _, leaf = name.rpartition(".")
            setattr(target.get_submodule(owner), leaf, module)


def with_stand_ins(layer: nn.Module, stand_ins: Mapping[str, nn.Module]) -> nn.Module:
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
