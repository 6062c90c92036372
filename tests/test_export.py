"""Masks outside the engine: on plain models, as checkpoints, smaller ones among them, for every family."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from family_models import CASES, HEADS, LAYERS, FamilyCase
from mask_equalities import (
    ALL,
    MASKS,
    WAYS,
    Comparison,
    heads_of,
    is_same_in,
    plain_logprobs,
    ways_here,
)
from safetensors import safe_open
from test_store import as_pickle
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.export import folder as export_module
from lowmem_icl.export.applied import applied
from lowmem_icl.export.folder import export_folder, open_source
from lowmem_icl.masks.files import MaskFile, MaskModel, fill_of_table, read_mask
from lowmem_icl.masks.mask import Mask, resampling
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.families.catalogue import FAMILIES
from lowmem_icl.model.skeleton import Skeleton

TOKENS = torch.arange(4, 24)[None]
# Whose attention and FFN can be one layer's with another's between them gone.
PARALLEL = {"gpt_neox", "gptj", "falcon", "falcon 40b"}
FEWER_HEADS = {
    "llama", "llama 3", "mistral", "qwen2", "qwen2 windows off", "qwen3", "smollm3", "granite", "gemma",
    "gemma2", "gemma3_text", "gemma3_text linear", "phi3", "phi3 partial",
}  # fmt: skip
MEANS_IN_BIASES = {"opt", "gpt2", "gpt_neox", "gpt_neox serial", "falcon rw", "bloom"}


@pytest.fixture(scope="module", params=CASES)
def comparison(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(CASES[request.param], tmp_path_factory.mktemp("export"))


# One of every kind; the equalities are of all.
@pytest.fixture(scope="module", params=["opt", "gptj", "llama", "gemma2", "falcon rw"])
def one_of_each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(CASES[request.param], tmp_path_factory.mktemp("export"))


def name_of(comparison: Comparison) -> str:
    return next(name for name, case in CASES.items() if case is comparison.case)


def test_the_masks_matter(comparison: Comparison) -> None:
    clean = plain_logprobs(comparison.model, comparison.task.options)
    for scores in comparison.by_engine.values():
        assert np.abs(scores - clean).max() > 1e-2


# All by all is the table that mask_equalities prints, and the slow test below.
COMPARED = {"hf": ("scattered",), "hf, means": ("layer",), "structural": ("layer", "across")}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_apply_a_mask_equals_the_engine(comparison: Comparison, way: str) -> None:
    largest = comparison.largest(way, COMPARED.get(way, tuple(MASKS)))
    if way == "hf, means" and name_of(comparison) not in MEANS_IN_BIASES:
        assert largest is None
        with pytest.raises(InputError, match="has none of here; use the mask on the model as it is"):
            comparison.difference(way, "layer")
    else:
        assert largest is not None
        assert largest < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ways_here())
def test_every_cell_of_the_table(comparison: Comparison, way: str) -> None:
    name = name_of(comparison)
    if not is_same_in(comparison, way):
        assert name in ("falcon 40b", "falcon rw"), "what TransformerLens has otherwise"
        return
    for mask in MASKS:
        refused = (
            (way == "hf, means" and name not in MEANS_IN_BIASES)
            or (way == "structural" and (mask == "scattered" or (mask == "across" and name in PARALLEL)))
            or (way == "transformerlens, means" and name == "granite")
        )
        if refused:
            with pytest.raises(InputError):
                comparison.difference(way, mask)
        else:
            assert comparison.difference(way, mask) < 1e-4


def test_a_mask_taken_off_leaves_the_model_as_it_was(one_of_each: Comparison) -> None:
    model, mask_file = one_of_each.model, one_of_each.mask_file("scattered")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        clean = model(TOKENS).logits
        on = applied(mask_file.mask, model, made_on=mask_file.model)
        assert on.is_on
        masked = model(TOKENS).logits
        with applied(Mask(ffns=frozenset({2})), model):
            both = model(TOKENS).logits
        np.testing.assert_array_equal(model(TOKENS).logits, masked)
        on.remove()
        on.remove()
        assert not on.is_on
        np.testing.assert_array_equal(model(TOKENS).logits, clean)
    assert not torch.equal(masked, clean)
    assert not torch.equal(masked, both)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_is_gone_is_gone(comparison: Comparison) -> None:
    """Of a whole layer its parameters; where heads can go, those of half the heads of the others too."""
    name, made = name_of(comparison), comparison.exported("layer", structural=True)
    model = comparison.case.reloaded(made.folder)
    assert made.after.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert made.before.parameters == sum(parameter.numel() for parameter in comparison.model.parameters())
    assert made.after.size_bytes == 4 * made.after.parameters
    assert made.before.size_bytes == 4 * made.before.parameters
    assert made.before.layers == LAYERS
    # The bias of its attention stays in Llama 3's form of biases, and FFNs have none to add it to.
    assert made.after.layers == (LAYERS if name == "llama 3" else LAYERS - 1)
    assert made.after.heads == (HEADS // 2 if name in FEWER_HEADS else HEADS)
    assert made.zeroed_heads == made.after.layers * made.after.heads - HEADS


def test_an_attention_and_the_next_ffn_make_a_layer_where_they_are_not_parallel(
    comparison: Comparison,
) -> None:
    if name_of(comparison) in PARALLEL:
        with pytest.raises(InputError, match="no layer is without all its heads and its FFN"):
            comparison.exported("across", structural=True)
    else:
        assert comparison.exported("across", structural=True).after.layers == LAYERS - 1


def test_where_nothing_can_go_it_is_said_why(one_of_each: Comparison) -> None:
    with pytest.raises(InputError, match="nothing can go") as refused:
        one_of_each.exported("scattered", structural=True)
    why = "every layer needs as many heads as it has"
    if not FAMILIES[one_of_each.case.model_type].free_head_width:
        why = "ties the heads' width to their number"
    assert why in str(refused.value)


def test_what_refuses_fewer_heads_is_said(tmp_path: Path) -> None:
    """Phi-3 counts its long factors by the model's width over the number of heads, whatever their width."""
    phi3 = Comparison(CASES["phi3 longrope"], tmp_path)
    half = Mask(heads_of(l0=(3, 4, 5), l1=(3, 4, 5), l2=(3, 4, 5)))
    mask_file = replace(phi3.mask_file("layer"), mask=half)
    with pytest.raises(InputError, match=r"with fewer heads it would be no model .*short_factor"):
        export_folder(mask_file, open_checkpoint(phi3.checkpoint), tmp_path / "small", structural=True)


