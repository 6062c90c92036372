"""The engine against Hugging Face's own model: every mask, every packing, every memory."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import VOCABULARY, reference_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost, sweep_cost
from lowmem_icl.engine.passes import GradientJob, PassSetup, sweep, unit_gradients
from lowmem_icl.engine.schedule import Job, SweepLimits, schedule
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.experiments.ablate.measure import ablated_units
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import Row
from lowmem_icl.tasks.loading import Document, TaskRows
from lowmem_icl.tasks.packing import PackedTask, PackingLimits, pack

CPU = torch.device("cpu")
PLENTY = SweepLimits.of(1 << 30)
LIMITS = PackingLimits(context_tokens=96, row_tokens=60, empty_context=2)


def ids(texts: list[str]) -> list[list[int]]:
    return [[int(token) for token in text.split()] for text in texts]


def random_task(seed: int, documents: int = 5, shortest: int = 3, shared: int = 0) -> TaskRows:
    """Documents of random token ids, two to four options of one to three tokens each.

    With `shared` they begin with one of two texts of so many tokens, as if these were demonstrations.
    """
    rng = np.random.default_rng(seed)

    def text(length: int) -> str:
        return " ".join(str(token) for token in rng.integers(0, VOCABULARY, length))

    before = [text(shared) for _ in range(2)]
    made = []
    for index in range(documents):
        context = f"{before[index % 2]} {text(int(rng.integers(shortest, 30)))}".strip()
        options = tuple((context, text(int(rng.integers(1, 4)))) for _ in range(int(rng.integers(2, 5))))
        gold = int(rng.integers(len(options)))
        made.append(
            Document(
                index,
                options,
                tuple(o == gold for o in range(len(options))),
                str(index),
                (index % 2,) if shared else (),
                str(index),
                0,
                {},
            )
        )
    return TaskRows("random", 0, "train", tuple(made), "acc", ())


def packed_task(seed: int, shared: int = 0, *, gold_only: bool = False) -> PackedTask:
    return pack(random_task(seed, 9 if shared else 5, shared=shared), ids, LIMITS, gold_only=gold_only)


def ablation_masks(layers: int, heads: int) -> tuple[Mask, ...]:
    """The clean run and every unit removed alone."""
    return (Mask(), *(unit.as_mask() for unit in ablated_units(layers, heads)))


def random_rows(seed: int, shared: int) -> tuple[Row, ...]:
    return packed_task(seed, shared=shared).packed.rows


def swept(
    store: Store,
    jobs: list[Job],
    limits: SweepLimits = PLENTY,
    resident: int = 1 << 30,
    spill: Path | None = None,
) -> list[Scores]:
    with StreamedModel(store, device=CPU, resident_bytes=resident) as model, cache_of(limits, spill) as cache:
        return sweep(PassSetup(model, limits, cache), jobs)


def cache_of(limits: SweepLimits, spill: Path | None = None) -> CleanCache:
    return CleanCache(limits.cache_bytes, limits.disk_bytes, spill)


def test_every_option_equals_hugging_face_on_that_option_alone(checkpoint: Path, float_store: Store) -> None:
    task = packed_task(1)
    (scores,) = swept(float_store, [Job(task.packed, (Mask(),))])
    model = reference_model(checkpoint)
    expected = [oracles.option_logprob(model, list(o.path), list(o.continuation)) for o in task.options]
    np.testing.assert_allclose(scores.logprobs[0], expected, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"do_layer_norm_before": False, "word_embed_proj_dim": 16}])
def test_sweep_over_all_units_equals_one_hooked_run_a_unit(tmp_path: Path, changes: dict[str, Any]) -> None:
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


def test_sweep_over_rows_of_shared_stems_equals_one_hooked_run_a_unit(
    checkpoint: Path, float_store: Store
) -> None:
    task, masks = packed_task(2, shared=40), ablation_masks(3, 4)
    stems = {row.stem for row in task.packed.rows}
    assert None not in stems
    assert len(stems) == 2 < len(task.packed.rows)
    (scores,) = swept(float_store, [Job(task.packed, masks)])
    model = reference_model(checkpoint)
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


@dataclass(frozen=True)
class Sweep:
    """Which tasks and masks are swept together, and in what memory."""

    seeds: list[int]
    shared: int
    masks: list[Mask]
    total_bytes: int
    disk_bytes: int
    resident_bytes: int
    micro_batch_tokens: int
    wave_tokens: int | None

    @property
    def jobs(self) -> list[Job]:
        return [Job(packed_task(seed, shared=self.shared).packed, tuple(self.masks)) for seed in self.seeds]

    @property
    def limits(self) -> SweepLimits:
        return replace(
            SweepLimits.of(self.total_bytes, self.disk_bytes),
            micro_batch_tokens=self.micro_batch_tokens,
            wave_tokens=self.wave_tokens,
        )


sweeps = st.builds(
    Sweep,
    seeds=st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True),
    shared=st.sampled_from([0, 40]),
    masks=st.lists(unit_sets, min_size=1, max_size=8),
    total_bytes=st.integers(2 * 100 * 32 * 4 * 2, 400_000),
    disk_bytes=st.sampled_from([0, 50_000, 1 << 30]),
    resident_bytes=st.sampled_from([0, 30_000, 1 << 30]),
    micro_batch_tokens=st.sampled_from([64, 300, 1280]),
    wave_tokens=st.sampled_from([None, 500, 5000]),
)


@settings(max_examples=20, deadline=None)
@given(drawn=sweeps)
def test_int8_results_are_bitwise_the_same_for_any_memory_and_company(
    int8_store: Store, tmp_path_factory: pytest.TempPathFactory, drawn: Sweep
) -> None:
    spill, jobs = tmp_path_factory.getbasetemp() / "spill", drawn.jobs
    tight = swept(int8_store, jobs, drawn.limits, drawn.resident_bytes, spill)
    for job, scores in zip(jobs, tight, strict=True):
        for index, mask in enumerate(drawn.masks):
            (alone,) = swept(int8_store, [Job(job.packed, (mask,))])
            np.testing.assert_array_equal(scores.logprobs[index], alone.logprobs[0])
            np.testing.assert_array_equal(scores.greedy[index], alone.greedy[0])
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
    left, right = results
    np.testing.assert_array_equal(left, right)


def test_an_all_zero_layer_is_finite_in_int8(int8_store: Store) -> None:
    everything = Mask(
        frozenset((layer, head) for layer in range(3) for head in range(4)), frozenset(range(3))
    )
    (scores,) = swept(int8_store, [Job(packed_task(1).packed, (everything,))])
    assert np.isfinite(scores.logprobs).all()


def gradients(
    store: Store, task: PackedTask, limits: SweepLimits = PLENTY, mask: Mask = Mask()
) -> UnitGradients:
    chosen = np.array([gold for document in task.task.documents for gold in document.gold])
    result = UnitGradients.empty(len(task.task.documents), task.packed.option_count, 3, 4)
    with StreamedModel(store, device=CPU, resident_bytes=0) as model, cache_of(limits) as cache:
        job = GradientJob(task.packed.rows, lambda logprobs: chosen, mask)
        unit_gradients(PassSetup(model, limits, cache), [job], [result])
        assert not len(cache)
    assert result.finished.all()
    return result


@pytest.mark.parametrize("mask", [Mask(), Mask(heads=frozenset([(0, 1), (1, 0), (1, 3), (2, 2)]))])
def test_streamed_gradients_equal_the_whole_graph(checkpoint: Path, float_store: Store, mask: Mask) -> None:
    task = packed_task(4, gold_only=True)
    result = gradients(float_store, task, mask=mask)
    model = reference_model(checkpoint)
    parts = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed")
    for owner, document in enumerate(task.task.documents):
        option = task.options[int(task.first_option[owner]) + document.gold.index(True)]
        expected = oracles.unit_gradients(model, list(option.path), list(option.continuation), mask)
        for name, values in zip(parts, expected, strict=True):
            largest = np.abs(values).max()
            np.testing.assert_allclose(
                getattr(result, name)[owner], values, atol=1e-5 * largest, err_msg=name
            )


def test_int8_gradients_do_not_depend_on_memory(int8_store: Store) -> None:
    task = packed_task(4, gold_only=True)
    narrow = replace(SweepLimits.of(60_000, 1 << 20), micro_batch_tokens=64)
    plenty, tight = gradients(int8_store, task), gradients(int8_store, task, narrow)
    for name in ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed", "logprobs"):
        np.testing.assert_array_equal(getattr(plenty, name), getattr(tight, name))


def test_attribution_estimates_small_ablations(float_store: Store) -> None:
    """Halving a head instead of removing it makes the first-order estimate exact in the limit;
    here its sign and order.
    """
    task = packed_task(6, gold_only=True)
    (scores,) = swept(float_store, [Job(task.packed, ablation_masks(3, 4))])
    exact = np.nansum(scores.logprobs[:1] - scores.logprobs[1:], 1)
    estimate = gradients(float_store, task)
    both = np.concatenate([estimate.head_signed.sum(0).ravel(), estimate.ffn_signed.sum(0)])
    assert np.corrcoef(exact[:12], both[:12])[0, 1] > 0.5


def test_work_and_reads_are_as_planned(float_store: Store) -> None:
    masks = (*ablation_masks(3, 4), Mask(frozenset([(1, 2)]), frozenset([1, 2])))
    jobs = [Job(packed_task(1).packed, masks), Job(packed_task(2).packed, masks[1:5])]
    for limits in (
        PLENTY,
        SweepLimits.of(120_000, 1 << 20),
        SweepLimits.of(400_000),
        SweepLimits(1 << 30, 1 << 20, wave_tokens=900),
    ):
        done: list[SweepCost] = []
        with StreamedModel(float_store, device=CPU, resident_bytes=0) as model, cache_of(limits) as cache:
            sweep(PassSetup(model, limits, cache, done.append), jobs)
            reads = model.read_bytes / float_store.layer_bytes
        planned = sweep_cost(jobs, 32, 3, limits)
        assert reads == planned.layers_read
        assert sum(done, SweepCost()) + SweepCost(layers_read=reads) == planned
    assert (
        sweep_cost(jobs, 32, 3, SweepLimits.of(120_000, 1 << 20)).layers_read
        > sweep_cost(jobs, 32, 3, PLENTY).layers_read
        == 3
    )


def test_variants_take_their_own_layer_from_the_clean_run_and_end_where_answers_are_read(
    float_store: Store,
) -> None:
    packed = packed_task(1).packed
    tokens, reads = packed.token_count, sum(len(row.reads) for row in packed.rows)
    head, ffn = Mask(heads=frozenset([(1, 0)])), Mask(ffns=frozenset([1]))
    clean = sweep_cost([Job(packed, (Mask(),))], 32, 3, PLENTY)
    assert (clean.attention_tokens, clean.ffn_tokens) == (3 * tokens, 2 * tokens + reads)
    with_head = sweep_cost([Job(packed, (Mask(), head))], 32, 3, PLENTY)
    assert with_head.attention_tokens - clean.attention_tokens == tokens, "one layer of attention, not two"
    assert with_head.ffn_tokens - clean.ffn_tokens == tokens + reads
    with_ffn = sweep_cost([Job(packed, (Mask(), ffn))], 32, 3, PLENTY)
    assert with_ffn.ffn_tokens - clean.ffn_tokens == reads, "a removed FFN is not computed"


def test_waves_start_as_late_as_they_can() -> None:
    jobs = [Job(packed_task(1).packed, ablation_masks(3, 4))]
    one_variant = jobs[0].packed.token_count * 32 * 4
    (block,) = schedule(jobs, 32, 3, SweepLimits(one_variant * 6, 1 << 20))
    planned = block.waves
    firsts = [variant.first_layer for wave in planned for variant in wave.variants]
    assert firsts == sorted(firsts)
    assert len(firsts) == 15
    assert [len(wave.variants) for wave in planned] == [5, 6, 4], (
        "the first wave leaves room for the clean run"
    )
    assert [wave.clean_layers for wave in planned] == [3, None, None]


def test_a_row_that_does_not_fit_is_told_with_the_memory_it_needs() -> None:
    with pytest.raises(DoesNotFit, match="give more --memory"):
        list(schedule([Job(packed_task(1).packed, (Mask(),))], 32, 3, SweepLimits.of(1000)))


def test_cache_gives_back_what_it_kept_from_memory_and_from_disk(tmp_path: Path) -> None:
    rows = packed_task(1).packed.rows[:3]
    residuals = [torch.randn(4, 8) for _ in rows]
    with CleanCache(4 * 8 * 4, 1 << 20, tmp_path / "spill") as cache:
        for row, residual in zip(rows, residuals, strict=True):
            cache.keep(row, 0, residual)
        assert len(list((tmp_path / "spill").rglob("*.f32"))) == 2
        for row, residual in zip(rows, residuals, strict=True):
            assert torch.equal(cache.get(row, 0, CPU), residual)
    assert not list((tmp_path / "spill").rglob("*.f32"))


def test_cache_forgets_what_was_used_longest_ago_and_keeps_to_its_allowances(tmp_path: Path) -> None:
    row = packed_task(1).packed.rows[0]
    with CleanCache(2 * 128, 128, tmp_path / "spill") as cache:
        for layer in range(3):
            cache.keep(row, layer, torch.full((4, 8), float(layer)))
        cache.get(row, 0, CPU)
        cache.keep(row, 3, torch.full((4, 8), 3.0))
        assert [cache.has([row], layer) for layer in range(4)] == [True, False, True, True]
        assert sum(path.stat().st_size for path in (tmp_path / "spill").rglob("*.f32")) <= 128
        cache.keep(row, 4, torch.zeros(40, 8))
        assert not cache.has([row], 4), "what fits nowhere is not kept"


def test_later_sweeps_of_the_same_rows_start_where_variants_branch(int8_store: Store) -> None:
    packed = packed_task(1).packed
    masks = tuple(Mask(heads=frozenset([(2, head)])) for head in range(4))
    with StreamedModel(int8_store, device=CPU, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        (first,) = sweep(PassSetup(model, PLENTY, cache), [Job(packed, masks[:2])], keep_clean=True)
        read = model.read_bytes
        (second,) = sweep(PassSetup(model, PLENTY, cache), [Job(packed, masks[2:])], keep_clean=True)
        assert read == pytest.approx(3 * int8_store.layer_bytes, rel=0.01)
        assert model.read_bytes - read == pytest.approx(int8_store.layer_bytes, rel=0.01)
    assert sweep_cost([Job(packed, masks[2:])], 32, 3, PLENTY, cached=True).layers_read == 1
    (expected,) = swept(int8_store, [Job(packed, masks)])
    np.testing.assert_array_equal(np.concatenate([first.logprobs, second.logprobs]), expected.logprobs)


def test_a_sweep_stopped_between_waves_goes_on_where_it_was(int8_store: Store) -> None:
    class Stopped(Exception):
        pass

    jobs = [Job(packed_task(seed).packed, ablation_masks(3, 4)) for seed in (1, 2)]
    limits = SweepLimits(1 << 30, 1 << 20, wave_tokens=900)
    scores = [Scores.empty(len(job.masks), job.packed.option_count) for job in jobs]
    waves = 0

    def stop() -> None:
        nonlocal waves
        waves += 1
        if waves % 2:
            raise Stopped

    done: list[SweepCost] = []
    with StreamedModel(int8_store, device=CPU, resident_bytes=0) as model:
        for _ in range(50):
            try:
                with cache_of(limits) as cache:
                    sweep(PassSetup(model, limits, cache, done.append, stop), jobs, scores)
                break
            except Stopped:
                continue
    assert waves > 4
    for ours, expected in zip(scores, swept(int8_store, jobs), strict=True):
        np.testing.assert_array_equal(ours.logprobs, expected.logprobs)
        np.testing.assert_array_equal(ours.greedy, expected.greedy)
    assert sum(cost.answers for cost in done) == sweep_cost(jobs, 32, 3, PLENTY).answers, (
        "nothing is made twice"
    )
