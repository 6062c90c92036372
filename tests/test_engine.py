"""The engine against Hugging Face's own model: every mask, every packing, every memory."""

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from conftest import VOCABULARY, reference_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_icl.engine.cache import ResidualCache
from lowmem_icl.engine.stream import sweep, unit_gradients
from lowmem_icl.engine.waves import Job, SweepMemory, layers_read, row_blocks, waves
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.experiments.ablate import ablation_masks
from lowmem_icl.masks import Mask
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.tasks.loading import Document, TaskRows
from lowmem_icl.tasks.packing import PackedTask, PackingLimits, pack

CPU = torch.device("cpu")
PLENTY = SweepMemory.of(1 << 30)
LIMITS = PackingLimits(context_tokens=96, row_tokens=60, empty_context=2)


def ids(texts: list[str]) -> list[list[int]]:
    return [[int(token) for token in text.split()] for text in texts]


def random_task(seed: int, documents: int = 5, shortest: int = 3) -> TaskRows:
    """Documents of random token ids, two to four options of one to three tokens each."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> str:
        return " ".join(str(token) for token in rng.integers(0, VOCABULARY, length))

    made = []
    for index in range(documents):
        context = text(int(rng.integers(shortest, 30)))
        options = tuple((context, text(int(rng.integers(1, 4)))) for _ in range(int(rng.integers(2, 5))))
        gold = int(rng.integers(len(options)))
        made.append(
            Document(
                index,
                options,
                tuple(o == gold for o in range(len(options))),
                str(index),
                (),
                str(index),
                0,
                {},
            )
        )
    return TaskRows("random", 0, "train", tuple(made), "acc", ())


def packed_task(seed: int, **arguments: object) -> PackedTask:
    return pack(random_task(seed), ids, LIMITS, **arguments)  # type: ignore[arg-type]


def swept(
    store: Store,
    jobs: list[Job],
    memory: SweepMemory = PLENTY,
    resident: int = 1 << 30,
    spill: Path | None = None,
):
    with StreamedModel(store, device=CPU, resident_bytes=resident) as model:
        return sweep(model, jobs, memory=memory, spill_folder=spill)


def test_every_option_equals_hugging_face_on_that_option_alone(checkpoint: Path, float_store: Store) -> None:
    task = packed_task(1)
    (scores,) = swept(float_store, [Job(task.packed, (Mask(),))])
    model = reference_model(checkpoint)
    expected = [oracles.option_logprob(model, list(o.path), list(o.continuation)) for o in task.options]
    np.testing.assert_allclose(scores.logprobs[0], expected, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"do_layer_norm_before": False, "word_embed_proj_dim": 16}])
def test_sweep_over_all_units_equals_one_hooked_run_a_unit(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    """Also for OPT-350M's shape: norms after the blocks, projections around the embeddings."""
    from conftest import make_checkpoint, make_store

    folder = make_checkpoint(tmp_path / "checkpoint", **changes)
    task, masks = packed_task(2), ablation_masks(3, 4)
    (scores,) = swept(make_store(folder, tmp_path / "store", "float32"), [Job(task.packed, masks)])
    model = reference_model(folder)
    for mask, values in zip(masks, scores.logprobs, strict=True):
        expected = [
            oracles.option_logprob(model, list(o.path), list(o.continuation), mask) for o in task.options
        ]
        np.testing.assert_allclose(values, expected, atol=1e-4)


unit_sets = st.builds(
    Mask,
    st.frozensets(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=6),
    st.frozensets(st.integers(0, 2), max_size=2),
)


@settings(max_examples=20, deadline=None)
@given(
    masks=st.lists(unit_sets, min_size=1, max_size=8),
    total=st.integers(2 * 72 * 32 * 4 * 2, 400_000),
    resident=st.sampled_from([0, 30_000, 1 << 30]),
    seeds=st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True),
)
def test_int8_results_are_bitwise_the_same_for_any_memory_and_company(
    int8_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    masks: list[Mask],
    total: int,
    resident: int,
    seeds: list[int],
) -> None:
    jobs = [Job(packed_task(seed).packed, tuple(masks)) for seed in seeds]
    spill = tmp_path_factory.getbasetemp() / "spill"
    tight = swept(int8_store, jobs, SweepMemory.of(total), resident, spill)
    for job, scores in zip(jobs, tight, strict=True):
        for place, mask in enumerate(masks):
            (alone,) = swept(int8_store, [Job(job.packed, (mask,))])
            np.testing.assert_array_equal(scores.logprobs[place], alone.logprobs[0])
            np.testing.assert_array_equal(scores.greedy[place], alone.greedy[0])
    assert not list(spill.glob("*")), "spilled residuals are removed"