def test_families_say_where_layers_are(comparison: Comparison) -> None:
    family, skeleton = FAMILIES[comparison.case.model_type], comparison.store.skeleton
    assert family.blocks == skeleton.blocks_name
    shapes = skeleton.layer_parameters()
    assert family.ffn_parts
    assert all(any(name.startswith(f"{part}.") for name in shapes) for part in family.ffn_parts) or (
        name_of(comparison) in PARALLEL
    )
    without_head = AutoModel.from_pretrained(comparison.checkpoint, dtype=torch.float32).eval()
    mask = MASKS["scattered"]
    with torch.no_grad(), applied(mask, without_head), applied(mask, comparison.model):
        found = without_head(TOKENS).last_hidden_state
        expected = comparison.model(TOKENS, output_hidden_states=True).hidden_states[-1]
    if comparison.case.attention == "eager":
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(CASES["opt"], tmp_path_factory.mktemp("opt"))


def on(comparison: Comparison, mask: Mask, **changes: Any) -> Callable[[], object]:
    made_on = comparison.model_facts.model_copy(update=changes)
    return lambda: applied(mask, comparison.model, made_on=made_on)


def test_masks_of_other_models_are_refused(opt: Comparison) -> None:
    mask = MASKS["scattered"]
    for changes, message in (
        ({"layers": 4}, "made for opt of 4 layers with 6 heads, this model is opt of 3 layers with 6 heads"),
        ({"heads": 8}, "made for opt of 3 layers with 8 heads"),
        ({"model_type": "gpt2"}, "made for gpt2 of 3 layers"),
    ):
        with pytest.raises(InputError, match=message):
            on(opt, mask, **changes)()
    for outside, unit in ((Mask(heads_of(l0=(6,))), "L0H6"), (Mask(ffns=frozenset({3})), "L3F")):
        with pytest.raises(InputError, match=f"removes {unit}, this model is opt of 3 layers with 6 heads"):
            on(opt, outside)()
    with pytest.raises(InputError, match="needs these documents"):
        on(opt, mask.filled(resampling(1)))()
    assert not any(module._forward_pre_hooks for module in opt.model.modules())


