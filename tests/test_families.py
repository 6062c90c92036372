"""One suite for every family: the engine against plain hooks on Hugging Face's own model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import family_oracles as oracles
import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from conftest import make_store
from family_models import CASES, CONTEXT, HEADS, LAYERS, FamilyCase
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_engine import CPU, PLENTY, ablation_masks, cache_of, packed_task, swept
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores
from lowmem_icl.engine.passes import GradientJob, PassSetup, score_heads, sweep, unit_gradients
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.errors import InputError
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.families.catalogue import FAMILIES
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store, open_store, verify_store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import stem_of
from lowmem_icl.tasks.random_sequences import Drawable, random_sequences

SEQUENCES = random_sequences(Drawable(np.arange(4, 300), "ids"), 2, 50, seed=1, count=1)
TIGHT = SweepLimits(60_000, 60_000, 1 << 24, 64)


@dataclass(frozen=True)
class Made:
    """A family's small model: as a checkpoint, as stores, and as Hugging Face's own."""

    case: FamilyCase
    folder: Path

    @cached_property
    def model(self) -> Any:
        return self.case.reloaded(self.folder / "checkpoint")

    @cached_property
    def store(self) -> Store:
        return make_store(self.folder / "checkpoint", self.folder / "float32", "float32")

    @cached_property
    def int8_store(self) -> Store:
        return make_store(self.folder / "checkpoint", self.folder / "int8", "int8")

    @cached_property
    def nf4_store(self) -> Store:
        return make_store(self.folder / "checkpoint", self.folder / "nf4", "nf4")

    def of_nf4(self) -> Any:
        """Hugging Face's own model in float32, its layers' linears being those of the NF4 store."""
        model, skeleton = self.case.reloaded(self.folder / "checkpoint"), self.store.skeleton
        for layer, path in zip(
            model.get_submodule(skeleton.blocks_name), self.nf4_store.layer_paths, strict=True
        ):
            tensors = load_file(path)
            for linear, shape in skeleton.linear_shapes.items():
                name = f"{linear}.weight"
                parts = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
                parts.pop(f"{name}.nested_offset")
                state = QuantState.from_dict(parts, CPU)
                state.shape = torch.Size([shape[0] * shape[1]])
                values = dequantize_4bit(tensors[name], state).view(shape)
                transposed = name in skeleton.transposed_weights
                layer.get_parameter(name).data = values.t().contiguous() if transposed else values
        return model


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("family")
    case.save(folder / "checkpoint")
    return Made(case, folder)


def test_every_family_has_a_case() -> None:
    assert {case.model_type for case in CASES.values()} == set(FAMILIES)


def test_cases_are_uneven() -> None:
    assert HEADS & (HEADS - 1), "no power of two"
    skeletons = {name: Skeleton(case.make().config) for name, case in CASES.items()}
    assert any(skeleton.attention_width != skeleton.width for skeleton in skeletons.values())
    kinds = {name: len(set(skeleton.kind_of_layer)) for name, skeleton in skeletons.items()}
    assert {name for name, count in kinds.items() if count > 1} == {
        "qwen2", "smollm3", "gemma2", "gemma3_text", "gemma3_text linear",
    }  # fmt: skip


def test_a_store_is_read_back_as_it_was_written(made: Made) -> None:
    for store in (made.store, made.int8_store, made.nf4_store):
        verify_store(open_store(store.folder))
        assert store.manifest.source.digest == made.store.manifest.source.digest


@pytest.mark.parametrize("shared", [0, 40], ids=["own prompts", "shared demonstrations"])
def test_every_unit_removed_equals_one_hooked_row_a_unit(made: Made, shared: int) -> None:
    """Trees of options and stems against single rows; the clean run among them."""
    task, masks = packed_task(2, shared=shared), ablation_masks(LAYERS, HEADS)
    assert len({row.stem for row in task.packed.rows}) == (2 if shared else 1)
    (scores,) = swept(made.store, [Job(task.packed, masks)])
    clean = oracles.option_logprobs(made.case, made.model, task.options, Mask())
    np.testing.assert_allclose(scores.logprobs[0], clean, atol=1e-4)
    expected = oracles.option_logprobs_by_mask(made.case, made.model, task.options, masks)
    np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4)
    assert (np.abs(scores.logprobs[1:] - scores.logprobs[0]).max(1) > 1e-3).all(), "every unit matters"


def gradients_of(store: Store, task: Any, chosen: NDArray[np.bool_]) -> UnitGradients:
    result = UnitGradients.empty(len(task.task.documents), task.packed.option_count, LAYERS, HEADS)
    with StreamedModel(store, device=CPU, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        job = GradientJob(task.packed.rows, lambda logprobs: chosen)
        unit_gradients(PassSetup(model, PLENTY, cache), [job], [result])
    return result


def test_gradients_equal_the_whole_graph(made: Made) -> None:
    task = packed_task(4, gold_only=True)
    chosen = np.array([gold for document in task.task.documents for gold in document.gold])
    result = gradients_of(made.store, task, chosen)
    for owner, document in enumerate(task.task.documents):
        option = task.options[int(task.first_option[owner]) + document.gold.index(True)]
        expected = oracles.unit_gradients(made.case, made.model, option)
        names = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed")
        for name, values in zip(names, expected, strict=True):
            largest = np.abs(values).max()
            np.testing.assert_allclose(getattr(result, name)[owner], values, atol=1e-4 * largest)


def head_scores(store: Store) -> HeadScores:
    rows = [
        tuple(stem_of(tokens.tolist()) for tokens in kind)
        for kind in (SEQUENCES.repeated, SEQUENCES.unrepeated)
    ]
    asked = HeadQuestions(rows[0], rows[1], SEQUENCES.base_tokens)
    scores = HeadScores.empty(1, LAYERS, HEADS)
    with StreamedModel(store, device=CPU, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        score_heads(PassSetup(model, PLENTY, cache), asked, scores)
    return scores


def written_by_heads(case: FamilyCase, model: Any, tokens: Tensor, layer: int) -> Tensor:
    """What each head puts into the residual, [H, T, D], up to the positive divisor of a norm after it."""
    kept: list[Tensor] = []
    output: Any = case.module(model, layer, case.output)
    handle = output.register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0]))
    with torch.no_grad():
        model(tokens[None])
    handle.remove()
    parts = oracles.slices(written_weight(case, model, layer))
    return torch.stack([z @ part.t() for z, part in zip(oracles.slices(kept[0][0]), parts, strict=True)])


def written_weight(case: FamilyCase, model: Any, layer: int) -> Tensor:
    """The output projection [D, Z] of an attention, times the scale of a norm after it."""
    output: Any = case.module(model, layer, case.output)
    weight = (output.weight.t() if isinstance(output, Conv1D) else output.weight).detach()
    if not case.written_ffn:
        return weight
    norm: Any = case.module(model, layer, "post_attention_layernorm")
    scale = norm.weight + 1 if case.model_type.startswith("gemma") else norm.weight
    return weight * scale.detach()[:, None]


def test_prefix_matching_and_copying_equal_the_models_own_attention(made: Made) -> None:
    if made.case.attention != "eager":
        pytest.skip("transformers gives no attention here; BLOOM has the same biases")
    scores = head_scores(made.store)
    repeated, unrepeated = (torch.from_numpy(kind[0]) for kind in (SEQUENCES.repeated, SEQUENCES.unrepeated))
    for layer, pattern in enumerate(oracles.attention_patterns(made.model, repeated)):
        expected = oracles.prefix_matching(pattern, SEQUENCES.base_tokens[0])
        np.testing.assert_allclose(scores.prefix_matching[0, layer], expected, atol=1e-5)
        written = written_by_heads(made.case, made.model, unrepeated, layer)
        with torch.no_grad():
            copied = oracles.copying(made.case, made.model, unrepeated, layer, written)
        np.testing.assert_allclose(scores.copying[0, layer], copied, atol=2e-4)


def test_eigenvalues_are_those_of_each_heads_circuit(made: Made) -> None:
    """U W_O W_V Eᵀ, vocabulary by vocabulary: values from what the model's own layer makes of basis vectors,
    embeddings from what reaches its first layer.
    """
    ours, skeleton = head_scores(made.store).copying_eigenvalues, made.store.skeleton
    unembedding = made.model.get_output_embeddings().weight.detach().double()
    embedding = put_in(made)
    for number in range(LAYERS):
        values = values_of_basis(made, number, skeleton.width).unflatten(0, (-1, skeleton.head_width))
        by_head = values.repeat_interleave(HEADS // len(values), 0).double()
        for head, leaving in enumerate(oracles.slices(written_weight(made.case, made.model, number))):
            circuit = unembedding @ leaving.double() @ by_head[head] @ embedding.t()
            eigenvalues = np.linalg.eigvals(circuit.numpy())
            expected = eigenvalues.real.sum() / np.abs(eigenvalues).sum()
            np.testing.assert_allclose(ours[number, head], expected, atol=1e-4)


def put_in(made: Made) -> Tensor:
    """What each word alone puts into the residual without its position, [V, D]."""
    vocabulary = made.store.skeleton.vocabulary
    embedding = made.model.get_input_embeddings()(torch.arange(vocabulary)).detach()
    if made.case.model_type == "bloom":
        embedding = made.model.transformer.word_embeddings_layernorm(embedding).detach()
    if made.case.model_type == "granite":
        embedding = embedding * made.case.config["embedding_multiplier"]
    return embedding.double()


def values_of_basis(made: Made, number: int, width: int) -> Tensor:
    """The values [G · d, D] that a layer's attention makes of the D basis vectors, biases taken off."""
    family = FAMILIES[made.case.model_type]
    attention: Any = made.case.module(made.model, number, made.case.output.rpartition(".")[0])
    linear: Any = made.case.module(made.model, number, family.attention_inputs[-1])
    vectors = torch.cat([torch.zeros(1, width), torch.eye(width)])
    with torch.no_grad():
        projected = linear(vectors[None])
    values = projected[0] if family.fused is None else _split(attention, projected)[0].flatten(1)
    return (values[1:] - values[0]).t()


