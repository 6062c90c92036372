"""LLM.int8 against bitsandbytes' own operators, and the gradient through it."""

from typing import Any

import bitsandbytes  # noqa: F401  registers the operators
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_icl.model import int8
from lowmem_icl.model.int8 import (
    Int8Linear,
    SharedInput,
    add_product_in_fixed_rows,
    dequantise_rows,
    matmul_in_fixed_rows,
    product_in_float_blocks,
    product_with_weight,
    quantise_rows,
    slow_product_note,
)

operators = torch.ops.bitsandbytes


def linear(
    inputs: int, outputs: int, seed: int = 0, columns: tuple[int, ...] = (), bias: bool = True
) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    made = Int8Linear(inputs, outputs, bias)
    made.weight, made.SCB = quantise_rows(torch.randn(outputs, inputs, generator=generator))
    made.bias = torch.randn(outputs, generator=generator) if bias else None
    made.outlier_columns = torch.tensor(columns, dtype=torch.int64)
    made.refresh()
    return made


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 99), zero=st.booleans())
def test_quantising_is_bitwise_bitsandbytes(rows: int, columns: int, seed: int, zero: bool) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3
    ours, maxima = quantise_rows(values)
    theirs, expected, _ = operators.int8_vectorwise_quant(values.clone(), 0.0)
    assert torch.equal(ours, theirs)
    assert torch.equal(maxima, expected)
    if zero:
        assert not quantise_rows(torch.zeros(3, 4))[0].any()


