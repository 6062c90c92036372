"""Induction heads: scores against slow loops, Hugging Face and TransformerLens; capacity, overlap,
and what they cause.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import polars as pl
import pytest
import torch
from commands import invoke
from conftest import make_checkpoint, make_store
from demo_scores import DEMO, PLENTY, DemoScores
from scipy import stats
from transformers import AutoTokenizer, OPTForCausalLM

from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.copying import DEFAULT_COPYING, REFERENCE_COPYING, CopyingForm
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores, PassCheckpoint
from lowmem_icl.engine.passes import PassSetup, score_heads
from lowmem_icl.engine.patterns import RowStates, pattern_scores, patterns, query_blocks
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.errors import InputError
from lowmem_icl.experiments.induction import measure as induction
from lowmem_icl.experiments.induction.stage import head_questions
from lowmem_icl.masks.files import read_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.rows import stem_of
from lowmem_icl.session.prepare import prepare, with_store
from lowmem_icl.statistics.detection import area_under_curve, r_precision, rank_correlation
from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.schema import read_table
from lowmem_icl.tasks.random_sequences import Drawable, drawable_ids, random_sequences

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


FORMS = {
    "default": DEFAULT_COPYING,
    "norm": CopyingForm(final_norm=True),
    "softmax": CopyingForm(softmax=True),
    "bias": CopyingForm(bias=True),
    "all": CopyingForm(final_norm=True, softmax=True, bias=True),
    "reference": REFERENCE_COPYING,
}


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


def test_capacity_retained_equals_the_loop() -> None:
    rng = np.random.default_rng(0)
    scores, ranking = rng.random((5, 6)), rng.permutation(30).reshape(5, 6).astype(float)
    ranked = {RankingKey("recall", 4, "gradient"): ranking}
    ours, drawn = induction.capacity_blocks("copying", scores, ranked, seed=0)
    for block, method in ((ours, "gradient"), (drawn, "random")):
        assert (block["procedure"], block["other_method"], block["method"]) == ("capacity", "copying", method)
        assert "mask" not in block
    assert (ours["task"], ours["shots"]) == ("recall", 4)
    flat, order = scores.ravel(), np.argsort(ranking.ravel())
    for percent, value, removed in zip(ours["percent"], ours["value"], ours["heads_removed"], strict=True):
        count = 30 * percent // 100
        assert removed == count
        assert value == pytest.approx(sum(flat[index] for index in order[count:]) / flat.sum(), abs=1e-12)
    assert (ours["value"][0], ours["value"][-1]) == (1, 0)
    assert np.abs(drawn["value"] - drawn["chance"]).max() < 0.05
    assert (drawn["low"] <= drawn["chance"] + 1e-12).all()
    assert (drawn["chance"] <= drawn["high"] + 1e-12).all()
    mask = Mask(frozenset([(0, 0), (4, 5)]))
    record = induction.capacity_of_mask("copying", scores, mask)
    assert record["value"] == pytest.approx(1 - (scores[0, 0] + scores[4, 5]) / scores.sum())
    assert record["chance"] == pytest.approx(28 / 30)
    assert (record["procedure"], record["heads_removed"], record["ffns_removed"]) == ("capacity", 2, 0)


def test_important_heads_are_compared_with_as_many_as_there_are_induction_heads() -> None:
    prefix = np.zeros((2, 5))
    prefix[0, 1], prefix[1, 4], prefix[1, 0] = 0.9, 0.4, 0.29
    ranking = np.arange(10.0).reshape(2, 5)
    records = {
        record["metric"]: record
        for record in induction.important_heads_records(prefix, {RankingKey("a", 1, "gradient"): ranking})
    }
    assert set(records) == {"induction_spearman", "induction_precision", "induction_auc"}
    for record in records.values():
        assert (record["procedure"], record["other_method"]) == ("important-heads", "prefix_matching")
        assert (record["task"], record["shots"], record["method"]) == ("a", 1, "gradient")
    assert records["induction_spearman"]["count"] is None
    # Two heads reach 0.3; of the two most important ones one is among them.
    assert (records["induction_precision"]["count"], records["induction_precision"]["value"]) == (2, 0.5)
    # It is more important than all 8 others, the other one than 1 of them.
    assert records["induction_auc"]["value"] == pytest.approx(9 / 16)
    none = induction.important_heads_records(prefix * 0.1, {RankingKey("a", 1, "gradient"): ranking})
    assert [record["metric"] for record in none] == ["induction_spearman"]


def test_a_score_has_its_mean_over_sequences_and_their_variance() -> None:
    by_sequence = np.random.default_rng(0).random((5, 2, 3))
    table = frame("results", induction.score_blocks("copying", "output", by_sequence))
    assert set(table["procedure"]) == {"scores"}
    assert set(table["documents"]) == {5}
    of_metric = {
        metric: table.filter(pl.col("metric") == metric).sort("layer", "head")
        for metric in ("copying", "copying_variance")
    }
    variance = by_sequence.var(0, ddof=1).ravel()
    np.testing.assert_allclose(of_metric["copying"]["value"], by_sequence.mean(0).ravel())
    np.testing.assert_allclose(of_metric["copying_variance"]["value"], variance)
    np.testing.assert_allclose(of_metric["copying"]["stderr"], np.sqrt(variance / 5))
    alone = frame("results", induction.score_blocks("copying", "output", by_sequence[:1]))
    assert alone.filter(pl.col("metric") == "copying")["stderr"].is_nan().all()


def test_the_band_of_random_draws_is_over_draws_of_one_task_and_metric() -> None:
    values = np.linspace(0, 0.5, 20)
    records = [
        {"task": task, "shots": 4, "metric": metric, "mask": f"induction-random-{draw:02d}", "seed": 42}
        | {"procedure": "removal", "method": "random", "value": value + shift, "stderr": 0.1}
        for task, metric, shift in (("a", "acc", 0.0), ("b", "acc", 0.25), ("a", "acc_drop", -0.5))
        for draw, value in enumerate(values, start=1)
    ]
    bands = list(induction.band_records(records))
    assert [(band["task"], band["metric"]) for band in bands] == [
        ("a", "acc"),
        ("b", "acc"),
        ("a", "acc_drop"),
    ]
    for band, shift in zip(bands, (0.0, 0.25, -0.5), strict=True):
        assert (band["method"], band["mask"]) == ("random-median", "induction-random")
        assert (band["procedure"], band["stderr"]) == ("removal", None)
        assert band["value"] == pytest.approx(0.25 + shift)
        reach = stats.t.ppf(0.975, 19) * values.std(ddof=1) * np.sqrt(1 + 1 / 20)
        lowest = 0 if band["metric"] == "acc" else -1
        expected = np.clip([0.25 + shift - reach, 0.25 + shift + reach], lowest, 1)
        assert (band["low"], band["high"]) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("count", [1, 3, 17, 39])
def test_detection_measures_equal_scipys(count: int) -> None:
    rng = np.random.default_rng(count)
    scores = rng.integers(0, 25, (10, 4)).astype(float)
    members = rng.permutation(np.arange(40) < count).reshape(10, 4)
    area = area_under_curve(scores, members)
    expected = stats.mannwhitneyu(scores[members], scores[~members]).statistic / (count * (40 - count))
    assert area.value == pytest.approx(expected)
    precise = r_precision(scores, members)
    drawn = []
    for _ in range(2000):
        top = np.lexsort([rng.random(40), -scores.ravel()])[:count]
        drawn.append(members.ravel()[top].mean())
    assert precise.value == pytest.approx(np.mean(drawn), abs=1e-9 + 4 * np.std(drawn) / np.sqrt(2000))
    assert (area.chance, precise.chance) == (0.5, count / 40)
    for measure in (area, precise):
        if min(flags.any(1).sum() for flags in (members, ~members)) < 5:
            assert np.isnan([measure.low, measure.high]).all(), "few layers tell nothing of others"
        else:
            assert 0 <= measure.low <= measure.value <= measure.high <= 1
            assert measure.high - measure.low > 0.05
    other = rng.random((10, 4))
    ranks = rank_correlation(scores, other)
    assert ranks.value == pytest.approx(stats.spearmanr(scores.ravel(), other.ravel()).statistic)
    assert ranks.low < ranks.value < ranks.high


def test_the_jackknife_leaves_out_layers() -> None:
    scores, other = np.random.default_rng(0).normal(size=(2, 6, 3))
    parts = []
    for layer in range(6):
        kept = [row for row in range(6) if row != layer]
        parts.append(np.arctanh(stats.spearmanr(scores[kept].ravel(), other[kept].ravel()).statistic))
    stderr = np.sqrt(5 / 6 * np.sum((np.array(parts) - np.mean(parts)) ** 2))
    found = rank_correlation(scores, other)
    width = np.arctanh(found.high) - np.arctanh(found.low)
    assert width == pytest.approx(2 * stats.t.ppf(0.985, 5) * stderr)
    assert np.isnan(rank_correlation(scores[:2], other[:2]).low), "two layers tell nothing of others"


def test_a_perfect_score_finds_all() -> None:
    scores = np.arange(20.0).reshape(4, 5)[:, ::-1]
    members = np.zeros((4, 5), dtype=bool)
    members[3] = True
    assert area_under_curve(scores, members).value == 1
    assert area_under_curve(-scores, members).value == 0
    assert r_precision(scores, members).value == 1
    assert rank_correlation(scores, scores).value == pytest.approx(1)
    assert np.isnan(area_under_curve(scores, scores > 99).value)
    assert np.isnan(r_precision(scores, scores > 99).value)
    spread = np.arange(20.0).reshape(4, 5).T
    found = area_under_curve(spread, spread >= 15)
    assert found.value == found.high == 1
    assert 0.3 < found.low < 0.95


def test_random_draws_are_of_the_same_layers_and_spare_the_circuit() -> None:
    prefix, previous = np.zeros((4, 8)), np.zeros((4, 8))
    prefix[1, :2], prefix[2, 3], prefix[1, 7] = 0.9, 0.8, 0.35
    previous[1, 4] = previous[2, 0] = 0.5
    removed = Mask(frozenset([(1, 0), (1, 1), (2, 3)]))
    assert induction.top_induction_heads(prefix).heads == removed.heads | {(1, 7)}
    draws = induction.random_draws(removed, prefix, previous, seed=3)
    assert len(draws) == 20
    assert len(set(draws)) > 10
    for mask in draws:
        assert sorted(layer for layer, _ in mask.heads) == [1, 1, 2]
        assert not mask.heads & {(1, 0), (1, 1), (2, 3), (1, 7), (1, 4), (2, 0)}
    assert draws == induction.random_draws(removed, prefix, previous, seed=3)
    crowded = np.full((1, 8), 0.9)
    assert len(induction.top_induction_heads(crowded)) == 2, "at most a quarter"
    assert induction.random_draws(Mask(frozenset([(0, 0)])), crowded, np.zeros((1, 8)), 0) == []


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


def test_the_demos_induction_heads_are_what_recall_needs(small_run: Path, demo_scores: DemoScores) -> None:
    rows = read_table(small_run / "results.parquet", "results").sort("layer", "head")
    prefix, previous = (
        rows.filter(pl.col("metric") == metric)["value"].to_numpy().reshape(4, 8)
        for metric in ("prefix_matching", "previous_token")
    )
    assert prefix.max() >= 0.9
    removed = induction.top_induction_heads(prefix)
    assert 1 <= len(removed) <= prefix.size / 4
    (without,) = demo_scores.accuracy("recall", 16, removed)
    assert abs(without - 0.25) <= 0.05
    draws = induction.random_draws(removed, prefix, previous, seed=42)
    assert len(draws) == 20
    clean, *random = demo_scores.accuracy("recall", 16, Mask(), *draws)
    assert clean - np.median(random) < 0.1


def induction_records(folder: Path) -> pl.DataFrame:
    return read_table(folder / "results.parquet", "results").filter(pl.col("experiment") == "induction")


def test_a_run_has_every_score_of_every_head(small_run: Path) -> None:
    record = json.loads((small_run / "run.json").read_text())
    assert record["induction"] == {
        "sequences": 100, "base_tokens": [25, 120], "base_tokens_wanted": [25, 223], "drawable_ids": 483,
        "drawable_ids_ordered_by": "ids",
    }  # fmt: skip
    rows = induction_records(small_run)
    for metric in ("prefix_matching", "copying", "previous_token", "duplicate_token"):
        scores = rows.filter(pl.col("metric") == metric)
        assert len(scores) == len(rows.filter(pl.col("metric") == f"{metric}_variance")) == 32
        assert set(scores["kind"]) == {"head"}
        assert set(scores["documents"]) == {100}
        variance = rows.filter(pl.col("metric") == f"{metric}_variance")["value"].to_numpy()
        np.testing.assert_allclose(scores["stderr"].to_numpy(), np.sqrt(variance / 100))
    assert len(rows.filter(pl.col("metric") == "copying_eigenvalues")) == 32
    procedures = dict(rows.group_by("procedure").agg(pl.col("metric").unique()).iter_rows())
    assert set(procedures) == {"scores", "capacity", "important-heads", "removal"}
    assert set(procedures["capacity"]) == {"capacity_retained"}
    assert set(procedures["important-heads"]) == {
        "induction_spearman",
        "induction_precision",
        "induction_auc",
    }


def test_a_run_has_the_capacity_that_every_mask_and_ranking_leaves(small_run: Path) -> None:
    rows = induction_records(small_run)
    under_masks = rows.filter((pl.col("procedure") == "capacity") & pl.col("mask").is_not_null())
    masks = {path.stem for path in (small_run / "masks").glob("*.json")}
    pruned = {name for name in masks if not name.startswith("induction-")}
    assert set(under_masks["mask"]) == pruned
    assert len(under_masks) == 2 * len(pruned), "of two capacities"
    assert (under_masks["mask_task"] == under_masks["task"]).all()
    assert (under_masks["mask_shots"] == under_masks["shots"]).all()
    assert under_masks["percent"].null_count() == len(under_masks)
    curves = rows.filter((pl.col("procedure") == "capacity") & pl.col("percent").is_not_null())
    assert set(curves["metric"]) == {"capacity_retained"}
    keys = curves.filter(pl.col("method") == "gradient").select("task", "shots", "other_method").unique()
    assert len(keys) == 3 * 2 * 2, "two tasks and the aggregate, two shot counts, two capacities"
    assert set(curves["method"]) == {"gradient", "attribution", "ablation", "icl_effect", "random"}


def test_a_run_has_how_well_rankings_find_induction_heads(small_run: Path) -> None:
    rows = induction_records(small_run)
    areas = rows.filter(pl.col("metric") == "induction_auc")
    assert set(areas["chance"]) == {0.5}
    assert areas["low"].null_count() == len(areas), "the demo's induction heads are all of one layer"
    assert set(areas["count"]) == {
        int((rows.filter(pl.col("metric") == "prefix_matching")["value"] >= induction.HEAD_SCORE).sum())
    }


def test_a_run_has_what_removing_induction_heads_costs(small_run: Path) -> None:
    rows = induction_records(small_run)
    effects = rows.filter(pl.col("mask").is_not_null() & (pl.col("metric") == "acc"))
    assert set(effects["shots"]) == {4}
    assert set(effects["task"]) == {"recall", "knowledge", "aggregate"}
    assert len(effects.filter(pl.col("method") == "random")) == 20 * 3
    median = effects.filter((pl.col("mask") == "induction-random") & (pl.col("task") == "recall"))
    drawn = effects.filter((pl.col("method") == "random") & (pl.col("task") == "recall"))["value"]
    assert median["value"].item() == pytest.approx(drawn.median())
    costs = rows.filter((pl.col("metric") == "acc_drop") & (pl.col("task") == "recall"))
    assert len(costs) == 1 + 20 + 1
    clean, without = (
        effects.filter((pl.col("mask") == name) & (pl.col("task") == "recall"))["value"].item()
        for name in ("clean", "induction-heads")
    )
    assert costs.filter(pl.col("method") == "induction")["value"].item() == pytest.approx(clean - without)
    mask = read_mask(small_run / "masks" / "induction-heads.json")
    assert mask.made["method"] == "induction"
    assert len(mask.mask) == effects.filter(pl.col("method") == "induction")["heads_removed"][0]


def test_a_runs_page_tells_of_induction_heads(small_run: Path) -> None:
    page = (small_run / "report.html").read_text()
    assert "Induction heads" in page
    assert "reach a prefix-matching score" in page
    assert "previous-token heads left out" in page
    assert (small_run / "figures" / "induction.svg").is_file()
    assert (small_run / "figures" / "capacity.svg").is_file()


def test_induction_reads_nothing_that_stays_in_memory(small_run: Path) -> None:
    stage = json.loads((small_run / "run.json").read_text())["stages"]["induction"]
    assert stage["read_bytes"] == stage["planned_read_bytes"] == 0, "importance has read what stays in memory"


def test_options_of_copying_are_checked(tmp_path: Path) -> None:
    told = invoke("run", "--copying-with", "norm,noise", "--out", tmp_path / "run")
    assert told.exit_code == 2
    assert "--copying-with" in told.stderr
    assert RunOptions(copying_with="norm, softmax").copying_with == ("norm", "softmax")  # type: ignore[arg-type]
