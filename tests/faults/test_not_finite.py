"""Values that are not finite on the way: named by layer, unit and document; the others' results stay."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from commands import invoke
from conftest import make_checkpoint, make_store, reference_model
from polars.testing import assert_frame_equal
from safetensors.torch import load_file, save_file
from test_engine import CPU, LIMITS, PLENTY, ablation_masks, cache_of, ids, random_task

import lowmem_icl as icl
from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores
from lowmem_icl.engine.passes import GradientJob, PassSetup, score_heads, sweep, unit_gradients, unit_means
from lowmem_icl.engine.patch_jobs import PatchJob, RowTokens
from lowmem_icl.engine.patching import patch
from lowmem_icl.engine.schedule import Job
from lowmem_icl.engine.setup import Lost
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.engine.unit_means import MeanSums
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import stem_of
from lowmem_icl.session.failures import reason_of
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.packing import PackedTask, pack

LAYERS, HEADS = 3, 4
RARE = 7
"""A token that only some documents have."""
WITH_RARE = {2, 4}
PATHS_FROM_HERE = ("embedding", "head", "attention", "ffn", "norm")
DEMO = Path(__file__).parents[2] / "lowmem_icl" / "demo"


def damage(kind: str, decoder: Any) -> None:
    """Make weights large where nothing but a forward shows it."""
    layer = decoder.layers[1]
    width = layer.self_attn.v_proj.weight.shape[0] // HEADS
    if kind == "embedding":
        decoder.embed_tokens.weight[RARE] = 1e38
    elif kind == "head":
        layer.self_attn.v_proj.weight[2 * width : 3 * width] *= 1e38
    elif kind == "attention":
        layer.self_attn.out_proj.weight[:] = 1e30
    elif kind == "ffn":
        layer.fc2.weight[:] = 1e30
    elif kind == "norm":
        decoder.final_layer_norm.weight[:] = 3e38
    elif kind == "balanced":
        # Two heads alike, which write the same with other signs: only together they are finite.
        for name in ("q_proj", "k_proj", "v_proj"):
            for part in (getattr(layer.self_attn, name).weight, getattr(layer.self_attn, name).bias):
                part[width : 2 * width] = part[:width]
        layer.self_attn.out_proj.weight[:, : 2 * width] = 0
        layer.self_attn.out_proj.weight[:, 0] = 1e25
        layer.self_attn.out_proj.weight[:, width] = -1e25


def damaged_checkpoint(folder: Path, kind: str) -> Path:
    make_checkpoint(folder, tie_word_embeddings=False)
    model = reference_model(folder)
    with torch.no_grad():
        damage(kind, model.model.decoder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("damaged")
    kinds = ("nothing", *PATHS_FROM_HERE, "balanced")
    return {kind: damaged_checkpoint(folder / kind, kind) for kind in kinds}


@pytest.fixture(scope="module")
def stores(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Store]:
    folder, made = tmp_path_factory.mktemp("stores"), dict[tuple[str, str], Store]()

    def store(kind: str, weights: str = "float32") -> Store:
        if (kind, weights) not in made:
            made[kind, weights] = make_store(checkpoints[kind], folder / f"{kind}-{weights}", weights)
        return made[kind, weights]

    return store


def task_of(shared: int = 0) -> TaskRows:
    """Documents of which some have the rare token in their context, and none in their options."""
    task = random_task(4, 5, shared=shared)

    def without(text: str, other: str) -> str:
        return " ".join(other if token == str(RARE) else token for token in text.split())

    documents = []
    for document in task.documents:
        ends = f" {RARE} 11" if document.index in WITH_RARE else " 12 11"
        options = tuple((without(c, "9") + ends, without(o, "9")) for c, o in document.options)
        documents.append(replace(document, options=options))
    return replace(task, documents=tuple(documents))


def packed_of(shared: int = 0, *, gold_only: bool = False) -> PackedTask:
    # A row to a document, which is a row's length in longer ones.
    limits = replace(LIMITS, row_tokens=1)
    return pack(task_of(shared), ids, limits, gold_only=gold_only)


def swept(store: Store, task: PackedTask, masks: Sequence[Mask]) -> tuple[Scores, list[Lost]]:
    with StreamedModel(store, device=CPU, resident_bytes=1 << 30) as model, cache_of(PLENTY) as cache:
        setup = PassSetup(model, PLENTY, cache)
        (scores,) = sweep(setup, [Job(task.packed, tuple(masks))])
    return scores, setup.lost


def first_not_finite(model: Any, path: Sequence[int]) -> str | None:
    """The first part of Hugging Face's own model whose output no norm can take, by hooks on its forward."""
    met: list[str] = []

    def look(name: str, states: torch.Tensor) -> None:
        if not torch.isfinite((states.float() ** 2).sum(-1)).all():
            met.append(name)

    def look_at_heads(number: int, z: torch.Tensor) -> None:
        for head, part in enumerate(z.chunk(HEADS, -1)):
            look(f"layer {number}, head {head} (L{number}H{head})", part)

    decoder, handles = model.model.decoder, []
    handles.append(decoder.embed_tokens.register_forward_hook(lambda m, a, out: look("the embedding", out)))
    for number, layer in enumerate(decoder.layers):
        output = layer.self_attn.out_proj
        handles.append(
            output.register_forward_pre_hook(lambda m, a, number=number: look_at_heads(number, a[0]))
        )
        handles.append(
            output.register_forward_hook(
                lambda m, a, out, number=number: look(f"layer {number}, attention", out)
            )
        )
        ffn = f"layer {number}, FFN (L{number}F)"
        handles.append(layer.fc2.register_forward_hook(lambda m, a, out, ffn=ffn: look(ffn, out)))
    try:
        with torch.no_grad():
            logits = model(torch.tensor([list(path)])).logits
    finally:
        for handle in handles:
            handle.remove()
    if met:
        return met[0]
    return None if logits.log_softmax(-1).isfinite().all() else "the unembedding"


