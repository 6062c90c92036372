"""Scores of heads on random sequences: against slow loops, Hugging Face and TransformerLens."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from conftest import make_checkpoint, make_store
from demo_scores import DEMO, PLENTY
from scipy import stats
from transformers import AutoTokenizer, OPTForCausalLM

from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.copying import DEFAULT_COPYING, REFERENCE_COPYING, CopyingForm
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores, PassCheckpoint
from lowmem_icl.engine.passes import PassSetup, score_heads
from lowmem_icl.engine.patterns import RowStates, pattern_scores, patterns, query_blocks
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.errors import InputError
from lowmem_icl.experiments.induction.stage import head_questions
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.rows import stem_of
from lowmem_icl.session.prepare import prepare, with_store
from lowmem_icl.tasks.random_sequences import Drawable, drawable_ids, random_sequences

FORMS = {
    "default": DEFAULT_COPYING,
    "norm": CopyingForm(final_norm=True),
    "softmax": CopyingForm(softmax=True),
    "bias": CopyingForm(bias=True),
    "all": CopyingForm(final_norm=True, softmax=True, bias=True),
    "reference": REFERENCE_COPYING,
}
SEQUENCES = random_sequences(Drawable(np.arange(4, 300), "ids"), 2, 96, seed=1, count=3)


def questions(form: CopyingForm = DEFAULT_COPYING, *, spurious: bool = False) -> HeadQuestions:
    rows = [
        tuple(stem_of(tokens.tolist()) for tokens in of_kind)
        for of_kind in (SEQUENCES.repeated, SEQUENCES.unrepeated)
    ]
    return HeadQuestions(rows[0], rows[1], SEQUENCES.base_tokens, form, spurious)


def scored(
    store: Store, asked: HeadQuestions, limits: SweepLimits = PLENTY, resident_bytes: int = 1 << 30
) -> HeadScores:
    skeleton = store.skeleton
    scores = HeadScores.empty(len(asked.base_tokens), skeleton.layers, skeleton.heads)
    with StreamedModel(store, device=torch.device("cpu"), resident_bytes=resident_bytes) as model:
        score_heads(setup_of(model, limits), asked, scores)
    return scores


def setup_of(model: StreamedModel, limits: SweepLimits = PLENTY) -> PassSetup:
    return PassSetup(model, limits, CleanCache(limits.cache_bytes, limits.disk_bytes))


def eager(checkpoint: Path) -> OPTForCausalLM:
    model = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def dense_blocks(attention: torch.Tensor, rows: int = 64) -> Iterator[tuple[slice, torch.Tensor]]:
    for span in query_blocks(attention.shape[1], rows):
        yield span, attention[:, span, : span.stop]


@pytest.mark.parametrize("base", [2, 3, 7, 25, 40])
@pytest.mark.parametrize("spurious", [False, True])
def test_gathered_entries_equal_the_nested_loops_exactly(base: int, spurious: bool) -> None:
    tokens = 4 * base + 1
    rng = np.random.default_rng(base)
    # Multiples of 2^-12: any order of summing gives the same number.
    attention = np.tril(rng.integers(0, 4096, (3, tokens, tokens)) / 4096).astype(np.float32)
    expected = oracles.pattern_scores(attention, base, reference=spurious)
    for rows in (1, 5, 64, 1000):
        ours = pattern_scores(dense_blocks(torch.from_numpy(attention), rows), base, spurious=spurious)
        assert {name: values.tolist() for name, values in ours._asdict().items()} == expected


def test_an_ideal_head_scores_one_and_a_uniform_one_its_closed_form() -> None:
    base, tokens = 25, 101
    ideal = torch.zeros(3, tokens, tokens)
    query = torch.arange(tokens)
    later = query[query > base]
    ideal[0, later, later - base + 1] = 1
    ideal[1, query[1:], query[1:] - 1] = 1
    ideal[2, later, later - base] = 1
    ours = pattern_scores(dense_blocks(ideal), base)
    assert ours.prefix_matching.tolist() == [1, 0, 0]
    assert ours.previous_token.tolist() == [0, 1, 0]
    assert ours.duplicate_token.tolist() == [0, 0, 1]
    uniform = (torch.ones(1, tokens, tokens, dtype=torch.float64) / (query + 1)[:, None]).tril()
    queries = np.arange(base + 1, tokens)
    closed = float(np.sum((queries - 1) // base / (queries + 1)) / (3 * base))
    ours = pattern_scores(dense_blocks(uniform), base)
    assert float(ours.prefix_matching[0]) == pytest.approx(closed, rel=1e-12)
    assert float(ours.duplicate_token[0]) == pytest.approx(closed, rel=1e-12)
    assert float(ours.previous_token[0]) == pytest.approx(np.mean(1 / np.arange(3, tokens + 1)), rel=1e-12)


def test_attention_is_what_hugging_face_gives(checkpoint: Path, float_store: Store) -> None:
    reference = eager(checkpoint)
    tokens = torch.from_numpy(SEQUENCES.repeated[0])
    expected = reference(tokens[None], output_attentions=True, output_hidden_states=True)
    row = stem_of(tokens.tolist())
    with StreamedModel(float_store, device=torch.device("cpu"), resident_bytes=0) as model, torch.no_grad():
        from lowmem_icl.engine.row_masks import embedded, plain_segments

        residual = embedded(model, row)
        segments = plain_segments(model, [row])
        for number, layer in model.layers(range(3)):
            torch.testing.assert_close(residual, expected.hidden_states[number][0], atol=2e-5, rtol=1e-4)
            attention = layer.attend(residual, segments, with_queries=True)
            assert attention.queries is not None
            seen = RowStates(attention.queries, attention.keys)
            for rows in (7, 64):
                for span, pattern in patterns(seen, rows):
                    wanted = expected.attentions[number][0, :, span, : span.stop]
                    torch.testing.assert_close(pattern, wanted, atol=1e-5, rtol=1e-4)
            residual = layer.finish(residual, attention.z)


@pytest.mark.parametrize("name", FORMS)
def test_copying_equals_the_description(checkpoint: Path, float_store: Store, name: str) -> None:
    form = FORMS[name]
    ours = scored(float_store, questions(form)).copying
    reference = eager(checkpoint)
    fields = {field: getattr(form, field) for field in ("final_norm", "softmax", "bias", "own_token")}
    for sequence, tokens in enumerate(SEQUENCES.unrepeated[:2]):
        expected = oracles.copying(reference, tokens.tolist(), **fields)
        assert expected.std() > 0.01
        np.testing.assert_allclose(ours[sequence], expected, atol=2e-4)


def test_a_model_with_projections_and_no_final_norm_copies_alike(tmp_path: Path) -> None:
    """OPT-350M's kind: embeddings narrower than the model, the norms after."""
    folder = make_checkpoint(tmp_path / "narrow", word_embed_proj_dim=16, do_layer_norm_before=False)
    store = make_store(folder, tmp_path / "store", "float32")
    reference = eager(folder)
    ours = scored(store, questions())
    np.testing.assert_allclose(ours.copying_eigenvalues, oracles_of_projected(reference), atol=1e-5)


