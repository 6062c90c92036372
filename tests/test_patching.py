"""Patching against plain hooks on Hugging Face's own model, one run of the whole prompt for every change."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_store
from family_models import CASES, HEADS, LAYERS, FamilyCase
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import CPU, PLENTY, ablation_masks, cache_of
from torch import Tensor

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.passes import PassSetup
from lowmem_icl.engine.patch_jobs import (
    Addition,
    Change,
    PatchJob,
    RowTokens,
    TokenBytes,
    patch_blocks,
    patch_cost,
)
from lowmem_icl.engine.patching import _CleanRows, patch
from lowmem_icl.engine.row_masks import RowMasks
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.engine.written import written_by_heads
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.planning.amounts import held_by
from lowmem_icl.session.patch_parts import PatchPart
from lowmem_icl.tasks.prompt_rows import prompt_row

# Norms before what is written (OPT, Llama) and after it (Gemma); FFN and attention side by side, positions
# by bias (Falcon, BLOOM).
NAMES = ("opt", "llama", "gemma3_text", "falcon", "bloom")
UNITS = ablation_masks(LAYERS, HEADS)[1:]
ALL = Mask(
    frozenset((layer, head) for layer in range(LAYERS) for head in range(HEADS)), frozenset(range(LAYERS))
)
SOME = Mask(frozenset([(0, 1), (1, 0), (2, 1)]), frozenset([0, 2]))

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length, and options of one and of several tokens."""

    clean: Prompt
    corrupted: Prompt
    options: tuple[Prompt, ...]

    @classmethod
    def drawn(cls, seed: int, tokens: int = 11) -> "Pair":
        rng = np.random.default_rng(seed)
        clean, corrupted = (tuple(rng.integers(4, 96, tokens).tolist()) for _ in range(2))
        first = int(rng.integers(4, 96))
        return cls(clean, corrupted, ((first,), (first, 7, 9), (5, 6)))

    def job(
        self, changes: Sequence[Change], at: str = "last", source: Any = None, vectors: Any = None
    ) -> PatchJob:
        """Restore: the clean prompt's values, or what is given, into the corrupted prompt."""
        whole = at == "all"
        rows = [prompt_row(prompt, self.options, whole=whole) for prompt in (self.corrupted, self.clean)]
        tokens = np.arange(len(self.clean)) if whole else np.array([0])
        given = RowTokens(rows[1], tokens) if source is None else source
        return PatchJob(RowTokens(rows[0], tokens), tuple(changes), given, vectors or {})


