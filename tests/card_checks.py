"""What must hold on a CUDA device: checked on a card by test_cuda, on a simulated one by test_simulated_card.

Subclasses give the fixture `device`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from commands import invoke
from conftest import make_store
from family_models import CASES, LAYERS
from numpy.typing import NDArray
from safetensors.torch import save_file
from test_engine import CPU, PLENTY, ablation_masks, cache_of, packed_task, swept
from test_engine import gradients as gradients_on_the_cpu
from test_head_scores import FORMS, questions
from test_head_scores import scored as scored_on_the_cpu
from test_int8 import linear

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores
from lowmem_icl.engine.passes import GradientJob, PassSetup, score_heads, sweep, unit_gradients
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model import reading
from lowmem_icl.model.int8 import integer_product, quantise_rows
from lowmem_icl.model.reading import LayerReader, read_header
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.system.machine import device_in_use
from lowmem_icl.tasks.packing import PackedTask

# Several waves, residuals that go to the machine's memory and to disk.
TIGHT = SweepLimits.of(60_000, 1 << 20)
# Where an activation is rounded the other way, scores differ by more than float32's noise. Such noise, 3e-7
# of every linear's output, moved the worst of these scores by 0.02 nats and half of them by less than 1e-6.
INT8_WORST_NATS, INT8_MEDIAN_NATS = 0.05, 1e-4
GRADIENTS = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed", "logprobs")
# Rotary angles, windows and caps, biases by head, a fused projection, angles by length; -m slow: all.
QUICK = ("llama", "gemma2", "bloom", "falcon 40b", "phi3 longrope")
OF_SMALL_RUN = ("--tasks", "recall", "--shots", "0,4", "--limit", "2", "--train-limit", "2")


def assert_equal(ours: NDArray[Any], theirs: NDArray[Any], share: float = 1e-5) -> None:
    """Equal to a share of the largest."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=share * np.abs(theirs).max())


def swept_on(
    device: torch.device, store: Store, jobs: list[Job], limits: SweepLimits, spill: Path, **held: int
) -> list[Scores]:
    resident, in_memory = held.get("resident", 0), bool(held.get("tables", 1))
    with (
        StreamedModel(store, device=device, resident_bytes=resident, tables_in_memory=in_memory) as model,
        cache_of(limits, spill) as cache,
    ):
        return sweep(PassSetup(model, limits, cache), jobs)


def chosen_task() -> tuple[PackedTask, NDArray[np.bool_]]:
    """A task, and its gold options, whose gradients are taken."""
    task = packed_task(4, gold_only=True)
    return task, np.array([gold for document in task.task.documents for gold in document.gold])