def oracles_of_projected(model: OPTForCausalLM) -> np.ndarray:
    decoder = model.model.decoder
    put_in = (decoder.embed_tokens.weight @ decoder.project_in.weight.t()).double().numpy()
    read = (model.lm_head.weight @ decoder.project_out.weight).double().numpy()
    scores = []
    for layer in decoder.layers:
        values = layer.self_attn.v_proj.weight.double().numpy()
        output = layer.self_attn.out_proj.weight.double().numpy()
        of_layer = []
        for head in range(4):
            mine = slice(8 * head, 8 * head + 8)
            eigenvalues = np.linalg.eigvals(read @ output[:, mine] @ values[mine] @ put_in.T)
            of_layer.append(eigenvalues.real.sum() / np.abs(eigenvalues).sum())
        scores.append(of_layer)
    return np.array(scores)


def test_eigenvalues_are_those_of_the_whole_product(checkpoint: Path, float_store: Store) -> None:
    ours = scored(float_store, questions()).copying_eigenvalues
    np.testing.assert_allclose(ours, oracles.copying_eigenvalues(eager(checkpoint)), atol=1e-5)


@pytest.mark.parametrize("spurious", [False, True])
def test_scores_of_a_model_equal_the_loops_over_its_attention(
    checkpoint: Path, float_store: Store, spurious: bool
) -> None:
    ours = scored(float_store, questions(spurious=spurious))
    reference = eager(checkpoint)
    for sequence, tokens in enumerate(SEQUENCES.repeated):
        attentions = reference(torch.from_numpy(tokens)[None], output_attentions=True).attentions
        for number, attention in enumerate(attentions):
            expected = oracles.pattern_scores(
                attention[0].numpy(), SEQUENCES.base_tokens[sequence], reference=spurious
            )
            for name, values in expected.items():
                np.testing.assert_allclose(getattr(ours, name)[sequence, number], values, atol=1e-5)