def expected_of(folder: Path, task: PackedTask) -> dict[int, str]:
    """The place of every document that has one, by a plain forward of each of its options."""
    model, found = reference_model(folder), dict[int, str]()
    ends = [*task.first_option[1:], len(task.options)]
    for number, (first, end) in enumerate(zip(task.first_option, ends, strict=True)):
        for option in task.options[int(first) : int(end)]:
            if (place := first_not_finite(model, option.path)) is not None:
                found.setdefault(number, place)
    return found


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        ("embedding", 40),
        ("head", 0),
        ("attention", 40),
        ("ffn", 0),
        ("norm", 0),
        *(pytest.param(kind, 40, marks=pytest.mark.slow) for kind in ("head", "ffn", "norm")),
    ],
)
def test_what_is_lost_is_what_plain_hooks_find(
    kind: str, shared: int, checkpoints: dict[str, Path], stores: Callable[..., Store]
) -> None:
    task = packed_of(shared)
    expected = expected_of(checkpoints[kind], task)
    assert expected
    scores, (lost,) = swept(stores(kind), task, [Mask(), Mask(frozenset([(2, 1)]))])
    assert lost.where == expected[min(expected)]
    assert lost.document == min(expected)
    counts = [len(document.options) for document in task.task.documents]
    owners = np.repeat(np.arange(len(counts)), counts)
    for under in scores.logprobs:
        assert set(owners[~np.isfinite(under)]) == set(expected)


@pytest.mark.parametrize(
    "weights",
    ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "bfloat16", "nf4"))],
)
def test_rows_beside_lost_ones_stay_bitwise_what_they_are(weights: str, stores: Callable[..., Store]) -> None:
    """Rows of one micro-batch, of which some hold the token that is not finite, under every mask."""
    task, masks = packed_of(), ablation_masks(LAYERS, HEADS)[::4]
    whole, nothing = swept(stores("nothing", weights), task, masks)
    beside, (lost,) = swept(stores("embedding", weights), task, masks)
    assert not nothing
    assert (lost.document, lost.where) == (2, "the embedding")
    is_lost = np.isnan(beside.logprobs)
    counts = [len(document.options) for document in task.task.documents]
    owners = np.repeat(np.arange(len(counts)), counts)
    assert set(owners[is_lost.all(0)]) == WITH_RARE == set(owners[is_lost.any(0)])
    np.testing.assert_array_equal(beside.logprobs[~is_lost], whole.logprobs[~is_lost])
    np.testing.assert_array_equal(beside.greedy[~is_lost], whole.greedy[~is_lost])