def test_tables_of_means_must_be_the_masks_own(opt: Comparison) -> None:
    mask, means = MASKS["scattered"], opt.means
    other = UnitMeans(means.heads + 1, means.ffns)
    narrow = UnitMeans(means.heads[:, :-6], means.ffns)
    cases = (
        (mask, means, "got a table with ablation zero"),
        (mask.filled("mean:x"), None, "got none with ablation mean"),
        (mask.filled(fill_of_table(means)), other, "the table's digest is"),
        (mask.filled("mean:x"), narrow, "heads have 30 numbers per layer, this model 36"),
        (Mask(ffns=frozenset({1}), fill="mean:x"), UnitMeans(means.heads, means.ffns[:, :4]), "ffns have 4"),
    )
    for given, table, message in cases:
        with pytest.raises(InputError, match=message):
            applied(given, opt.model, table)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in opt.model.modules())


def test_other_architectures_and_what_is_no_model_are_refused() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=20, hidden_size=8, num_hidden_layers=1)
    with pytest.raises(InputError, match="model type 'mamba' is not supported"):
        applied(Mask(), AutoModelForCausalLM.from_config(config))
    with pytest.raises(InputError, match="expected a transformers model"):
        applied(Mask(), torch.nn.Linear(2, 2))


def mask_for(folder: Path, mask: Mask) -> MaskFile:
    skeleton = Skeleton.from_dict(json.loads((folder / "config.json").read_text()))
    model_type, (layers, heads) = skeleton.config.model_type, (skeleton.layers, skeleton.heads)
    facts = MaskModel(id="made", model_type=model_type, layers=layers, heads=heads, digest="d")
    return MaskFile("made", mask, facts, {"method": "made"})


