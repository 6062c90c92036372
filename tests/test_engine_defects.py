"""Defects that the engine had: each test failed before its mending."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import make_checkpoint, make_store, reference_model
from test_engine import CPU, PLENTY, ablation_masks, cache_of, gradients, packed_task, swept
from transformers import AttentionInterface

from lowmem_icl.engine import head_scores
from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost, sweep_cost
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores
from lowmem_icl.engine.passes import GradientJob, PassSetup, score_heads, sweep, unit_gradients
from lowmem_icl.engine.schedule import EarlierWork, Job, SweepLimits, schedule
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.attention import ATTENTION, RowAttention
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import stem_of, with_stems

LAST_LAYERS = tuple(Mask(heads=frozenset([(layer, 0)])) for layer in (1, 2))
TOKEN_BYTES = 32 * 4
# Room in memory for about a quarter of what the sweeps below keep, the rest on disk.
SMALL = SweepLimits(1 << 30, 100 * TOKEN_BYTES, 1 << 24)


@pytest.mark.parametrize("keep_clean", [False, True])
@pytest.mark.parametrize("seeds", [[1] * 6, [1, 2, 3, 4, 5, 6]], ids=["equal rows", "different rows"])
def test_memory_holds_the_rows_of_the_sweep_at_work(
    int8_store: Store, tmp_path: Path, seeds: list[int], keep_clean: bool
) -> None:
    held: list[frozenset[str]] = []
    with (
        StreamedModel(int8_store, device=CPU, resident_bytes=1 << 30) as model,
        cache_of(SMALL, tmp_path / "spill") as cache,
    ):
        for seed in seeds:
            held.clear()
            # Packed anew: other objects of the same content.
            packed = packed_task(seed).packed
            # One variant per wave, so that clean residuals are kept for later ones.
            limits = replace(SMALL, alive_bytes=2 * packed.token_count * TOKEN_BYTES)
            setup = PassSetup(model, limits, cache, after_step=lambda: held.append(cache.held_rows()))
            sweep(setup, [Job(packed, LAST_LAYERS)], keep_clean=keep_clean)
            ours = {row.residual_digest for row in packed.rows}
            assert len(held) == 2 or (keep_clean and seeds[0] == seeds[1])
            assert held[0]
            assert all(rows <= ours for rows in held)
            assert bool(len(cache)) == keep_clean
        assert bool(list((tmp_path / "spill").rglob("*.f32"))) == keep_clean


def test_equal_rows_that_are_packed_twice_share_their_residuals(int8_store: Store) -> None:
    masks = tuple(Mask(heads=frozenset([(2, head)])) for head in range(4))
    with StreamedModel(int8_store, device=CPU, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        setup = PassSetup(model, PLENTY, cache)
        sweep(setup, [Job(packed_task(1, shared=40).packed, masks[:2])], keep_clean=True)
        before = model.read_bytes
        (again,) = sweep(setup, [Job(packed_task(1, shared=40).packed, masks[2:])])
        assert model.read_bytes - before == int8_store.layer_paths[2].stat().st_size
    (expected,) = swept(int8_store, [Job(packed_task(1, shared=40).packed, masks[2:])])
    np.testing.assert_array_equal(again.logprobs, expected.logprobs)


def test_a_residual_is_found_by_all_that_it_depends_on() -> None:
    row, other = packed_task(1, shared=40).packed.rows[:2]
    digests = {
        changed.residual_digest
        for changed in (
            row,
            replace(row, tokens=row.tokens + 1),
            replace(row, positions=row.positions + 1),
            replace(row, ends=row.ends + 1),
            replace(row, stem=None),
            replace(row, stem=stem_of([1, 2, 3])),
            other,
        )
    }
    assert len(digests) == 7
    assert replace(row, targets=row.targets + 1).residual_digest == row.residual_digest
    assert replace(row, targets=row.targets + 1).digest != row.digest


def test_rows_in_work_are_never_given_up_and_others_leave_memory_first(tmp_path: Path) -> None:
    old, new = packed_task(1).packed.rows[:2]
    values = [torch.full((4, 8), float(layer)) for layer in range(4)]
    with CleanCache(2 * 128, 2 * 128, tmp_path / "spill") as cache:
        for layer in (0, 1):
            cache.keep(old, layer, values[layer])
        with cache.holding([new]):
            for layer in range(4):
                cache.keep(new, layer, values[layer])
            assert cache.held_rows() == {new.residual_digest}
            assert all(cache.has([new], layer) for layer in range(4))
            assert not any(cache.has([old], layer) for layer in range(4)), "they had to go altogether"
            cache.keep(old, 0, values[0])
            assert not cache.has([old], 0), "what is in work is not given up for others"
            for layer in range(4):
                assert torch.equal(cache.get(new, layer, CPU), values[layer])
        assert not len(cache), "forgotten when the block is done"
        cache.keep(old, 0, values[0])
        assert cache.held_rows() == {old.residual_digest}


def test_what_a_pruned_model_computes_is_never_taken_for_the_clean_run(float_store: Store) -> None:
    """Equal rows in jobs of different masks, and a cache that holds their clean residuals already."""
    task, mask = packed_task(4, gold_only=True), Mask(frozenset([(0, 1)]), frozenset([1]))
    chosen = np.array([gold for document in task.task.documents for gold in document.gold])
    results = [
        UnitGradients.empty(len(task.task.documents), task.packed.option_count, 3, 4) for _ in range(2)
    ]
    with StreamedModel(float_store, device=CPU, resident_bytes=1 << 30) as model, cache_of(PLENTY) as cache:
        setup = PassSetup(model, PLENTY, cache)
        sweep(setup, [Job(task.packed, ablation_masks(3, 4))], keep_clean=True)
        jobs = [GradientJob(task.packed.rows, lambda logprobs: chosen, removed) for removed in (mask, Mask())]
        unit_gradients(setup, jobs, results)
    for result, removed in zip(results, (mask, Mask()), strict=True):
        expected = gradients(float_store, task, mask=removed)
        np.testing.assert_allclose(result.head_signed, expected.head_signed, atol=1e-5)
        np.testing.assert_allclose(result.ffn_signed, expected.ffn_signed, atol=1e-5)


def test_two_open_models_of_a_store_do_not_share_weights(int8_store: Store) -> None:
    tokens, positions = torch.arange(4), torch.arange(4)
    with StreamedModel(int8_store, device=CPU, resident_bytes=0) as first:
        before = first.vocabulary.embed(tokens, positions)
        with StreamedModel(int8_store, device=CPU, resident_bytes=0) as second, torch.no_grad():
            second.skeleton.model.model.decoder.embed_positions.weight.zero_()
            assert not torch.equal(second.vocabulary.embed(tokens, positions), before)
        assert torch.equal(first.vocabulary.embed(tokens, positions), before)
    assert {parameter.device.type for parameter in int8_store.skeleton.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "unknown", [{"position_bias": torch.zeros(2)}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}]
)
def test_the_attention_refuses_what_it_does_not_do(unknown: dict[str, object]) -> None:
    attention = AttentionInterface()[ATTENTION]
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=f"'{next(iter(unknown))}'"):
        attention(None, states, states, states, RowAttention([], False), scaling=1.0, **unknown)


@pytest.mark.parametrize("changes", [{}, {"do_layer_norm_before": False, "word_embed_proj_dim": 16}])
def test_gradients_of_a_model_without_some_ffns_are_its_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", **changes)
    task, mask = packed_task(4, gold_only=True), Mask(frozenset([(0, 1), (2, 2)]), frozenset([0, 2]))
    result = gradients(make_store(folder, tmp_path / "store", "float32"), task, mask=mask)
    model = reference_model(folder)
    assert not result.ffn_absolute[:, [0, 2]].any()
    assert result.ffn_absolute[:, 1].all()
    for owner, document in enumerate(task.task.documents):
        option = task.options[int(task.first_option[owner]) + document.gold.index(True)]
        expected = oracles.unit_gradients(model, list(option.path), list(option.continuation), mask)
        for name, values in zip(
            ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed"), expected, strict=True
        ):
            ours = getattr(result, name)[owner]
            np.testing.assert_allclose(ours, values, atol=1e-5 * np.abs(values).max(), err_msg=name)


def test_a_score_that_is_nan_is_a_score(int8_store: Store) -> None:
    job = Job(packed_task(1).packed, (Mask(), LAST_LAYERS[0]))
    scores = [Scores.empty(2, job.packed.option_count)]
    assert not scores[0].scored.any()
    with StreamedModel(int8_store, device=CPU, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        setup = PassSetup(model, PLENTY, cache)
        with torch.no_grad():
            model.skeleton.model.model.decoder.embed_positions.weight.fill_(torch.nan)
        (first,) = sweep(setup, [job], scores)
        assert first is scores[0]
        assert np.isnan(first.logprobs).all()
        assert first.scored.all()
        done: list[SweepCost] = []
        sweep(replace(setup, account=done.append), [job], scores)
        assert not done, "nothing is missing"


def test_a_head_score_that_is_nan_is_made_once(int8_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def never_a_number(layer: object, products: torch.Tensor, heads: int) -> torch.Tensor:
        made.append(heads)
        return torch.full((heads,), torch.nan, dtype=torch.float64)

    monkeypatch.setattr(head_scores, "copying_eigenvalues", never_a_number)
    rows = stem_of([2, *[5, 6, 7] * 4]), stem_of(list(range(20, 30)))
    questions = HeadQuestions(rows[:1], rows[1:], (3,))
    scores = HeadScores.empty(1, 3, 4)
    with StreamedModel(int8_store, device=CPU, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        for _ in range(2):
            scores.finished[:] = False
            score_heads(PassSetup(model, PLENTY, cache), questions, scores)
    assert len(made) == 3
    assert np.isnan(scores.copying_eigenvalues).all()
    assert scores.weights_scored.all()


def test_what_a_row_too_large_for_the_cache_takes_is_planned(int8_store: Store) -> None:
    """No residual can be kept: every wave has the clean run with it, and the plan knows."""
    jobs = [Job(packed_task(1).packed, (Mask(), *LAST_LAYERS))]
    longest = max(map(len, jobs[0].packed.rows))
    limits = SweepLimits(2 * longest * TOKEN_BYTES)
    done: list[SweepCost] = []
    with StreamedModel(int8_store, device=CPU, resident_bytes=0) as model, cache_of(limits) as cache:
        (scores,) = sweep(PassSetup(model, limits, cache, done.append), jobs)
        layers_read = model.read_bytes / int8_store.layer_bytes
    planned = sweep_cost(jobs, 32, 3, limits)
    assert sum(done, SweepCost()) == replace(planned, layers_read=0)
    assert layers_read == pytest.approx(planned.layers_read, rel=0.01)
    np.testing.assert_array_equal(scores.logprobs, swept(int8_store, jobs)[0].logprobs)


def test_a_schedule_is_data_that_says_what_runs_and_what_is_kept() -> None:
    packed = packed_task(1, shared=40).packed
    one_variant = sum(map(len, with_stems(packed.rows))) * TOKEN_BYTES
    limits = SweepLimits(3 * one_variant, 1 << 24)
    masks = (Mask(), *(Mask(heads=frozenset([(layer, head)])) for layer in range(3) for head in range(2)))
    (block,) = schedule([Job(packed, masks)], 32, 3, limits)
    assert [wave.clean_layers for wave in block.waves] == [3, None, None]
    assert [wave.first_layer for wave in block.waves] == [0, 1, 2]
    assert [wave.kept_layers for wave in block.waves] == [{1, 2}, frozenset(), frozenset()]
    assert [variant.mask for wave in block.waves for variant in wave.variants] == [1, 2, 3, 4, 5, 6]
    (kept,) = schedule([Job(packed, masks)], 32, 3, limits, keep_clean=True)
    assert kept.waves[0].kept_layers == {0, 1, 2}
    cached = EarlierWork(is_cached=lambda rows, layer: layer > 0)
    (later,) = schedule([Job(packed, masks[3:])], 32, 3, limits, cached)
    assert [wave.clean_layers for wave in later.waves] == [None, None]
    (earlier,) = schedule([Job(packed, masks[1:])], 32, 3, limits, cached)
    assert earlier.waves[0].clean_layers == 2, "one layer is not there"