@pytest.mark.parametrize("shared", [40, pytest.param(0, marks=pytest.mark.slow)])
def test_a_removal_that_is_not_finite_is_named_by_its_unit(
    shared: int, checkpoints: dict[str, Path], stores: Callable[..., Store]
) -> None:
    task, masks = packed_of(shared), ablation_masks(LAYERS, HEADS)[:8]
    assert not expected_of(checkpoints["balanced"], task)
    scores, (lost,) = swept(stores("balanced"), task, masks)
    bad = [str(next(iter(mask.units()))) for mask, row in zip(masks, scores.logprobs, strict=True)
           if np.isnan(row).any()]  # fmt: skip
    assert bad == ["L1H0", "L1H1"]
    assert lost.mask == Unit("head", 1, 0).as_mask()
    assert lost.where == "layer 1, attention"
    assert "attention without layer 1, head 0 (L1H0) gives" in reason_of(lost, "document 5")


def test_gradients_means_heads_and_patches_name_theirs(stores: Callable[..., Store]) -> None:
    store = stores("embedding")
    task = packed_of(gold_only=True)
    rare, plain = ([5, 9, RARE, 12, 13, 14, 15], [5, 9, 8, 12, 13, 14, 15])
    with StreamedModel(store, device=CPU, resident_bytes=1 << 30) as model, cache_of(PLENTY) as cache:
        setup = PassSetup(model, PLENTY, cache)
        gradients = UnitGradients.empty(len(task.task.documents), len(task.options), LAYERS, HEADS)
        unit_gradients(setup, [GradientJob(task.packed.rows, lambda logprobs: logprobs < 0)], [gradients])
        sums = MeanSums.empty(len(task.packed.rows), LAYERS, 32, 32)
        unit_means(setup, [task.packed], [sums])
        rows = [tuple(stem_of(tokens * 4) for tokens in (plain, rare))] * 2
        questions = HeadQuestions(rows[0], rows[1], (7, 7))
        score_heads(setup, questions, HeadScores.empty(2, LAYERS, HEADS))
        rows_of_tokens = [RowTokens(row, np.array([0])) for row in task.packed.rows]
        changes = (Mask(), Mask(frozenset([(1, 1)])))
        jobs = [PatchJob(into, changes, rows_of_tokens[0]) for into in rows_of_tokens]
        scores = [Scores.empty(2, task.packed.option_count) for job in jobs]
        patch(setup, jobs, scores)
    gradient, mean, head, *patches = setup.lost
    for lost in (gradient, mean):
        assert (lost.document, lost.where) == (2, "the embedding")
    assert (head.document, head.where) == (1, "the embedding")
    holding = [i for i, row in enumerate(task.packed.rows) if WITH_RARE & set(row.owners.tolist())]
    assert [lost.job for lost in patches] == holding
    for index, score in enumerate(scores):
        assert np.isnan(score.logprobs[score.scored]).all() == (index in holding)


def test_gradients_that_overflow_on_the_way_back_name_their_unit(stores: Callable[..., Store]) -> None:
    task, store = packed_of(gold_only=True), stores("nothing")
    with StreamedModel(store, device=CPU, resident_bytes=1 << 30) as model, cache_of(PLENTY) as cache:
        setup = PassSetup(model, PLENTY, cache)
        gradients = UnitGradients.empty(len(task.task.documents), len(task.options), LAYERS, HEADS)
        gradients.finished[:] = True
        gradients.ffn_signed[2, 1] = gradients.head_absolute[2, 0] = np.inf
        unit_gradients(setup, [GradientJob(task.packed.rows, lambda logprobs: logprobs < 0)], [gradients])
    assert [(lost.document, lost.where) for lost in setup.lost] == [
        (2, "layer 1, FFN (L1F), on the way back")
    ]


RUN = ("--tasks", "recall,knowledge", "--shots", "4", "--limit", "6", "--train-limit", "2", "--quiet",
       "--experiments", "evaluate,ablate", "--labels", "right", "--weights", "float32")  # fmt: skip


