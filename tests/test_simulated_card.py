"""The checks for a card on a simulated one, and what only that can show: which events order the copies."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from card_checks import TIGHT, CardChecks, chosen_task, gradients_on, scores_of_heads_on, swept_on
from simulated_card import CARD, Card, OnCard, simulated_card
from test_engine import ablation_masks, packed_task, swept
from test_head_scores import FORMS, questions

from lowmem_icl.engine.schedule import Job
from lowmem_icl.model.reading import LayerReader
from lowmem_icl.model.staging import CopyStream
from lowmem_icl.model.store import Store

# Of what a decoder could use.
REFUSED = (
    "bincount", "cumsum", "cumsum_", "histc", "kthvalue", "median", "nll_loss_forward", "put_",
    "reflection_pad1d", "replication_pad1d", "scatter_reduce", "upsample_linear1d",
)  # fmt: skip


@pytest.fixture
def card(float_store: Store, int8_store: Store, nf4_store: Store) -> Iterator[Card]:
    """Stores are made before: on the CPU, as always."""
    with simulated_card() as given:
        yield given


class TestOnASimulatedCard(CardChecks):
    @pytest.fixture
    def device(self, card: Card) -> torch.device:
        return CARD


def test_the_simulated_card_is_as_strict_as_a_card(card: Card) -> None:
    there, here = torch.zeros(3, device=CARD), torch.ones(3)
    assert isinstance(there, OnCard)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(TypeError, match="fetched"):
        there.numpy()
    assert (there + here.to(CARD)).cpu().tolist() == [1, 1, 1]
    assert there[torch.tensor([0, 2])].device == CARD


def test_scores_are_bitwise_the_cpus_and_pages_are_unlocked(
    card: Card, int8_store: Store, tmp_path: Path
) -> None:
    """The arithmetic is the CPU's here, so any difference is one of order or place."""
    jobs = [Job(packed_task(2).packed, ablation_masks(3, 4))]
    (expected,) = swept(int8_store, jobs)
    (scores,) = swept_on(CARD, int8_store, jobs, TIGHT, tmp_path, resident=int8_store.layer_bytes)
    np.testing.assert_array_equal(scores.logprobs, expected.logprobs)
    assert not card.pinned
    assert card.unpinned == 2, "both host buffers were locked"


def test_no_operator_is_one_that_torch_refuses_to_do_in_one_order(
    card: Card, float_store: Store, int8_store: Store, tmp_path: Path
) -> None:
    """On a card they would stop a run: see `torch.use_deterministic_algorithms`."""
    task, chosen = chosen_task()
    for store in (float_store, int8_store):
        swept_on(CARD, store, [Job(packed_task(2).packed, ablation_masks(3, 4))], TIGHT, tmp_path)
        gradients_on(CARD, store, task, chosen)
        scores_of_heads_on(CARD, store, questions(FORMS["all"]))
    assert {"bitsandbytes::int8_linear_matmul", "aten::index_add_", "aten::argmax"} <= card.operators
    assert not card.operators & {f"aten::{name}" for name in REFUSED}


def test_pages_that_are_not_locked_are_no_error(
    card: Card, int8_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    card.refuses_to_pin = True
    reader = LayerReader(int8_store.layer_paths, device=CARD)
    for _ in reader.layers(range(3)):
        pass
    reader.close()
    assert card.unpinned == 0
    assert "does not pin" in caplog.text


@pytest.mark.parametrize("forgotten", ["wait_for_host", "wait_for_copy"])
def test_a_forgotten_event_shows(
    card: Card, int8_store: Store, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """What the simulation is worth: without either wait, layers arrive late or overwritten."""
    monkeypatch.setattr(CopyStream, forgotten, lambda *_: None)
    reader, intact = LayerReader(int8_store.layer_paths, device=CARD), LayerReader(int8_store.layer_paths)
    seen = list(range(3)) * 2
    if forgotten == "wait_for_host":
        # Late copies of a consumer that asks for nothing in between.
        monkeypatch.setattr(CopyStream, "wait_for_copy", lambda *_: None)
    wrong = 0
    for (_, ours), (_, theirs) in zip(reader.layers(seen), intact.layers(seen), strict=True):
        wrong += any(not torch.equal(ours[name].cpu(), theirs[name]) for name in theirs)
    reader.close()
    intact.close()
    assert wrong


def test_a_copy_waits_for_the_arithmetic_before_it(card: Card) -> None:
    copies = CopyStream(CARD, 8)
    host, free = torch.arange(8, dtype=torch.uint8), copies.now()
    target = copies.buffer(1)
    copied = copies.copy(1, [(host, target)], free)
    assert copies._stream.waited_for == [free]  # type: ignore[attr-defined]
    copies.wait_for_copy(copied)
    assert target.cpu().tolist() == host.tolist()