def _split(attention: Any, projected: Tensor) -> Tensor:
    """The values [1, T, G, d] as the module itself takes them from its fused projection [1, T, N]."""
    kind = type(attention).__name__
    width = projected.shape[-1]
    by_kind: dict[str, Callable[[], Tensor]] = {
        "GPT2Attention": lambda: projected[..., 2 * width // 3 :].unflatten(-1, (HEADS, -1)),
        "GPTNeoXAttention": lambda: projected.unflatten(-1, (HEADS, -1)).chunk(3, -1)[2],
        "Phi3Attention": lambda: projected[..., width - 2 * attention.head_dim :].unflatten(-1, (2, -1)),
        "BloomAttention": lambda: attention._reshape(projected)[2].transpose(1, 2),
        "FalconAttention": lambda: attention._split_heads(projected)[2],
    }
    return by_kind[kind]()


def test_nf4_is_the_model_with_dequantised_weights(made: Made) -> None:
    """Scores, clean and with units removed, and the gradient of every unit."""
    model, masks = made.of_nf4(), (Mask(), *ablation_masks(LAYERS, HEADS)[:3])
    task = packed_task(2)
    (scores,) = swept(made.nf4_store, [Job(task.packed, masks)])
    expected = oracles.option_logprobs_by_mask(made.case, model, task.options, masks)
    np.testing.assert_allclose(scores.logprobs, expected, rtol=1e-5, atol=1e-4)
    task = packed_task(4, gold_only=True)
    chosen = np.array([gold for document in task.task.documents for gold in document.gold])
    result = gradients_of(made.nf4_store, task, chosen)
    option = task.options[int(task.first_option[0]) + task.task.documents[0].gold.index(True)]
    names = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed")
    for name, values in zip(names, oracles.unit_gradients(made.case, model, option), strict=True):
        np.testing.assert_allclose(getattr(result, name)[0], values, atol=1e-4 * np.abs(values).max())


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_rounded_weights_are_bitwise_the_same_for_any_memory(made: Made, weights: str) -> None:
    """Layers streamed or kept, waves, micro-batches, and the vocabulary in memory or on disk."""
    store = made.int8_store if weights == "int8" else made.nf4_store
    job = Job(
        packed_task(3, shared=40).packed, (*ablation_masks(LAYERS, HEADS)[:4], Mask(ffns=frozenset([2])))
    )
    (plenty,) = swept(store, [job])
    spill = made.folder / f"spill-{weights}"
    with (
        StreamedModel(store, device=CPU, resident_bytes=0, tables_in_memory=False) as model,
        cache_of(TIGHT, spill) as cache,
    ):
        (tight,) = sweep(PassSetup(model, TIGHT, cache), [job])
    np.testing.assert_array_equal(plenty.logprobs, tight.logprobs)
    np.testing.assert_array_equal(plenty.greedy, tight.greedy)


def test_int8_is_near_float(made: Made) -> None:
    job = Job(packed_task(3).packed, (Mask(),))
    (rounded,), (exact,) = swept(made.int8_store, [job]), swept(made.store, [job])
    spread = exact.logprobs.std()
    assert np.abs(rounded.logprobs - exact.logprobs).mean() < 0.2 * spread


def test_positions_are_depths_whatever_the_row_is_packed_with(made: Made) -> None:
    """Alone, each option is one plain row; packed, it is a branch somewhere in a tree of many documents."""
    task = packed_task(5)
    (together,) = swept(made.store, [Job(task.packed, (Mask(),))])
    longest = max(len(row) for row in task.packed.rows)
    deepest = max(int(row.positions.max()) for row in task.packed.rows)
    assert deepest + 1 < longest <= CONTEXT * 2, "places in rows and depths differ"
    expected = oracles.option_logprobs(made.case, made.model, task.options, Mask())
    np.testing.assert_allclose(together.logprobs[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "routing"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "routing"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "mamba", "state_size": 16}, "state-space"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "text model"),
    ],
)
def test_what_other_architectures_lack_is_named(config: dict[str, Any], missing: str) -> None:
    with pytest.raises(InputError, match=missing) as refused:
        Skeleton.from_dict(config)
    assert config["model_type"] in str(refused.value)
    assert "gemma3_text, gpt2" in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
    ],
)
def test_fields_that_change_attention_in_other_ways_are_refused(
    model_type: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        Skeleton.from_dict({"model_type": model_type, **CASES[model_type].config, **changes})


def test_angles_that_depend_on_length_end_where_the_model_was_trained() -> None:
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    config = CASES["llama"].config | {"max_position_embeddings": CONTEXT}
    scaled |= {"original_max_position_embeddings": 24}
    assert Skeleton.from_dict({"model_type": "llama", **config, "rope_scaling": scaled}).context_tokens == 24


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 5}, {"hidden_size": "x"}, {"quantization_config": {"quant_method": "fp8"}}],
)
def test_configs_that_make_no_model_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        Skeleton.from_dict({"model_type": "llama", **CASES["qwen2"].config, **changes})
