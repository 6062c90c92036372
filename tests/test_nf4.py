"""NF4 against bitsandbytes' own functions, its formula written out, and dense products."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from commands import invoke
from conftest import make_checkpoint, make_store, reference_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.conversion.convert import planned_store
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.errors import InputError
from lowmem_icl.model import nf4
from lowmem_icl.model.nf4 import Nf4Linear, packed_shape, product_bytes, quantise_nf4, stored_bytes
from lowmem_icl.model.store import open_store
from lowmem_icl.planning import measure
from lowmem_icl.report.run_tables import read_run


def random_weight(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def filled(parts: dict[str, torch.Tensor], inputs: int, outputs: int, bias: bool) -> Nf4Linear:
    made = Nf4Linear(inputs, outputs, bias)
    made.fill(parts)
    made.bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)) if bias else None
    return made


def linear(inputs: int, outputs: int, bias: bool = True, seed: int = 0) -> Nf4Linear:
    return filled(quantise_nf4("weight", random_weight(outputs, inputs, seed)), inputs, outputs, bias)


def by_formula(packed: torch.Tensor, state: QuantState, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight from its numbers: 16 values times maxima, 256 values times their maxima plus the mean."""
    flat, nested = packed.view(-1), state.state2
    codes = torch.stack([flat >> 4, flat & 15], 1).view(-1)[: torch.Size(shape).numel()].long()
    steps = torch.arange(len(state.absmax)) // nested.blocksize
    maxima = nested.code[state.absmax.long()] * nested.absmax[steps] + state.offset
    return (state.code[codes] * maxima[torch.arange(len(codes)) // state.blocksize]).view(shape)


@settings(max_examples=12, deadline=None)
@given(outputs=st.integers(1, 90), inputs=st.integers(1, 200), seed=st.integers(0, 99))
def test_a_weight_is_rounded_as_bitsandbytes_rounds_it(outputs: int, inputs: int, seed: int) -> None:
    """Packed values are theirs; of the maxima the mean alone is added in float64 before they are rounded."""
    weight = random_weight(outputs, inputs, seed)
    parts = quantise_nf4("weight", weight)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(parts["weight"], packed)
    assert parts["weight"].shape == packed_shape((outputs, inputs))
    torch.testing.assert_close(parts["weight.nested_offset"], state.offset)
    ours = linear(inputs, outputs, seed=seed).float_rows(slice(None))
    largest = float(state.state2.absmax.max())
    torch.testing.assert_close(ours, by_formula(packed, state, (outputs, inputs)), atol=largest / 60, rtol=0)


@pytest.mark.parametrize("shape", [(30, 40), (64, 128), (64, 96), (33, 65), (7, 3), (300, 16384)])
def test_a_stored_weight_is_dequantised_bitwise_by_the_formula(shape: tuple[int, int]) -> None:
    """As bitsandbytes reads it by its own description; rows that end within a block it scales wrongly on the
    CPU, so there the formula is asked.
    """
    parts = quantise_nf4("weight", random_weight(*shape))
    own = {name: value for name, value in parts.items() if name not in ("weight", "weight.nested_offset")}
    state = QuantState.from_dict(own, torch.device("cpu"))
    found = filled(parts, shape[1], shape[0], bias=False).float_rows(slice(None))
    assert torch.equal(found, by_formula(parts["weight"], state, shape))
    if shape[1] % 64 == 0:
        assert torch.equal(found, dequantize_4bit(parts["weight"], state))


def test_bitsandbytes_own_layer_reads_a_store(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden_size=64, word_embed_proj_dim=64, ffn_dim=192)
    tensors = load_file(make_store(source, tmp_path / "store", "nf4").layer_paths[1])
    parts = {
        name.removeprefix("fc2."): value for name, value in tensors.items() if name.startswith("fc2.weight")
    }
    theirs = bnb.nn.Linear4bit(192, 64, compute_dtype=torch.float32, quant_type="nf4")
    own = {name: value for name, value in parts.items() if name not in ("weight", "weight.nested_offset")}
    theirs.weight = bnb.nn.Params4bit.from_prequantized(tensors["fc2.weight"], own, device="cpu")
    theirs.bias = torch.nn.Parameter(tensors["fc2.bias"])
    ours = filled(parts, 192, 64, bias=True)
    ours.bias = tensors["fc2.bias"]
    dequantised = dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.float_rows(slice(None)), dequantised)
    values = torch.randn(200, 192)
    torch.testing.assert_close(ours(values), theirs(values).detach(), rtol=1e-5, atol=1e-5)
    near = reference_model(source).model.decoder.layers[1].fc2.weight.detach()
    assert (dequantised - near).norm() / near.norm() < 0.1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (40, 300), (4096, 700)])
def test_a_layer_is_a_dense_product(inputs: int, outputs: int, bias: bool) -> None:
    layer, values = linear(inputs, outputs, bias), torch.randn(150, inputs)
    exact = values.double() @ layer.float_rows(slice(None)).double().T
    exact += 0 if layer.bias is None else layer.bias.double()
    assert (layer(values).double() - exact).norm() / exact.norm() < 1e-6


def test_a_row_is_bitwise_the_same_in_any_company() -> None:
    layer, values = linear(96, 80), torch.randn(300, 96)
    whole, back = layer(values), layer.multiply_back(values[:, :80])
    for rows in (slice(0, 1), slice(5, 7), slice(100, 229), slice(17, 300)):
        assert torch.equal(layer(values[rows].clone()), whole[rows])
        assert torch.equal(layer.multiply_back(values[rows, :80]), back[rows])
    order = torch.randperm(300)
    assert torch.equal(layer(values[order]), whole[order])


