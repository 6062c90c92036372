"""The suite for a card: `pytest -m cuda`, a few minutes where there is one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from card_checks import GRADIENTS, TIGHT, CardChecks, assert_equal, chosen_task, gradients_on, swept_on
from commands import invoke
from test_engine import ablation_masks, packed_task, swept

from lowmem_icl.engine.schedule import Job
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.model.reading import LayerReader
from lowmem_icl.model.store import Store
from lowmem_icl.system.machine import device_in_use, resolved_device

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


class TestOnACard(CardChecks):
    @pytest.fixture
    def device(self) -> Iterator[torch.device]:
        device = resolved_device("cuda")
        with device_in_use(device, None):
            yield device

    def test_a_run_keeps_to_device_memory(self, device: torch.device, stores: Path, tmp_path: Path) -> None:
        """torch's allocator is held to it, so a run that ends has kept to it."""
        budget = 300_000_000
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        ran = invoke(
            "run", "--store-dir", stores, "--out", tmp_path / "demo", "--quiet", "--device", device,
            "--device-memory", "300MB", "--tasks", "recall", "--shots", "0,4", "--limit", "16",
            "--train-limit", "4",
        )  # fmt: skip
        assert ran.exit_code == 0, ran.output
        assert torch.cuda.max_memory_allocated(device) <= torch.cuda.max_memory_reserved(device) <= budget

    def test_real_exhaustion_is_a_refusal(self, device: torch.device) -> None:
        with (
            pytest.raises(DoesNotFit, match=r"--device-memory 0\.064GB: cuda:\d ran out of memory"),
            device_in_use(device, 64_000_000),
        ):
            torch.empty(1 << 30, dtype=torch.uint8, device=device)

    def test_more_than_is_free_is_refused(self, device: torch.device, stores: Path, tmp_path: Path) -> None:
        refused = invoke(
            "run", "--store-dir", stores, "--out", tmp_path / "demo", "--device", device,
            "--device-memory", "900GB",
        )  # fmt: skip
        assert refused.exit_code == DoesNotFit.exit_code
        assert "give at most --device-memory" in " ".join(refused.stderr.split())

    def test_host_buffers_are_pinned(self, device: torch.device, int8_store: Store) -> None:
        reader = LayerReader(int8_store.layer_paths, device=device)
        for _ in reader.layers(range(3)):
            pass
        buffers = list(reader._buffers)
        assert [buffer.is_pinned() for buffer in buffers] == [True, True]
        reader.close()
        assert [buffer.is_pinned() for buffer in buffers] == [False, False]

    def test_products_are_not_of_shortened_floats(self, device: torch.device) -> None:
        left, right = (torch.randn(512, 512, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
        exact = left.double() @ right.double()
        torch.set_float32_matmul_precision("medium")
        with device_in_use(device, None):
            error = ((left.to(device) @ right.to(device)).cpu().double() - exact).abs().max()
        assert error < 1e-5 * exact.abs().max()

    def test_gradients_are_bitwise_the_same_again(self, device: torch.device, float_store: Store) -> None:
        """Torch adds in any order unless it is told otherwise."""
        task, chosen = chosen_task()
        first, second = (gradients_on(device, float_store, task, chosen) for _ in range(2))
        for name in GRADIENTS:
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
    def test_a_second_card_computes_alone(
        self, device: torch.device, float_store: Store, tmp_path: Path
    ) -> None:
        other = torch.device("cuda", 1 - min(1, device.index or 0))
        jobs = [Job(packed_task(2).packed, ablation_masks(3, 4))]
        (expected,) = swept(float_store, jobs)
        before = torch.cuda.memory_allocated(device)
        with device_in_use(other, None):
            (scores,) = swept_on(other, float_store, jobs, TIGHT, tmp_path)
        assert torch.cuda.memory_allocated(device) == before
        assert_equal(scores.logprobs, expected.logprobs)
