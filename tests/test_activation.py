"""Activation functions: as torch has them, and the same whatever a value comes with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.activations import ACT2FN

from lowmem_icl.model.activation import SteadyActivation, steady_activations

FUNCTIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu")


@settings(max_examples=40)
@given(
    name=st.sampled_from(FUNCTIONS),
    rows=st.integers(1, 300),
    width=st.integers(1, 150),
    start=st.integers(0, 20),
    threads=st.sampled_from([1, 2, 3]),
)
def test_a_rows_result_does_not_depend_on_the_others(
    name: str, rows: int, width: int, start: int, threads: int
) -> None:
    torch.manual_seed(0)
    function, before = SteadyActivation(ACT2FN[name]), torch.get_num_threads()
    values = torch.randn(start + rows, width) * 4
    try:
        torch.set_num_threads(threads)
        together = function(values)
        torch.set_num_threads(1)
        alone = function(values[start:])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together[start:], alone)
    torch.testing.assert_close(together, ACT2FN[name](values), atol=1e-6, rtol=1e-5)


def test_gradients_go_through() -> None:
    values = torch.randn(7, 9, requires_grad=True)
    (given_,) = torch.autograd.grad(SteadyActivation(nn.SiLU())(values).sum(), values)
    (expected,) = torch.autograd.grad(nn.SiLU()(values).sum(), values)
    torch.testing.assert_close(given_, expected)


@pytest.mark.parametrize(("function", "is_wrapped"), [(nn.SiLU(), True), (nn.ReLU(), False)])
def test_what_rounds_is_wrapped_and_nothing_else(function: nn.Module, is_wrapped: bool) -> None:
    layer = nn.ModuleDict(
        {"norm": nn.LayerNorm(4), "act": function, "drop": nn.Dropout(), "up": nn.Linear(4, 4)}
    )
    steady_activations(layer)
    assert isinstance(layer["act"], SteadyActivation) == is_wrapped
    assert not any(isinstance(layer[name], SteadyActivation) for name in ("norm", "drop", "up"))