def test_gradients_go_through_the_dequantised_weight() -> None:
    layer, values = linear(40, 30), torch.randn(2, 9, 40, requires_grad=True)
    upstream = torch.randn(2, 9, 30)
    out = layer(values)
    out.backward(upstream)
    dense = values.detach().clone().requires_grad_()
    expected = torch.nn.functional.linear(dense, layer.float_rows(slice(None)), layer.bias)
    expected.backward(upstream)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(values.grad, dense.grad)


def test_blocks_of_a_weight_are_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, values = linear(100, 300), torch.randn(20, 100)
    whole, weight = layer(values), layer.float_rows(slice(None))
    monkeypatch.setattr(nf4, "PRODUCT_ELEMENTS", 1)
    assert [outputs.start for outputs, _ in layer.weight_blocks()] == [0, 64, 128, 192, 256]
    assert torch.equal(torch.cat([block for _, block in layer.weight_blocks()]), weight)
    torch.testing.assert_close(layer(values), whole)
    for rows, columns in (([3, 64, 299], slice(10, 20)), (slice(60, 70), slice(None)), ([5], slice(1))):
        assert torch.equal(layer.float_rows(rows, columns), weight[rows][:, columns])
    assert product_bytes(100) >= 4 * 64 * 100


def test_a_weight_is_rounded_the_same_in_any_pieces_precision_and_by_any_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(700, 100).half()
    whole = quantise_nf4("weight", weight)
    monkeypatch.setattr(nf4, "CONVERTED_ELEMENTS", 64 * 5)
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        again = quantise_nf4("weight", weight.float())
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[name], value) for name, value in whole.items())
    torch.set_num_threads(threads)


def test_nothing_but_zeros_stays_zero() -> None:
    parts = quantise_nf4("weight", torch.zeros(5, 40))
    assert not filled(parts, 40, 5, bias=False)(torch.randn(3, 40)).any()


def test_a_weight_takes_a_quarter_of_half_precision() -> None:
    shape = (2048, 512)
    size = sum(value.nbytes for value in quantise_nf4("weight", random_weight(*shape)).values())
    assert size == pytest.approx(stored_bytes(shape), rel=1e-3)
    assert size / (2048 * 512 * 2) == pytest.approx(1 / 4, rel=0.04)


def test_a_store_of_other_parameters_is_refused(tmp_path: Path) -> None:
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", "nf4")
    path = store.folder / "manifest.json"
    content = json.loads(path.read_text())
    assert content["nf4"] == {
        "quant_type": "nf4", "blocksize": 64, "double_quant": True, "nested_blocksize": 256
    }  # fmt: skip
    path.write_text(json.dumps(content | {"nf4": content["nf4"] | {"blocksize": 128}}))
    with pytest.raises(InputError, match=r"field 'nf4\.blocksize'"):
        open_store(store.folder)
    content.pop("nf4")
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="need a field 'nf4'"):
        open_store(store.folder)


@pytest.mark.parametrize("largest", [measure.LARGEST_WHOLE, 0], ids=["a layer", "its products"])
def test_a_machine_is_measured_with_weights_in_nf4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(measure, "LARGEST_WHOLE", largest)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "checkpoint"))
    store = planned_store(checkpoint, tmp_path / "store", "nf4")
    limits = SweepLimits(alive_bytes=1 << 24, micro_batch_tokens=256)
    rates = measure.measure(store, 32, limits, torch.device("cpu"), backward=True)
    # Of a part it is the difference of two moments, which may come to nothing.
    assert min(rates.attention_seconds, rates.ffn_seconds) >= 0
    assert min(rates.attention_seconds + rates.ffn_seconds, rates.backward_seconds) > 0


def test_a_plan_counts_the_bytes_of_nf4(tmp_path: Path) -> None:
    small = ("--tasks", "recall", "--shots", 0, "--limit", 4, "--experiments", "evaluate", "--json")
    plans = {}
    for weights in ("int8", "nf4"):
        told = invoke("plan", "--store-dir", tmp_path / weights, *small, "--weights", weights)
        assert told.exit_code == 0, told.output
        plans[weights] = json.loads(told.stdout)
    made = invoke("convert", "demo", "--store-dir", tmp_path / "nf4", "--weights", "nf4")
    store = open_store(Path(made.stdout.strip()))
    tokenizer = sum(file.size_bytes for name, file in store.manifest.files.items() if "tokenizer" in name)
    assert plans["nf4"]["store_bytes"] == pytest.approx(store.size_bytes - tokenizer, rel=0.03)
    assert plans["nf4"]["store_bytes"] < plans["int8"]["store_bytes"]


def test_a_runs_tables_say_which_form_it_was(tmp_path: Path, stores: Path) -> None:
    asked = ("--tasks", "recall", "--shots", 0, "--limit", 4, "--train-limit", 2)
    done = invoke(
        "run", "--weights", "nf4", "--experiments", "evaluate,importance", *asked,
        "--store-dir", stores, "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    run = read_run(tmp_path / "run")
    assert run.results["weights"].unique().to_list() == ["nf4"]
    assert run.record["model"]["weights"] == "nf4"
    told = invoke("run", "--model", run.record["model"]["store"], *asked, "--out", tmp_path / "again")
    assert told.exit_code == 2
    assert "--weights int8: the store" in told.output
    assert "holds nf4; give --weights nf4" in " ".join(told.output.split())