@dataclass(frozen=True)
class Made:
    """A family's small model, as a store and as Hugging Face's own."""

    case: FamilyCase
    store: Store
    model: Any

    def units(self, number: int) -> tuple[Any, Any]:
        output = self.case.module(self.model, number, self.case.output)
        return output, self.case.module(self.model, number, self.case.written_ffn or self.case.ffn)

    @contextmanager
    def hooked(self, heads: Any, ffns: Any) -> Iterator[None]:
        handles = []
        for number in range(LAYERS):
            output, written = self.units(number)
            handles.append(output.register_forward_pre_hook(lambda m, given, n=number: heads(n, given[0])))
            handles.append(written.register_forward_hook(lambda m, given, out, n=number: ffns(n, out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def values(self, tokens: Prompt) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What heads and FFNs give at all tokens, by layer: [T, Z] and [T, D]."""
        heads: dict[int, Tensor] = {}
        ffns: dict[int, Tensor] = {}

        def keep(kept: dict[int, Tensor], number: int, value: Tensor) -> None:
            kept[number] = value.reshape(-1, value.shape[-1]).clone()

        with (
            torch.no_grad(),
            self.hooked(lambda n, z: keep(heads, n, z), lambda n, out: keep(ffns, n, out)),
        ):
            self.model(torch.tensor([tokens]))
        return heads, ffns

    def patched(self, prompt: Prompt, option: Prompt, mask: Mask, given: Any, tokens: Sequence[int]) -> float:
        """An option's log-probability with `given` values [P or 1, …] at some tokens of the prompt."""

        def heads(number: int, z: Tensor) -> tuple[Tensor]:
            z, width = z.clone(), z.shape[-1] // HEADS
            for head in mask.heads_in(number):
                mine = slice(head * width, (head + 1) * width)
                z.view(-1, z.shape[-1])[tokens, mine] = given[0][number][:, mine]
            return (z,)

        def ffns(number: int, out: Tensor) -> Tensor:
            if number in mask.ffns:
                out = out.clone()
                out.view(-1, out.shape[-1])[tokens] = given[1][number]
            return out

        with torch.no_grad(), self.hooked(heads, ffns):
            return self.logprob(prompt, option)

    def logprob(self, prompt: Prompt, option: Prompt) -> float:
        logits = self.model(torch.tensor([(*prompt, *option)[:-1]])).logits[0]
        found = logits.double().log_softmax(-1)[len(prompt) - 1 :]
        return float(sum(found[index, token] for index, token in enumerate(option)))


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("patching")
    case.save(folder / "checkpoint")
    store = make_store(folder / "checkpoint", folder / "float32", "float32")
    return Made(case, store, case.reloaded(folder / "checkpoint"))


def scored(store: Store, jobs: Sequence[PatchJob], limits: SweepLimits = PLENTY) -> list[Scores]:
    scores = [Scores.empty(len(job.changes), len(job.into.row.answered)) for job in jobs]
    with StreamedModel(store, device=CPU, resident_bytes=0) as model, cache_of(limits) as cache:
        patch(PassSetup(model, limits, cache), jobs, scores)
    return scores


@pytest.mark.parametrize("at", ["last", "all"])
def test_another_prompts_values_equal_one_hooked_run_a_unit(made: Made, at: str) -> None:
    pair = Pair.drawn(1)
    tokens = list(range(len(pair.clean))) if at == "all" else [len(pair.clean) - 1]
    values = made.values(pair.clean)
    given = [{number: value[tokens] for number, value in kind.items()} for kind in values]
    masks = (Mask(), *UNITS, SOME, ALL)
    (scores,) = scored(made.store, [pair.job(masks, at)])
    for mask, found in zip(masks, scores.logprobs, strict=True):
        expected = [made.patched(pair.corrupted, option, mask, given, tokens) for option in pair.options]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tables_values_equal_one_hooked_run_a_unit(made: Made) -> None:
    pair, rng, skeleton = Pair.drawn(2), np.random.default_rng(3), made.store.skeleton
    shapes = (LAYERS, skeleton.attention_width), (LAYERS, skeleton.width)
    means = UnitMeans(*(rng.normal(0, 0.5, shape).astype(np.float32) for shape in shapes))
    masks = (Mask(), *UNITS, SOME)
    (scores,) = scored(made.store, [pair.job(masks, source=means)])
    given = [{n: torch.tensor(table[n])[None] for n in range(LAYERS)} for table in (means.heads, means.ffns)]
    for mask, found in zip(masks, scores.logprobs, strict=True):
        at = [len(pair.clean) - 1]
        expected = [made.patched(pair.corrupted, option, mask, given, at) for option in pair.options]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_vectors_are_added_to_layers_outputs_at_the_last_token(made: Made) -> None:
    pair, rng = Pair.drawn(4), np.random.default_rng(5)
    vectors = {name: rng.normal(0, 0.5, made.store.skeleton.width).astype(np.float32) for name in ("a", "b")}
    changes = tuple(Addition(layer, name) for name in vectors for layer in range(LAYERS))
    (scores,) = scored(made.store, [pair.job(changes, vectors=vectors)])
    for change, found in zip(changes, scores.logprobs, strict=True):
        block = reduce(getattr, made.case.layers.split("."), made.model)[change.layer]

        def add(module: Any, arguments: Any, output: Any, name: str = change.vector) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, len(pair.clean) - 1] += torch.tensor(vectors[name])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(add)
        with torch.no_grad():
            expected = [made.logprob(pair.corrupted, option) for option in pair.options]
        handle.remove()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_last_tokens_patched_with_and_without_a_stem_are_the_same(float_store: Store) -> None:
    pair = Pair.drawn(6)
    whole = [prompt_row(prompt, pair.options, whole=True) for prompt in (pair.corrupted, pair.clean)]
    last = np.array([len(pair.clean) - 1])
    masks = (Mask(), *ablation_masks(3, 4)[1:])
    job = PatchJob(RowTokens(whole[0], last), masks, RowTokens(whole[1], last))
    short, long = scored(float_store, [pair.job(masks), job])
    np.testing.assert_allclose(short.logprobs, long.logprobs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("at", ["last", "all"])
def test_equal_prompts_change_nothing_and_everything_patched_is_the_other_prompt(
    int8_store: Store, at: str
) -> None:
    pair = Pair.drawn(7)
    masks = (Mask(), *ablation_masks(3, 4)[1:])
    (same,) = scored(int8_store, [replace(pair, corrupted=pair.clean).job(masks, at)])
    np.testing.assert_allclose(same.logprobs - same.logprobs[0], 0, atol=1e-5)
    heads = frozenset((layer, head) for layer in range(3) for head in range(4))
    everything = Mask(heads, frozenset(range(3)))
    # Of a token that both prompts have, all that is written at it is the other prompt's then.
    alike = replace(pair, corrupted=(*pair.corrupted[:-1], pair.clean[-1]))
    clean = replace(pair, corrupted=pair.clean)
    patched, other = scored(int8_store, [alike.job((everything,), at), clean.job((Mask(),), at)])
    assert patched.logprobs[0, 0] == pytest.approx(other.logprobs[0, 0], abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=3),
    room=st.integers(25_000, 200_000),
    micro=st.sampled_from([16, 64, 1280]),
    at=st.sampled_from(["last", "all"]),
)
def test_int8_results_do_not_depend_on_memory_or_company(
    int8_store: Store, seeds: list[int], room: int, micro: int, at: str
) -> None:
    masks = (Mask(), *ablation_masks(3, 4)[1:], SOME)
    jobs = [Pair.drawn(seed).job(masks, at) for seed in seeds]
    tight = scored(int8_store, jobs, SweepLimits(room, 0, 0, micro))
    for job, scores in zip(jobs, tight, strict=True):
        for index in range(0, len(masks), 5):
            (alone,) = scored(int8_store, [replace(job, changes=(masks[index],))])
            np.testing.assert_array_equal(scores.logprobs[index], alone.logprobs[0])


@pytest.mark.parametrize("at", ["last", "all"])
def test_patching_takes_what_is_planned_and_goes_on_where_it_was(float_store: Store, at: str) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    masks = (Mask(), *ablation_masks(3, 4)[1:], SOME)
    jobs = [Pair.drawn(seed).job((*masks, Addition(1, "v"), Addition(2, "v")), at) for seed in (8, 9)]
    jobs = [replace(job, vectors={"v": np.ones(32, np.float32)}) for job in jobs]
    whole = scored(float_store, jobs)
    limits, done, stops = SweepLimits(30_000, 0), list[SweepCost](), 0
    scores = [Scores.empty(len(job.changes), 3) for job in jobs]
    with StreamedModel(float_store, device=CPU, resident_bytes=0) as model, cache_of(limits) as cache:
        while not all(score.scored.all() for score in scores):
            with pytest.raises(Stopped):
                patch(PassSetup(model, limits, cache, done.append, stop), jobs, scores)
            stops += 1
    assert stops > 1
    for found, expected in zip(scores, whole, strict=True):
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    wanted = [np.arange(len(job.changes)) for job in jobs]
    planned = patch_cost(jobs, wanted, 3, TokenBytes.of(float_store.skeleton), limits.alive_bytes)
    assert sum(done, SweepCost()) == replace(planned, layers_read=0)


def test_a_prompt_that_does_not_fit_is_told_with_what_it_needs(float_store: Store) -> None:
    for at in ("last", "all"):
        with pytest.raises(DoesNotFit, match="a prompt of 14 tokens and one change to it take"):
            scored(float_store, [Pair.drawn(1).job((Mask(),), at)], SweepLimits(1000))


def test_what_is_held_of_a_clean_row_is_what_is_counted(made: Made) -> None:
    """Keys and values of fewer heads, heads wider than the residual: by the tensors' own sizes."""
    rows = Pair.drawn(1).job((Mask(),)).rows
    with StreamedModel(made.store, device=CPU, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        clean = _CleanRows(PassSetup(model, PLENTY, cache), rows, RowMasks(model))
        for _, layer in model.layers(range(LAYERS)):
            with torch.no_grad():
                clean.step(layer)
            held = {row: sum(part.nbytes for part in vars(kept).values()) for row, kept in clean.at.items()}
            each = TokenBytes.of(made.store.skeleton).clean
            assert held == {row: len(row) * each for row in rows}


@pytest.mark.parametrize("at", ["last", "all"])
def test_a_plan_says_what_the_largest_block_holds(made: Made, at: str) -> None:
    prepared: Any = SimpleNamespace(skeleton=made.store.skeleton)
    sizes, masks = TokenBytes.of(made.store.skeleton), (Mask(), *UNITS)
    part = PatchPart("patch", "patch", tuple(Pair.drawn(seed).job(masks, at) for seed in (8, 9)))
    changed = sum(len(masks) * len(job.into.row) for job in part.jobs)
    whole = part.tokens * sizes.clean + changed * sizes.changed
    assert held_by([part], prepared, PLENTY).alive_bytes == whole
    tight = SweepLimits(whole // 2)
    wanted = [np.arange(len(masks))] * 2
    assert len(list(patch_blocks(part.jobs, wanted, sizes, tight.alive_bytes))) > 1
    assert whole // 4 < held_by([part], prepared, tight).alive_bytes <= whole // 2


def test_vectors_are_what_heads_write_into_the_residual(made: Made) -> None:
    """The residual after a layer's attention, with heads' means in place of zeros, differs by the vector."""
    skeleton, rng = made.store.skeleton, np.random.default_rng(10)
    shapes = (LAYERS, skeleton.attention_width), (LAYERS, skeleton.width)
    means = UnitMeans(*(rng.normal(0, 0.5, shape).astype(np.float32) for shape in shapes))
    masks = [Mask(frozenset([(1, 0)])), Mask(frozenset([(0, 1), (1, 2), (1, 3)]))]
    with StreamedModel(made.store, device=CPU, resident_bytes=0) as model:
        found = written_by_heads(model, [(means, mask) for mask in masks])
    expected = np.zeros_like(found)
    for number in range(LAYERS):
        projection, _ = made.units(number)
        weight = projection.weight.detach().numpy()
        z = means.heads[number]
        # Gemma norms what attention writes: by the root mean square of the whole.
        whole = torch.tensor(z @ weight.T)[None]
        scale = np.ones(len(weight))
        if made.case.model_type == "gemma3_text":
            norm = made.case.module(made.model, number, "post_attention_layernorm")
            with torch.no_grad():
                scale = (norm(whole) / whole)[0].numpy()
        for index, mask in enumerate(masks):
            width = len(z) // HEADS
            part = np.zeros_like(z)
            for head in mask.heads_in(number):
                part[head * width : (head + 1) * width] = z[head * width : (head + 1) * width]
            expected[index] += part @ weight.T * scale
    np.testing.assert_allclose(found, expected, atol=1e-5)