def demo_with(folder: Path, word: str | None) -> Path:
    """The demo's checkpoint with its tables apart and, if asked for, a word of far too large an embedding."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    config = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(DEMO / "model.safetensors")
    embedding = tensors["model.decoder.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    if word is not None:
        vocabulary = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
        embedding[vocabulary[word]] = 1e38
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_run_goes_on_without_what_fails_and_says_so_everywhere(tmp_path: Path) -> None:
    def run(word: str | None, out: Path) -> Any:
        model = tmp_path / f"model-{word}"
        model = model if model.exists() else demo_with(model, word)
        return invoke("run", "--model", model, *RUN, "--store-dir", tmp_path / "stores", "--out", out)

    whole = run(None, tmp_path / "whole")
    assert whole.exit_code == 0
    # In a demonstration of one evaluation document.
    failed = run("sleet", tmp_path / "failed")
    assert failed.exit_code == 4
    said = "evaluate: knowledge at 4 shots: document 92: the embedding gives values that are not finite"
    for shown in (failed.stderr, invoke("status", tmp_path / "failed").stdout):
        assert f"failed: {said}" in " ".join(shown.split())
    assert f"Failed: {said}" in (tmp_path / "failed" / "report.html").read_text()
    record = json.loads((tmp_path / "failed" / "run.json").read_text())
    assert record["state"] == "finished"
    (failure,) = record["failures"]
    assert (failure["stage"], failure["task"], failure["shots"]) == ("evaluate", "knowledge", 4)

    of_models = {"model", "mask_model"}
    results = {
        name: pl.read_parquet(tmp_path / name / "results.parquet").drop(of_models, strict=False)
        for name in ("whole", "failed")
    }
    is_mean = pl.col("task") == "aggregate"
    of_failed = (
        (pl.col("task") == "knowledge") & (pl.col("shots") == 4) & (pl.col("experiment") == "evaluate")
    )
    expected = results["whole"].filter(~of_failed & ~is_mean)
    # Threads may share float32's products otherwise from run to run.
    assert_frame_equal(results["failed"].filter(~is_mean), expected, rel_tol=1e-4, abs_tol=1e-6)

    sentences = icl.load(tmp_path / "failed").failures
    assert [sentence.split(" gives")[0] for sentence in sentences] == [said.split(" gives")[0]]
    with icl.open_model(str(tmp_path / "model-sleet"), store_dir=tmp_path / "stores") as model:
        task = icl.load_task("knowledge", shots=4, limit=6)
        for ask in (icl.score, icl.ablate):
            with pytest.raises(icl.NotFinite, match="document 92: the embedding gives"):
                ask(model, task, progress=False)

    before = pl.read_parquet(tmp_path / "failed" / "results.parquet")
    again = run("sleet", tmp_path / "failed")
    assert again.exit_code == 4, "what failed is tried again"
    record = json.loads((tmp_path / "failed" / "run.json").read_text())
    assert record["parts"]["made"] == 1, "and nothing else"
    assert pl.read_parquet(tmp_path / "failed" / "results.parquet").equals(before)


@pytest.mark.slow
def test_where_every_setting_fails_the_run_ends_and_lists_them(tmp_path: Path) -> None:
    model = demo_with(tmp_path / "model", None)
    tensors = load_file(model / "model.safetensors")
    tensors["model.decoder.layers.1.fc2.weight"][:] = 1e30
    save_file(tensors, model / "model.safetensors")
    out = tmp_path / "run"
    ended = invoke(
        "run", "--model", model, "--tasks", "recall", "--shots", "0,4", "--limit", "4", "--train-limit", "4",
        "--experiments", "evaluate,importance,ablate,prune,patch,overlap", "--ablation", "mean",
        "--store-dir", tmp_path / "stores", "--out", out, "--quiet",
    )  # fmt: skip
    assert ended.exit_code == 4, ended.output
    failures = json.loads((out / "run.json").read_text())["failures"]
    assert {failure["stage"] for failure in failures} == {
        "evaluate",
        "importance",
        "ablate",
        "prune",
        "patch",
    }
    of_settings = [failure for failure in failures if failure["stage"] == "evaluate"]
    assert [failure["shots"] for failure in of_settings] == [0, 4]
    assert all("layer 1, FFN (L1F)" in failure["sentence"] for failure in of_settings)
    for path in (out / "parts").glob("*.npz"):
        with np.load(path) as stored:
            assert not any(np.isnan(stored[name]).any() for name in stored.files if "logprobs" in name)
