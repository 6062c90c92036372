"""Activation functions whose result for a value does not depend on how many others come with it.

torch computes most of them a vector register at a time, and what does not fill one by other code, whose last
bit may differ. Where such a rest lies depends on the number of values and of threads.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Elements of one step of torch's vectorised loops, at most: two registers of AVX512, or four of AVX2.
STEP = 64
# How many elements torch gives to a thread at least.
GRAIN = 32768
EXACT = (nn.ReLU, nn.Dropout, nn.Identity)


class SteadyActivation(nn.Module):
    """An activation function on values filled up to whole steps for every thread."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        """Return the function of every value, in the same shape."""
        if values.is_cuda:
            return self.function(values)
        flat = values.reshape(-1)
        threads = min(torch.get_num_threads(), -(-len(flat) // GRAIN))
        missing = -len(flat) % (STEP * max(1, threads))
        if missing:
            return self.function(pad(flat, (0, missing)))[: len(flat)].view(values.shape)
        return self.function(flat).view(values.shape)


def steady_activations(layer: nn.Module) -> None:
    """Wrap every activation function of a layer: what has neither parts nor weights, and rounds."""
    for name, module in list(layer.named_modules()):
        held = [*module.children(), *module.parameters(), *module.buffers()]
        if not held and not isinstance(module, EXACT):
            owner, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, SteadyActivation(module))