@pytest.mark.parametrize("columns", [(), (1, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_equals_bitsandbytes_operators_in_float64(columns: tuple[int, ...], bias: bool) -> None:
    layer, values = linear(64, 48, columns=columns, bias=bias), torch.randn(150, 64)
    values[:, list(columns)] *= 20
    inside = values.clone()
    inside[:, list(columns)] = 0
    quantised, maxima, _ = operators.int8_vectorwise_quant(inside, 0.0)
    product = operators.int8_linear_matmul(quantised, layer.weight).double()
    expected = product * maxima.double()[:, None] * layer.SCB.double() / 127**2
    weight = layer.weight.double() * layer.SCB.double()[:, None] / 127
    expected += values[:, list(columns)].double() @ weight[:, list(columns)].T
    expected += 0 if layer.bias is None else layer.bias.double()
    relative = (layer(values).double() - expected).norm() / expected.norm()
    assert relative < 1e-6
    exact = values.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
    assert (layer(values).double() - exact).norm() / exact.norm() < 0.02, (
        "quantising activations costs little"
    )


def test_a_row_is_bitwise_the_same_in_any_company() -> None:
    layer, values = linear(96, 80, columns=(3, 50)), torch.randn(300, 96)
    whole = layer(values)
    for rows in (slice(0, 1), slice(5, 7), slice(100, 229), slice(17, 300)):
        assert torch.equal(layer(values[rows].clone()), whole[rows])
    order = torch.randperm(300)
    assert torch.equal(layer(values[order]), whole[order])


def test_float_products_have_one_shape() -> None:
    left, right = torch.randn(129, 33), torch.randn(33, 20)
    whole = matmul_in_fixed_rows(left, right)
    torch.testing.assert_close(whole, left @ right)
    assert torch.equal(matmul_in_fixed_rows(left[7:9], right), whole[7:9])


def test_products_are_added_the_same_in_any_company() -> None:
    out, left, right = torch.randn(300, 20), torch.randn(300, 5), torch.randn(5, 20)
    whole = out.clone()
    add_product_in_fixed_rows(whole, left, right, 128)
    torch.testing.assert_close(whole, out + left @ right)
    for rows in (slice(7, 9), slice(100, 229), slice(17, 300)):
        alone = out[rows].clone()
        add_product_in_fixed_rows(alone, left[rows], right, 128)
        assert torch.equal(alone, whole[rows])


def test_gradients_go_through_the_dequantised_weight() -> None:
    layer, values = linear(40, 30, columns=(2,)), torch.randn(2, 9, 40, requires_grad=True)
    upstream = torch.randn(2, 9, 30)
    layer(values).backward(upstream)
    weight = layer.weight.float() * layer.SCB[:, None] / 127
    torch.testing.assert_close(values.grad, upstream @ weight)


def test_a_gradient_is_bitwise_the_same_in_any_company() -> None:
    layer, gradient = linear(96, 80), torch.randn(300, 80)
    whole = product_with_weight(gradient, layer.weight, layer.SCB)
    for rows in (slice(0, 1), slice(5, 7), slice(100, 229), slice(17, 300)):
        assert torch.equal(product_with_weight(gradient[rows], layer.weight, layer.SCB), whole[rows])


@pytest.mark.parametrize("blocks", [(16, 2048), (1024, 16), (32, 48)])
def test_blocks_of_a_dequantised_weight_give_the_whole_product(blocks: tuple[int, int]) -> None:
    layer, gradient = linear(100, 70), torch.randn(150, 70)
    expected = gradient.double() @ (layer.weight.double() * layer.SCB.double()[:, None] / 127)
    whole = product_with_weight(gradient, layer.weight, layer.SCB)
    in_blocks = product_with_weight(gradient, layer.weight, layer.SCB, blocks)
    for found in (whole, in_blocks):
        assert (found.double() - expected).norm() / expected.norm() < 1e-6


def test_dequantising_is_bitwise_bitsandbytes() -> None:
    layer = linear(40, 30)
    theirs = operators.int8_vectorwise_dequant(layer.weight, layer.SCB)
    assert torch.equal(dequantise_rows(layer.weight, layer.SCB), theirs)


def test_calibration_finds_the_columns_with_large_activations() -> None:
    layer, values = linear(16, 8), torch.rand(20, 16)
    values[3, 5], values[4, 11] = 7.0, -6.0
    layer.calibrating = True
    layer(values)
    assert layer.outlier_columns.tolist() == [5, 11]
    layer(torch.rand(4, 16) + torch.nn.functional.one_hot(torch.tensor(0), 16) * 9)
    assert layer.outlier_columns.tolist() == [0, 5, 11], "columns are added, none is lost"


def test_a_shared_input_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(values: torch.Tensor) -> Any:
        calls.append(1)
        return quantise_rows(values)

    monkeypatch.setattr(int8, "quantise_rows", counted)
    shared = SharedInput()
    layers = [Int8Linear(8, 8, False, shared) for _ in range(3)]
    for number, layer in enumerate(layers):
        made = linear(8, 8, seed=number, bias=False)
        layer.weight, layer.SCB = made.weight, made.SCB
    values = torch.randn(4, 8)
    together = [layer(values) for layer in layers]
    assert len(calls) == 1
    shared.forget()
    assert torch.equal(layers[2](values.clone()), together[2])


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9), inputs=st.integers(1, 2500), outputs=st.integers(1, 1100), seed=st.integers(0, 99)
)
def test_float_blocks_give_the_integer_product(rows: int, inputs: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, generator=generator)
    right = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    exact = left.numpy().astype(np.int64) @ right.numpy().astype(np.int64).T
    assert np.array_equal(product_in_float_blocks(left, right).numpy(), exact)


@pytest.mark.parametrize("inputs", [1024, 9216, 36864])
@pytest.mark.parametrize("sign", [1, -1])
def test_float_blocks_are_exact_where_all_products_have_one_sign(inputs: int, sign: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    left = torch.randint(100, 128, (3, inputs), dtype=torch.int8, generator=generator)
    right = torch.randint(100, 128, (5, inputs), dtype=torch.int8, generator=generator) * sign
    exact = left.numpy().astype(np.int64) @ right.numpy().astype(np.int64).T
    assert np.array_equal(product_in_float_blocks(left, right).numpy(), exact)


def test_a_cpu_without_the_instructions_multiplies_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, values = linear(2048, 32), torch.randn(7, 2048)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with_instructions = layer(values)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    without = layer(values)
    assert torch.equal(with_instructions, without)
    monkeypatch.setattr(int8, "product_in_float_blocks", lambda left, right: torch.zeros(7, 32))
    assert not torch.equal(layer(values), without)


def test_a_cpu_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert slow_product_note() is None
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert "AVX512-VNNI" in (slow_product_note() or "")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "float32" in (slow_product_note() or "")