@pytest.mark.parametrize("form", [DEFAULT_COPYING, REFERENCE_COPYING], ids=["default", "reference"])
def test_memory_and_micro_batches_change_nothing(int8_store: Store, form: CopyingForm) -> None:
    asked = questions(form)
    expected = scored(int8_store, asked)
    assert all(np.isfinite(array).all() for array in expected.arrays().values())
    row = 2 * 93 * 32 * 4
    for alive, together in ((row, 16), (2 * row, 128), (3 * row, 512)):
        ours = scored(int8_store, asked, SweepLimits(alive, micro_batch_tokens=together), resident_bytes=0)
        for name, array in ours.arrays().items():
            np.testing.assert_array_equal(array, expected.arrays()[name], err_msg=name)


def test_weights_are_read_once(int8_store: Store) -> None:
    asked = questions()
    with StreamedModel(int8_store, device=torch.device("cpu"), resident_bytes=0) as model:
        score_heads(setup_of(model), asked, HeadScores.empty(3, 3, 4))
        assert model.read_bytes == sum(path.stat().st_size for path in int8_store.layer_paths)


def test_a_stopped_pass_goes_on_at_its_layer(int8_store: Store) -> None:
    asked, expected = questions(), scored(int8_store, questions())
    scores = HeadScores.empty(3, 3, 4)
    checkpoints: list[PassCheckpoint] = []
    layers = 0

    def stop() -> None:
        nonlocal layers
        layers += 1
        if layers == 2:
            raise KeyboardInterrupt

    with StreamedModel(int8_store, device=torch.device("cpu"), resident_bytes=0) as model:
        with pytest.raises(KeyboardInterrupt):
            score_heads(replace(setup_of(model), after_step=stop), asked, scores, begin=checkpoints.append)
        left = replace(checkpoints[0])
        before = model.read_bytes

        def go_on(checkpoint: PassCheckpoint) -> None:
            for name, array in checkpoint.arrays().items():
                array[...] = left.arrays()[name]

        score_heads(setup_of(model), asked, scores, begin=go_on)
        assert model.read_bytes - before == int8_store.layer_paths[2].stat().st_size
    for name, array in scores.arrays().items():
        np.testing.assert_array_equal(array, expected.arrays()[name], err_msg=name)