def test_int8_results_do_not_depend_on_threads(int8_store: Store) -> None:
    job, before = Job(packed_task(3).packed, ablation_masks(3, 4)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(swept(int8_store, [job])[0].logprobs)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*results)


def test_an_all_zero_layer_is_finite_in_int8(int8_store: Store) -> None:
    everything = Mask(
        frozenset((layer, head) for layer in range(3) for head in range(4)), frozenset(range(3))
    )
    (scores,) = swept(int8_store, [Job(packed_task(1).packed, (everything,))])
    assert np.isfinite(scores.logprobs).all()


def gradients(store: Store, task: PackedTask, memory: SweepMemory = PLENTY):
    chosen = np.array([gold for document in task.task.documents for gold in document.gold])
    with StreamedModel(store, device=CPU, resident_bytes=0) as model:
        (result,) = unit_gradients(
            model,
            [task.packed.rows],
            [len(task.task.documents)],
            [lambda logprobs: chosen],
            option_counts=[task.packed.option_count],
            memory=memory,
        )
    return result


def test_streamed_gradients_equal_the_whole_graph(checkpoint: Path, float_store: Store) -> None:
    task = packed_task(4, gold_only=True)
    result = gradients(float_store, task)
    model = reference_model(checkpoint)
    parts = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed")
    for owner, document in enumerate(task.task.documents):
        option = task.options[int(task.first_option[owner]) + document.gold.index(True)]
        expected = oracles.unit_gradients(model, list(option.path), list(option.continuation))
        for name, values in zip(parts, expected, strict=True):
            largest = np.abs(values).max()
            np.testing.assert_allclose(
                getattr(result, name)[owner], values, atol=1e-5 * largest, err_msg=name
            )


def test_int8_gradients_do_not_depend_on_memory(int8_store: Store) -> None:
    task = packed_task(4, gold_only=True)
    plenty, tight = gradients(int8_store, task), gradients(int8_store, task, SweepMemory.of(60_000))
    for name in ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed", "logprobs"):
        np.testing.assert_array_equal(getattr(plenty, name), getattr(tight, name))


def test_attribution_estimates_small_ablations(float_store: Store) -> None:
    """Halving a head instead of removing it makes the first-order estimate exact in the limit; here its sign and order."""
    task = packed_task(6, gold_only=True)
    (scores,) = swept(float_store, [Job(task.packed, ablation_masks(3, 4))])
    exact = (scores.logprobs[:1] - scores.logprobs[1:]).sum(1)
    estimate = gradients(float_store, task)
    both = np.concatenate([estimate.head_signed.sum(0).ravel(), estimate.ffn_signed.sum(0)])
    assert np.corrcoef(exact[:12], both[:12])[0, 1] > 0.5


def test_reads_of_the_weights_are_as_planned(float_store: Store) -> None:
    jobs = [Job(packed_task(1).packed, ablation_masks(3, 4))]
    memory = SweepMemory.of(120_000)
    with StreamedModel(float_store, device=CPU, resident_bytes=0) as model:
        sweep(model, jobs, memory=memory)
        assert model.read_bytes == layers_read(jobs, 3, 32, memory) * float_store.layer_bytes
    assert layers_read(jobs, 3, 32, memory) > layers_read(jobs, 3, 32, PLENTY) == 3


def test_waves_start_as_late_as_they_can() -> None:
    jobs = [Job(packed_task(1).packed, ablation_masks(3, 4))]
    (block,) = row_blocks(jobs, 32, PLENTY)
    one_variant = jobs[0].packed.token_count * 32 * 4
    plan = waves(jobs, block, 32, one_variant * 6)
    firsts = [variant.first_layer for wave in plan for variant in wave]
    assert firsts == sorted(firsts)
    assert len(firsts) == 15
    assert [len(wave) for wave in plan] == [5, 6, 4], "the first wave leaves room for the clean run"


def test_a_row_that_does_not_fit_is_told_with_the_memory_it_needs() -> None:
    with pytest.raises(DoesNotFit, match="give more --memory"):
        row_blocks([Job(packed_task(1).packed, (Mask(),))], 32, SweepMemory.of(1000))


def test_cache_gives_back_what_it_kept_from_memory_and_from_disk(tmp_path: Path) -> None:
    residuals = [torch.randn(4, 8) for _ in range(3)]
    with ResidualCache(4 * 8 * 4, tmp_path / "spill") as cache:
        for row, residual in enumerate(residuals):
            cache.keep(row, 0, residual)
        assert len(list((tmp_path / "spill").rglob("*.f32"))) == 2
        for row, residual in enumerate(residuals):
            assert torch.equal(cache.get(row, 0, CPU), residual)
    assert not list((tmp_path / "spill").rglob("*.f32"))