def gradients_on(
    device: torch.device, store: Store, task: PackedTask, chosen: NDArray[np.bool_], mask: Mask = Mask()
) -> UnitGradients:
    skeleton = store.skeleton
    result = UnitGradients.empty(
        len(task.task.documents), task.packed.option_count, skeleton.layers, skeleton.heads
    )
    with StreamedModel(store, device=device, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        job = GradientJob(task.packed.rows, lambda logprobs: chosen, mask)
        unit_gradients(PassSetup(model, PLENTY, cache), [job], [result])
    return result


def scores_of_heads_on(device: torch.device, store: Store, asked: HeadQuestions) -> HeadScores:
    scores = HeadScores.empty(len(asked.base_tokens), store.skeleton.layers, store.skeleton.heads)
    with StreamedModel(store, device=device, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        score_heads(PassSetup(model, PLENTY, cache), asked, scores)
    return scores


class CardChecks:
    @pytest.mark.parametrize("shared", [0, 40])
    def test_a_sweep_equals_the_cpus_whatever_stays_there(
        self, device: torch.device, float_store: Store, tmp_path: Path, shared: int
    ) -> None:
        jobs = [Job(packed_task(2, shared=shared).packed, ablation_masks(3, 4))]
        (expected,) = swept(float_store, jobs)
        settings = [(PLENTY, 0, 1), (PLENTY, 1 << 30, 1), (TIGHT, 0, 0), (TIGHT, float_store.layer_bytes, 1)]
        for limits, resident, tables in settings:
            if shared and limits is TIGHT:
                continue
            (scores,) = swept_on(
                device, float_store, jobs, limits, tmp_path, resident=resident, tables=tables
            )
            assert_equal(scores.logprobs, expected.logprobs)

    def test_gradients_equal_the_cpus(self, device: torch.device, float_store: Store) -> None:
        mask = Mask(heads=frozenset([(0, 1), (2, 2)]))
        task, chosen = chosen_task()
        expected = gradients_on_the_cpu(float_store, task, mask=mask)
        result = gradients_on(device, float_store, task, chosen, mask)
        for name in GRADIENTS:
            assert_equal(getattr(result, name), getattr(expected, name))

    @pytest.mark.parametrize("form", ["default", "all", "reference"])
    def test_scores_of_heads_equal_the_cpus(
        self, device: torch.device, float_store: Store, form: str
    ) -> None:
        asked = questions(FORMS[form])
        expected = scored_on_the_cpu(float_store, asked)
        scores = scores_of_heads_on(device, float_store, asked)
        for name in ("prefix_matching", "previous_token", "duplicate_token", "copying"):
            assert_equal(getattr(scores, name), getattr(expected, name))
        # Of products in float32, whose eigenvalues partly cancel.
        assert_equal(scores.copying_eigenvalues, expected.copying_eigenvalues, 1e-4)

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
    )
    def test_every_family_computes_there_what_it_does_on_the_cpu(
        self, device: torch.device, tmp_path: Path, name: str
    ) -> None:
        """Angles, windows, biases by head, caps: in a sweep over two jobs, and on the way back."""
        store = make_store(CASES[name].save(tmp_path / "checkpoint"), tmp_path / "store", "float32")
        masks = tuple(Mask(heads=frozenset([(layer, 1)])) for layer in range(LAYERS))
        jobs = [Job(packed_task(2, shared=shared).packed, (Mask(), *masks)) for shared in (0, 40)]
        expected = swept(store, jobs)
        scores = swept_on(device, store, jobs, PLENTY, tmp_path)
        for ours, theirs in zip(scores, expected, strict=True):
            assert_equal(ours.logprobs, theirs.logprobs)
        task, chosen = chosen_task()
        on_cpu, there = (gradients_on(place, store, task, chosen) for place in (CPU, device))
        assert_equal(there.head_signed, on_cpu.head_signed)
        assert_equal(there.ffn_signed, on_cpu.ffn_signed)

    def test_quantised_rows_are_bitwise_the_cpus(self, device: torch.device) -> None:
        values = torch.randn(301, 516, generator=torch.Generator().manual_seed(0)) * 3
        values[5], values[6] = 0.0, values[6] * 1e6
        for columns in (None, torch.tensor([3, 500])):
            expected = quantise_rows(values, columns)
            ours = quantise_rows(values.to(device), None if columns is None else columns.to(device))
            for part, expected_part in zip(ours, expected, strict=True):
                assert torch.equal(part.cpu(), expected_part)

    @pytest.mark.parametrize(
        ("rows", "inputs", "outputs"),
        [(1, 64, 64), (129, 768, 3072), (7, 36864, 64), (5, 66, 31), (33, 64, 30), (0, 64, 64)],
    )
    def test_integer_products_are_exact(
        self, device: torch.device, rows: int, inputs: int, outputs: int
    ) -> None:
        """Also of sizes that cuBLASLt refuses, and of long rows of one sign, which float32 cannot add."""
        generator = torch.Generator().manual_seed(inputs)
        left, right = (
            torch.randint(100, 128, (size, inputs), dtype=torch.int8, generator=generator)
            for size in (rows, outputs)
        )
        expected = (left.double() @ right.double().t()).int()
        product = integer_product(left.to(device), right.to(device)).cpu()
        assert product.dtype == torch.int32
        assert torch.equal(product, expected)

    def test_a_row_of_a_linear_is_the_same_in_any_company(self, device: torch.device) -> None:
        layer, values = linear(96, 80, columns=(3, 50)), torch.randn(1300, 96)
        expected = layer(values)
        layer.weight, layer.SCB = layer.weight.to(device), layer.SCB.to(device)
        assert layer.bias is not None
        layer.bias, layer.outlier_columns = layer.bias.to(device), layer.outlier_columns.to(device)
        layer.refresh()
        whole = layer(values.to(device)).cpu()
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
        for rows in (slice(0, 1), slice(5, 7), slice(1000, 1129)):
            assert torch.equal(layer(values[rows].to(device)).cpu(), whole[rows])

    def test_int8_scores_do_not_depend_on_memory(
        self, device: torch.device, int8_store: Store, tmp_path: Path
    ) -> None:
        jobs = [Job(packed_task(2).packed, ablation_masks(3, 4))]
        (plenty,) = swept_on(device, int8_store, jobs, PLENTY, tmp_path, resident=1 << 30)
        (tight,) = swept_on(device, int8_store, jobs, TIGHT, tmp_path, tables=0)
        np.testing.assert_array_equal(plenty.logprobs, tight.logprobs)
        (expected,) = swept(int8_store, jobs)
        differences = np.abs(plenty.logprobs - expected.logprobs)
        assert differences.max() < INT8_WORST_NATS
        assert np.median(differences) < INT8_MEDIAN_NATS

    def test_nf4_scores_and_gradients_are_the_cpus_whatever_the_memory(
        self, device: torch.device, nf4_store: Store, tmp_path: Path
    ) -> None:
        jobs = [Job(packed_task(2).packed, ablation_masks(3, 4))]
        (plenty,) = swept_on(device, nf4_store, jobs, PLENTY, tmp_path, resident=1 << 30)
        (tight,) = swept_on(device, nf4_store, jobs, TIGHT, tmp_path, tables=0)
        np.testing.assert_array_equal(plenty.logprobs, tight.logprobs)
        (expected,) = swept(nf4_store, jobs)
        assert_equal(plenty.logprobs, expected.logprobs)
        task, chosen = chosen_task()
        result = gradients_on(device, nf4_store, task, chosen)
        for name in GRADIENTS:
            assert_equal(getattr(result, name), getattr(gradients_on_the_cpu(nf4_store, task), name))
        asked = questions(FORMS["default"])
        scores = scores_of_heads_on(device, nf4_store, asked)
        assert_equal(scores.copying, scored_on_the_cpu(nf4_store, asked).copying)

    def test_layers_of_any_size_arrive_whole_in_any_order(self, device: torch.device, tmp_path: Path) -> None:
        """Layers larger than the one before in the same buffer, some that stay, passes that are given up."""
        paths = []
        for number, elements in enumerate((70_001, 9, 1 << 22, 300_000, 12)):
            paths.append(tmp_path / f"{number}.safetensors")
            tensors = {
                "odd": torch.full((elements,), number + 1, dtype=torch.int8),
                "weight": torch.full((elements, 2), 10 * number + 1, dtype=torch.int8),
                "bias": torch.full((3,), number + 0.5),
                "none": torch.empty(0, dtype=torch.int64),
            }
            save_file(tensors, paths[-1])
        reader = LayerReader(paths, frozenset({3}), device)
        try:
            orders: list[list[int]] = [[0, 1, 2, 3, 4], [4, 2, 0], [2, 3, 2, 3, 1], [1], [4, 3, 2, 1, 0]]
            for number, order in enumerate(orders):
                for step, (layer, tensors) in enumerate(reader.layers(order)):
                    assert layer == order[step]
                    assert {tensor.device.type for tensor in tensors.values()} == {device.type}
                    assert {name: tensor.shape for name, tensor in tensors.items()} == {
                        name: torch.Size(at.shape) for name, at in read_header(paths[layer])[0].items()
                    }
                    assert not tensors["odd"].ne(layer + 1).any()
                    assert not tensors["weight"].ne(10 * layer + 1).any()
                    assert tensors["bias"].cpu().tolist() == [layer + 0.5] * 3
                    assert tensors["weight"].data_ptr() % 16 == 0, "cuBLASLt's integer kernels need it"
                    if (number, step) == (2, 1):
                        break
        finally:
            reader.close()

    def test_exhaustion_is_a_refusal_and_finished_parts_are_kept(
        self, device: torch.device, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped by the device, continued with the same command: as if never stopped."""
        command = ("run", *OF_SMALL_RUN, "--store-dir", stores, "--quiet", "--device", str(device),
                   "--experiments", "evaluate,importance")  # fmt: skip
        layers = LayerReader.layers
        passes = []

        def failing(reader: LayerReader, order: range) -> object:
            passes.append(order)
            if len(passes) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return layers(reader, order)

        monkeypatch.setattr(reading.LayerReader, "layers", failing)
        stopped = invoke(*command, "--out", tmp_path / "stopped")
        assert stopped.exit_code == DoesNotFit.exit_code, stopped.output
        line = " ".join(stopped.stderr.split())
        assert "--device-memory" in line
        assert "ran out of memory" in line
        assert "finished parts are kept" in line
        assert list((tmp_path / "stopped" / "parts").glob("*.npz"))
        monkeypatch.undo()
        assert invoke(*command, "--out", tmp_path / "stopped").exit_code == 0
        assert invoke(*command, "--out", tmp_path / "whole").exit_code == 0
        continued, whole = (
            pl.read_parquet(tmp_path / name / "results.parquet") for name in ("stopped", "whole")
        )
        assert continued["metric"].equals(whole["metric"])
        assert_equal(continued["value"].fill_null(0).to_numpy(), whole["value"].fill_null(0).to_numpy())

    def test_other_errors_stay_what_they_are(self, device: torch.device) -> None:
        with pytest.raises(RuntimeError, match="shapes"), device_in_use(device, None):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
