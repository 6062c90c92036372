"""Which device is taken, how much of it, and what is said where that fails; no card is needed."""

from collections.abc import Iterator

import pytest
import torch
from simulated_card import Card, simulated_card

from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.system import machine
from lowmem_icl.system.machine import (
    describe_machine,
    device_allowance,
    device_in_use,
    device_type,
    resolved_device,
)

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def cards() -> Iterator[Card]:
    """Two cards; the second has more free memory."""
    machine._freest_device.cache_clear()
    with simulated_card(2) as given:
        given.free = [3 * 10**9, 20 * 10**9]
        yield given
    machine._freest_device.cache_clear()


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_of_several_cards_the_one_with_most_free_memory_is_taken(cards: Card, name: str) -> None:
    assert resolved_device(name) == SECOND
    cards.free = [20 * 10**9, 10**9]
    assert resolved_device(name) == SECOND, "a process stays where it began"
    assert resolved_device("cuda:0") == torch.device("cuda", 0)
    assert resolved_device("cpu") == CPU


def test_of_equal_cards_the_first_is_taken_and_a_full_one_is_no_error(
    cards: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards.free = [5, 5]
    assert resolved_device("auto").index == 0
    machine._freest_device.cache_clear()

    def full(device: int) -> tuple[int, int]:
        if device == 0:
            raise RuntimeError("CUDA error: out of memory")
        return 1, 2

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    assert resolved_device("auto").index == 1


def test_a_card_that_is_not_there_is_named_with_those_that_are(cards: Card) -> None:
    with pytest.raises(
        InputError, match=r"--device cuda:9: torch sees 2 CUDA devices here, cuda:0 to cuda:1"
    ):
        device_type("cuda:9")
    assert device_type("cuda:1") == device_type("auto") == "cuda"


def test_without_a_card_auto_is_the_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert resolved_device("auto") == CPU
    for name in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=f"--device {name}: torch sees no CUDA device here"):
            resolved_device(name)


def test_the_allowance_is_what_was_asked_for_or_a_share_of_what_is_free(cards: Card) -> None:
    assert device_allowance(SECOND, None, 0.8) == 16 * 10**9
    assert device_allowance(SECOND, 10**9, 0.8) == 10**9
    said = "23GB: cuda:1 has 24 GB, 20 GB of them free; give at most --device-memory 20000MB"
    with pytest.raises(DoesNotFit, match=said):
        device_allowance(SECOND, 23 * 10**9, 0.8)


def test_what_torch_keeps_unused_counts_as_free(cards: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
    assert device_allowance(SECOND, None, 1.0) == 22 * 10**9


def test_torch_is_held_to_device_memory_and_to_whole_floats(cards: Card) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with device_in_use(SECOND, 6 * 10**9):
            assert cards.share == 0.25
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert cards.emptied == 0
        assert (cards.emptied, cards.share) == (1, 1.0)
        assert torch.get_float32_matmul_precision() == "high", "the caller's settings come back"
        assert not torch.are_deterministic_algorithms_enabled()
        with device_in_use(SECOND, None):
            assert cards.share == 1.0
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_exhaustion_says_what_to_give(
    cards: Card, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 10**9)
    cards.free[1] = 10**9
    said = (
        r"^--device-memory 6GB: cuda:1 ran out of memory; 2 GB were held here, 1 of its 24 GB are free; give "
        r"--device-memory 2400MB, or end what else is on the device; finished parts are kept"
    )
    with pytest.raises(DoesNotFit, match=said) as caught, device_in_use(SECOND, 6 * 10**9):
        raise error
    assert caught.value.exit_code == 3
    assert caught.value.__cause__ is error
    with pytest.raises(DoesNotFit, match=r"^--device-memory: cuda:1 ran out"), device_in_use(SECOND, None):
        raise error


def test_on_the_cpu_nothing_is_turned_into_a_refusal() -> None:
    with pytest.raises(torch.OutOfMemoryError), device_in_use(CPU, None):
        raise torch.OutOfMemoryError("not ours")


def test_a_run_on_the_cpu_does_not_name_a_card(cards: Card) -> None:
    assert describe_machine(CPU)["cuda"] is None
    assert describe_machine(SECOND)["cuda"] == "simulated"