def logits(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("changes", [{"do_layer_norm_before": False, "word_embed_proj_dim": 16}, {}])
def test_opt_of_both_kinds(tmp_path: Path, changes: dict[str, Any]) -> None:
    """OPT-350M's layers norm the sum, so none can go; else the lost layer's bias goes on below."""
    source = make_checkpoint(tmp_path / "source", **changes)
    mask = Mask(heads_of(l0=(1,), l1=(0, 1, 2, 3), l2=(0, 1, 2, 3)), frozenset({1, 2}))
    mask_file = mask_for(source, mask)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad(), applied(mask, model, made_on=mask_file.model):
        expected = model(TOKENS).logits
    made = export_folder(mask_file, open_checkpoint(source), tmp_path / "zeros")
    np.testing.assert_allclose(logits(made.folder), expected, atol=1e-5)
    if changes:
        with pytest.raises(InputError, match="the norms stand behind the sums"):
            export_folder(mask_file, open_checkpoint(source), tmp_path / "small", structural=True)
        assert not (tmp_path / "small").exists()
    else:
        small = export_folder(mask_file, open_checkpoint(source), tmp_path / "small", structural=True)
        assert small.after.layers == 1
        np.testing.assert_allclose(logits(small.folder), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["opt", "llama", "llama 3", "gpt_neox", "gemma2", "bloom"])
def test_a_model_without_any_unit_keeps_one_layer_that_does_nothing(name: str, tmp_path: Path) -> None:
    """The first layer's biases have nothing before them to be added to."""
    case: FamilyCase = CASES[name]
    source = case.save(tmp_path / "source")
    mask = Mask(heads_of(l0=tuple(ALL), l1=tuple(ALL), l2=tuple(ALL)), frozenset(range(LAYERS)))
    model = case.reloaded(source)
    with torch.no_grad(), applied(mask, model):
        expected = model(TOKENS).logits
    made = export_folder(mask_for(source, mask), open_checkpoint(source), tmp_path / "small", structural=True)
    assert made.after.layers == 1
    with torch.no_grad():
        np.testing.assert_allclose(case.reloaded(made.folder)(TOKENS).logits, expected, atol=1e-5)


def test_a_checkpoint_keeps_its_precision_its_files_and_what_is_not_cut(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    mask_file = mask_for(source, Mask(heads_of(l1=(2,))))
    made = export_folder(mask_file, open_checkpoint(source), tmp_path / "out")
    names = {path.name for path in made.folder.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "mask.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert read_mask(made.folder / "mask.json").mask == mask_file.mask
    with (
        safe_open(source / "model.safetensors", "pt") as before,
        safe_open(made.folder / "model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        changed = [
            name
            for name in before.keys()  # noqa: SIM118
            if not torch.equal(before.get_tensor(name), after.get_tensor(name))
        ]
        (name,) = changed
        expected = before.get_tensor(name).clone()
        expected[:, 16:24] = 0
        assert torch.equal(after.get_tensor(name), expected)
        assert expected.dtype == torch.bfloat16
    with pytest.raises(InputError, match="exists; choose another folder"):
        export_folder(mask_file, open_checkpoint(source), made.folder)


@pytest.mark.parametrize("structural", [False, True])
def test_pickles_and_older_names_are_read(structural: bool, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    expected = tmp_path / "expected"
    mask_file = mask_for(source, Mask(heads_of(l1=(0, 1, 2, 3), l2=(1,)), frozenset({1})))
    export_folder(mask_file, open_checkpoint(source), expected, structural=structural)
    as_pickle(source, "")
    assert not (source / "model.safetensors").exists()
    made = export_folder(mask_file, open_checkpoint(source), tmp_path / "out", structural=structural)
    np.testing.assert_array_equal(logits(made.folder), logits(expected))


def test_other_weights_of_the_same_shape_are_said(comparison: Comparison, tmp_path: Path) -> None:
    """The digest is that of a store of the same source, whatever was read of it for the new model."""
    own = comparison.mask_file("layer")
    own = replace(own, model=own.model.model_copy(update={"digest": comparison.store.manifest.source.digest}))
    made = export_folder(own, open_checkpoint(comparison.checkpoint), tmp_path / "own", structural=True)
    assert made.notes == ()
    (said,) = comparison.exported("layer", structural=True).notes
    assert said == "mask layer was made on other weights (small) of the same shape"


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "source")
    monkeypatch.setattr(export_module, "free_bytes", lambda folder: 1000)
    with pytest.raises(DoesNotFit, match="choose a folder on another disk"):
        export_folder(mask_for(source, Mask()), open_checkpoint(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_many_files_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    source = make_checkpoint(tmp_path / "source")
    mask_file = mask_for(source, Mask(ffns=frozenset({1})))
    made = export_folder(mask_file, open_checkpoint(source), tmp_path / "out")
    shards = sorted(path.name for path in made.folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 2
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad(), applied(mask_file.mask, model):
        np.testing.assert_allclose(logits(made.folder), model(TOKENS).logits, atol=1e-6)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, opt: Comparison) -> None:
    source = make_checkpoint(tmp_path / "source")
    mask_file = mask_for(source, Mask(ffns=frozenset({1})))
    other = replace(mask_file, model=mask_file.model.model_copy(update={"heads": 6}))
    with pytest.raises(InputError, match="made for opt of 3 layers with 6 heads, this model is opt of 3"):
        export_folder(other, open_checkpoint(source), tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"ffn_dim": 32}))
    with pytest.raises(InputError, match="weights do not belong together"):
        export_folder(mask_file, open_checkpoint(source), tmp_path / "out")
    with pytest.raises(InputError, match="expected a mask of ablation zero, got mean"):
        opt.exported("layer", structural=True, means=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_do_not_come_from_a_store(opt: Comparison, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a store, whose weights may be rounded"):
        open_source(str(opt.store.folder), None, tmp_path)
