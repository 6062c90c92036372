"""A mask on a plain model in use: gradients, half precision, heads that are split over devices."""

from typing import Any

import pytest
import torch
from family_models import CASES, HEADS
from mask_equalities import MASKS, heads_of
from torch import Tensor

from lowmem_icl.errors import InputError
from lowmem_icl.export.applied import applied
from lowmem_icl.masks.mask import Mask

TOKENS = torch.arange(4, 24)[None]
MASK = MASKS["scattered"]
KINDS = ["opt", "llama", "gemma2", "falcon rw"]


@pytest.fixture(params=KINDS)
def named(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def silenced(model: Any, name: str, mask: Mask) -> Any:
    """The same by hand: zeros in the weights that read removed heads, and in those that FFNs write with."""
    case = CASES[name]
    with torch.no_grad():
        for layer, head in mask.heads:
            weight: Any = case.module(model, layer, case.output).weight
            width = weight.shape[1] // HEADS
            weight[:, head * width : (head + 1) * width] = 0
        for layer in mask.ffns:
            for parameter in case.module(model, layer, case.ffn).parameters():
                parameter.zero_()
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS).logits.log_softmax(-1)[0, -1, 7].backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_gradients_flow_around_what_is_removed(named: str) -> None:
    case, model = CASES[named], CASES[named].make()
    with applied(MASK, model):
        found = gradients(model)
    expected = gradients(silenced(case.make(), named, MASK))
    removed: list[str] = []
    for name, other in expected.items():
        # What only a removed FFN uses gets none at all.
        value = found.get(name, torch.zeros_like(other))
        if any(f".{layer}.{case.ffn}." in name for layer in MASK.ffns):
            # By hand its weights are there, and would move; with a mask nothing behind it does.
            assert not value.any()
            removed.append(name)
        elif case.output in name and name.endswith("weight"):
            layer, width = int(name.split(f".{case.output}")[0].rpartition(".")[2]), value.shape[1] // HEADS
            for head in range(HEADS):
                columns = slice(head * width, (head + 1) * width)
                if (layer, head) in MASK.heads:
                    assert not value[:, columns].any()
                else:
                    torch.testing.assert_close(value[:, columns], other[:, columns], atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4)
    assert removed
    assert any(value.any() for value in found.values())


def test_half_precision_stays_and_is_exact(named: str) -> None:
    case = CASES[named]
    model = case.make().to(torch.bfloat16)
    by_hand = silenced(case.make().to(torch.bfloat16), named, MASK)
    with torch.no_grad(), applied(MASK, model):
        found = model(TOKENS).logits
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, by_hand(TOKENS).logits, atol=0, rtol=0)


def test_heads_that_are_split_over_devices_are_refused() -> None:
    """Tensor parallelism leaves each device's projection a part of the heads' outputs."""
    model = CASES["llama"].make()
    with applied(Mask(heads_of(l1=(2,))), model):
        output = model.model.layers[1].self_attn.o_proj
        with pytest.raises(InputError, match=r"36 numbers wide here, expected 72; .* split over devices"):
            output(torch.zeros(1, 3, 36))
