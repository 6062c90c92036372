"""What a layer holds at its widest moment, by torch's own count, against what the plan counts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from family_models import CASES
from torch import Tensor
from transformers import PretrainedConfig

from lowmem_icl.engine.copying import copying_eigenvalues
from lowmem_icl.engine.row_masks import plain_segments
from lowmem_icl.engine.unit_gradients import one_layer_back
from lowmem_icl.model.int8 import quantise_rows
from lowmem_icl.model.layer import WHOLE, DecoderLayer
from lowmem_icl.model.nf4 import product_bytes, quantise_nf4
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Weights
from lowmem_icl.planning.memory import backward_bytes, forward_bytes
from lowmem_icl.rows import Row

CPU = torch.device("cpu")


def live_peak(work: Callable[[], object]) -> int:
    """Return the most bytes of tensors that some work holds at once, temporary ones included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def random_layer(skeleton: Skeleton, weights: Weights = "int8") -> DecoderLayer:
    """Return a layer in int8 or NF4 with random weights."""
    generator, linears = torch.Generator().manual_seed(0), set(skeleton.linear_names())
    tensors: dict[str, Tensor] = {}
    for name, shape in skeleton.layer_parameters().items():
        owner, _, leaf = name.rpartition(".")
        values = torch.randn(shape, generator=generator) * 0.1
        if owner in linears and leaf == "weight" and weights == "nf4":
            tensors |= quantise_nf4(name, values)
        elif owner in linears and leaf == "weight":
            tensors[name], tensors[f"{owner}.SCB"] = quantise_rows(values)
        else:
            tensors[name] = values
    layer = DecoderLayer(skeleton, weights, CPU)
    layer.fill(0, tensors)
    return layer


def plain_row(length: int) -> Row:
    tokens = np.arange(length)
    last, nothing = np.array([length - 1]), np.zeros(1, dtype=np.int64)
    return Row(tokens, tokens, np.full(length, length), np.zeros(length, np.int64), last, nothing, nothing)


def peaks(
    config: PretrainedConfig, length: int, rows: int, weights: Weights = "int8"
) -> tuple[Skeleton, int, int]:
    """Return what rows of a length take on their way forward and back through a layer."""
    skeleton = Skeleton(config)
    layer = random_layer(skeleton, weights)
    model: Any = SimpleNamespace(skeleton=skeleton, device=CPU)
    members = [plain_row(length)] * rows
    entering, gradient = torch.randn(2, length * rows, skeleton.width)
    with torch.no_grad():
        segments = plain_segments(model, members)
        forward = live_peak(lambda: layer.run(entering, segments))
    back = live_peak(lambda: one_layer_back(model, layer, members, WHOLE, entering.clone(), gradient))
    return skeleton, forward, back


@pytest.mark.parametrize("name", ["opt", "gpt2", "gptj", "gemma2", "olmo2", "bloom"])
def test_a_layer_holds_no_more_than_is_counted(name: str) -> None:
    length, rows = 90, 10
    skeleton, forward, back = peaks(CASES[name].make().config, length, rows)
    assert forward <= forward_bytes(skeleton, length * rows, length)
    assert back <= backward_bytes(skeleton, length * rows, length)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma2"])
def test_a_layer_in_nf4_holds_a_block_of_a_weight_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_icl.model.nf4.PRODUCT_ELEMENTS", 1 << 14)
    length, rows = 90, 10
    skeleton, forward, back = peaks(CASES[name].make().config, length, rows, "nf4")
    block = product_bytes(max(inputs for _, inputs in skeleton.linear_shapes.values()))
    assert forward <= forward_bytes(skeleton, length * rows, length) + block
    assert back <= backward_bytes(skeleton, length * rows, length) + block


def test_no_whole_weight_in_nf4_is_in_floating_point() -> None:
    config = small_config(
        hidden_size=1024, word_embed_proj_dim=1024, ffn_dim=16384, num_attention_heads=8, num_hidden_layers=1
    )
    skeleton, forward, back = peaks(config, 32, 1, "nf4")
    assert forward <= forward_bytes(skeleton, 32, 32) + product_bytes(16384)
    assert back <= backward_bytes(skeleton, 32, 32) + product_bytes(16384)
    assert max(forward, back) < 4 * 1024 * 16384 / 2, "half of an FFN weight's float32 form"


def test_a_long_row_goes_through_the_ffn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(hidden_size=32, word_embed_proj_dim=32, ffn_dim=2048, num_attention_heads=4)
    layer = random_layer(Skeleton(config))
    residual, z = torch.randn(2, 1000, 32)
    with torch.no_grad():
        whole = layer.finish(residual, z)
        at_once = live_peak(lambda: layer.finish(residual, z))
        monkeypatch.setattr("lowmem_icl.model.layer.FFN_ELEMENTS", 1)
        in_parts = live_peak(lambda: layer.finish(residual, z))
        assert torch.equal(layer.finish(residual, z), whole), "tokens do not meet there"
    assert in_parts < at_once / 4
    assert in_parts <= forward_bytes(Skeleton(config), 1000, 1000)


def test_no_whole_weight_is_in_floating_point_on_the_way_back() -> None:
    config = small_config(
        hidden_size=1024, word_embed_proj_dim=1024, ffn_dim=16384, num_attention_heads=8, num_hidden_layers=1
    )
    skeleton, _, back = peaks(config, length=32, rows=1)
    assert back <= backward_bytes(skeleton, 32, 32)
    assert back < 4 * 1024 * 16384 / 2, "half of an FFN weight's float32 form"


def test_heads_are_scored_one_after_the_other_by_their_weights() -> None:
    config = small_config(
        hidden_size=1024, word_embed_proj_dim=1024, ffn_dim=64, num_attention_heads=16, num_hidden_layers=1
    )
    layer, products = random_layer(Skeleton(config)), torch.randn(1024, 1024)
    assert live_peak(lambda: copying_eigenvalues(layer, products, 16)) < products.nbytes
