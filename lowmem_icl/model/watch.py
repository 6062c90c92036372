"""Whether what goes through a model stays finite: one sum of squares, looked at once in a while.

A norm divides by the squares of what enters it. Where their sum leaves float32's range it gives zeros or NaN,
so that a sum which is not finite tells of NaN, of infinity, and of values that a norm would silently lose.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class FiniteWatch:
    """Sums up the squares of all that enters some norms; nothing waits for the device until it is asked."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)

    def follow(self, norms: Iterable[nn.Module]) -> None:
        """Add what enters these norms from now on."""
        for norm in norms:
            norm.register_forward_pre_hook(self._enter)

    def overflowed(self) -> bool:
        """Tell whether anything since the last call may have been too large, or no number; forget it."""
        is_finite = bool(self._sum.isfinite())
        self._sum.zero_()
        return not is_finite

    def _enter(self, norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        values: Tensor = arguments[0].detach().reshape(-1)
        self._sum += values.dot(values)


def norms_of(module: nn.Module) -> list[nn.Module]:
    """Return the norms of a model's part: transformers has a class for each, whose name says so."""
    return [part for part in module.modules() if "Norm" in type(part).__name__]


def is_lost(states: Tensor) -> Tensor:
    """Tell of tokens [N, D] which have no finite sum of squares, [N]."""
    return ~states.square().sum(-1).isfinite()