def test_tokens_are_drawn_by_merge_ranks_without_the_first_and_last_4_percent(opt_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(opt_tokenizer)
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    drawable = drawable_ids(form, tokenizer.all_special_ids, 50272)
    merges = (opt_tokenizer / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in merges if line and not line.startswith("#version")]
    vocabulary = json.loads((opt_tokenizer / "vocab.json").read_text(encoding="utf-8"))
    assert len(merges) == 50000
    assert drawable.ordered_by == "merges"
    assert drawable.ids.tolist() == [vocabulary[line.replace(" ", "")] for line in merges[2000:48000]]
    sequences = random_sequences(drawable, 2, 2048, seed=42)
    assert sequences.base_tokens == tuple(range(25, 224, 2))
    assert [len(tokens) for tokens in sequences.repeated] == [4 * base + 1 for base in range(25, 224, 2)]


def test_sequences_are_unique_repeated_and_the_same_for_a_seed() -> None:
    drawable = Drawable(np.arange(10, 1010), "ids")
    one, again, other = (random_sequences(drawable, 2, 512, seed) for seed in (1, 1, 2))
    assert len(one.repeated) == 100
    for number, base in enumerate(one.base_tokens):
        assert base == min(25 + 2 * number, 127)
        tokens, others = one.repeated[number], one.unrepeated[number]
        assert tokens[0] == others[0] == 2
        assert len(set(tokens[1 : base + 1].tolist())) == base
        assert (tokens[1:].reshape(4, base) == tokens[1 : base + 1]).all()
        assert len(set(others[1:].tolist())) == 4 * base
        np.testing.assert_array_equal(tokens, again.repeated[number])
        np.testing.assert_array_equal(others, again.unrepeated[number])
    assert any((a != b).any() for a, b in zip(one.repeated, other.repeated, strict=True))
    # Written down: another machine or numpy must draw the same.
    assert one.repeated[0][1:6].tolist() == [940, 846, 44, 942, 151]


def test_without_merges_the_middle_of_the_ids_is_drawn_and_no_special_token() -> None:
    form = {"model": {"vocab": {str(number): number for number in range(100)}}}
    drawable = drawable_ids(form, [50, 1], 100)
    # 98 ids that are not special; three less on either side.
    assert drawable.ids.tolist() == [number for number in range(4, 97) if number != 50]
    assert drawable.ordered_by == "ids"
    assert max(random_sequences(drawable, 2, 2048, 0).base_tokens) == 92 // 4
    with pytest.raises(InputError, match="leave induction out"):
        random_sequences(Drawable(np.arange(7), "ids"), 2, 2048, 0)


def test_transformer_lens_finds_the_same_heads(stores: Path) -> None:
    lens = pytest.importorskip("transformer_lens")
    from transformer_lens.head_detector import detect_head
    from transformer_lens.model_bridge import TransformerBridge

    assert lens is not None
    model = eager(DEMO)
    bridge = TransformerBridge.boot_transformers(
        str(DEMO), hf_model=model, tokenizer=AutoTokenizer.from_pretrained(DEMO), device="cpu",
        dtype=torch.float32
    )  # fmt: skip
    options = RunOptions(tasks=("recall",), shots=(16,), store_dir=stores, experiments=("induction",))
    demo = with_store(prepare(options))
    chosen = slice(0, 41, 20)
    whole = head_questions(demo)
    asked = replace(
        whole,
        repeated=whole.repeated[chosen],
        unrepeated=whole.unrepeated[chosen],
        base_tokens=whole.base_tokens[chosen],
    )
    theirs = []
    for repeated in demo.random_sequences.repeated[chosen]:
        tokens = torch.from_numpy(repeated)[None]
        bridge.to_tokens = lambda text, tokens=tokens: tokens
        theirs.append(detect_head(bridge, "", "induction_head").numpy())
    ours = scored(demo.store, asked).prefix_matching.mean(0)
    expected = np.mean(theirs, axis=0)
    assert stats.spearmanr(ours.ravel(), expected.ravel()).statistic >= 0.9
    top = [set(np.argsort(-scores.ravel())[:4].tolist()) for scores in (ours, expected)]
    assert top[0] == top[1]
