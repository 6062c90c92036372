"""Masks in the forms of other libraries, run in these; and `masks export` as a command."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke_wide as invoke
from demo_scores import DEMO
from family_models import CASES, HEADS, LAYERS
from mask_equalities import Comparison, loaded
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_icl.errors import InputError
from lowmem_icl.export import formats
from lowmem_icl.export.applied import applied
from lowmem_icl.masks.files import MaskFile, read_mask, write_mask
from lowmem_icl.masks.mask import resampling

TOKENS = torch.randint(4, 300, (2, 20), generator=torch.Generator().manual_seed(0))
MASKS = Path(__file__).parents[1] / "masks" / "demo"
DEMO_MASK = MASKS / "greedy-recall-16shot.json"


def expected(comparison: Comparison, mask_file: MaskFile) -> Tensor:
    with torch.no_grad(), applied(mask_file.mask, comparison.model, mask_file.means):
        logits: Tensor = comparison.model(TOKENS).logits
    return logits


@pytest.fixture(scope="module", params=["gpt2", "opt", "llama", "gemma2", "falcon"])
def comparison(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(CASES[request.param], tmp_path_factory.mktemp("formats"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("means", [False, True])
def test_transformer_lens_gives_the_same_logits(comparison: Comparison, means: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge import TransformerBridge

    mask_file = comparison.mask_file("scattered", means=means)
    formats.write_transformer_lens(mask_file, tmp_path / "made.py")
    bridge = TransformerBridge.boot_transformers(
        str(comparison.checkpoint),
        hf_model=comparison.case.reloaded(comparison.checkpoint),
        tokenizer=AutoTokenizer.from_pretrained(DEMO),
        device="cpu",
        dtype=torch.float32,
    )
    with torch.no_grad():
        logits = bridge.run_with_hooks(
            TOKENS, prepend_bos=False, fwd_hooks=loaded(tmp_path / "made.py").fwd_hooks()
        )
    torch.testing.assert_close(logits, expected(comparison, mask_file), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("means", [False, True])
def test_nnsight_gives_the_same_logits(comparison: Comparison, means: bool, tmp_path: Path) -> None:
    nnsight = pytest.importorskip("nnsight")
    mask_file = comparison.mask_file("scattered", means=means)
    formats.write_nnsight(mask_file, tmp_path / "made.py")
    made, model = loaded(tmp_path / "made.py"), nnsight.NNsight(comparison.model)
    with torch.no_grad(), model.trace(TOKENS):
        made.remove(model)
        traced = model.output.logits.save()
    with model.edit() as (_, edited):
        made.remove(edited)
    with torch.no_grad(), edited.trace(TOKENS):
        later = edited.output.logits.save()
    for logits in (traced, later):
        torch.testing.assert_close(logits, expected(comparison, mask_file), atol=1e-4, rtol=0)


@pytest.mark.parametrize("means", [False, True])
def test_keep_tensors_are_enough_to_remove_units_by_hand(means: bool, tmp_path: Path) -> None:
    comparison = Comparison(CASES["opt"], tmp_path)
    mask_file = comparison.mask_file("scattered", means=means)
    formats.write_keep_tensors(mask_file, tmp_path / "keep.safetensors")
    with safe_open(tmp_path / "keep.safetensors", "pt") as opened:
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert opened.metadata() == {
            "format": "lowmem-icl-keep/1", "name": "scattered", "model": "small", "model_type": "opt",
            "ablation": "mean" if means else "zero",
        }  # fmt: skip
    assert tensors["keep_heads"].shape == (LAYERS, HEADS)
    assert set(tensors) == {"keep_heads", "keep_ffns"} | ({"head_means", "ffn_means"} if means else set())
    handles = []
    for number, layer in enumerate(comparison.model.model.decoder.layers):
        keep, ffn = tensors["keep_heads"][number, :, None], tensors["keep_ffns"][number]
        fill = (1 - keep) * (tensors["head_means"][number] if means else 0)
        written = (1 - ffn) * (tensors["ffn_means"][number] if means else 0)

        def cut(module: Any, given: Any, keep: Tensor = keep, fill: Any = fill) -> tuple[Tensor]:
            return ((given[0].unflatten(-1, (HEADS, -1)) * keep + fill).flatten(-2),)

        def silence(
            module: Any, given: Any, out: Tensor, ffn: Tensor = ffn, written: Any = written
        ) -> Tensor:
            return out * ffn + written

        handles.append(layer.self_attn.out_proj.register_forward_pre_hook(cut))
        handles.append(layer.fc2.register_forward_hook(silence))
    with torch.no_grad():
        logits = comparison.model(TOKENS).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits, expected(comparison, mask_file), atol=1e-5, rtol=0)


def test_nothing_of_a_strangers_file_gets_into_code(tmp_path: Path) -> None:
    source = read_mask(DEMO_MASK)
    hostile = replace(
        source,
        name='x"""\nimport os\n"""',
        model=source.model.model_copy(update={"id": "'''; raise SystemExit"}),
        made={"method": "\\\n; raise"},
    )
    for write in (formats.write_transformer_lens, formats.write_nnsight):
        write(source, tmp_path / "plain.py")
        write(hostile, tmp_path / "hostile.py")
        assert (tmp_path / "plain.py").read_text() == (tmp_path / "hostile.py").read_text()
        made = loaded(tmp_path / "plain.py")
        assert {layer: list(source.mask.heads_in(layer)) for layer in range(4)} == made.REMOVED_HEADS
        assert made.REMOVED_FFNS == [1, 2, 3]
        assert not {"lowmem_icl"} & {
            alias.name
            for node in ast.walk(ast.parse((tmp_path / "plain.py").read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
    unknown = replace(source, model=source.model.model_copy(update={"model_type": "x; raise SystemExit"}))
    with pytest.raises(InputError, match="is not supported"):
        formats.write_nnsight(unknown, tmp_path / "unknown.py")


def test_masks_that_a_form_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = read_mask(DEMO_MASK)
    resampled = replace(source, mask=source.mask.filled(resampling(1)))
    for write in (formats.write_transformer_lens, formats.write_nnsight, formats.write_keep_tensors):
        with pytest.raises(InputError, match="needs these documents"):
            write(resampled, tmp_path / "made.py")
    granite = Comparison(CASES["granite"], tmp_path).mask_file("scattered", means=True)
    with pytest.raises(InputError, match="behind a scale"):
        formats.write_transformer_lens(granite, tmp_path / "made.py")
    with pytest.raises(InputError, match=r"expected NAME\.py"):
        formats.write_nnsight(source, tmp_path / "my mask.py")
    assert not (tmp_path / "made.py").exists()


def test_a_demo_mask_becomes_checkpoints_that_plain_transformers_loads(tmp_path: Path) -> None:
    made = {}
    for flags, name in (((), "zeros"), (("--structural",), "small")):
        told = invoke(
            "masks",
            "export",
            DEMO_MASK,
            "--format",
            "hf",
            "--model",
            "demo",
            "--out",
            tmp_path / name,
            *flags,
        )
        assert told.exit_code == 0, told.output
        assert "other weights" not in told.stderr
        assert told.stdout.startswith(f"{tmp_path / name}\nbefore: 1,979,904 parameters, 3.96 MB, 4 layers")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        tokens = AutoTokenizer.from_pretrained(tmp_path / name)("cat dog", return_tensors="pt").input_ids
        with torch.no_grad():
            made[name] = model(tokens).logits
    assert "after:  1,535,040 parameters, 3.07 MB, 3 layers" in told.stdout
    torch.testing.assert_close(made["zeros"], made["small"], atol=1e-2, rtol=0)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad(), applied(read_mask(DEMO_MASK).mask, model):
        torch.testing.assert_close(made["zeros"], model(tokens).logits, atol=1e-4, rtol=0)


def test_the_command_writes_every_form(tmp_path: Path) -> None:
    units = invoke("masks", "export", DEMO_MASK)
    assert units.stdout.split()[:2] == ["L0H1", "L0H2"]
    assert json.loads(invoke("masks", "export", DEMO_MASK, "--json").stdout)["ffns"] == [1, 2, 3]
    for form, name in (("torch", "k.safetensors"), ("transformerlens", "lens.py"), ("nnsight", "sight.py")):
        arguments = ("masks", "export", DEMO_MASK, "--format", form, "--out", tmp_path / name)
        told = invoke(*arguments)
        assert told.exit_code == 0, told.output
        assert told.stdout == f"{tmp_path / name}\n"
        assert (tmp_path / name).stat().st_size > 0
        assert "exists; choose another file" in invoke(*arguments).stderr
    mask_file = read_mask(DEMO_MASK)
    other = tmp_path / "other.json"
    write_mask(other, replace(mask_file, model=mask_file.model.model_copy(update={"digest": "0" * 64})))
    as_json = invoke(
        "masks", "export", other, "--format", "hf", "--model", "demo", "--out", tmp_path / "f", "--json"
    )
    assert json.loads(as_json.stdout)["zeroed_ffns"] == 3
    warning = f"mask {mask_file.name} was made on other weights ({mask_file.model.id}) of the same shape"
    assert warning in json.loads(as_json.stdout)["notes"]
    assert warning in as_json.stderr


def test_flags_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    (tmp_path / "masks").mkdir()
    mask_file = read_mask(DEMO_MASK)
    other = replace(mask_file, model=mask_file.model.model_copy(update={"layers": 5}))
    write_mask(tmp_path / "masks" / "other.json", other)
    for arguments, told in (
        ((DEMO_MASK, "--format", "onnx", *out), "expected one of units, hf, torch, transformerlens, nnsight"),
        ((DEMO_MASK, "--format", "hf", *out), "--model: expected where the weights are"),
        ((DEMO_MASK, "--format", "hf", "--model", "demo"), "--out goes with every format but units"),
        ((DEMO_MASK, *out), "--out goes with every format but units"),
        ((DEMO_MASK, "--format", "torch", "--structural", *out), "--structural belongs to --format hf"),
        ((DEMO_MASK, "--model", "demo"), "--model belongs to --format hf"),
        ((DEMO_MASK, "--format", "hf", "--model", "./none", *out), "--model: folder ./none does not exist"),
        (
            (tmp_path / "masks" / "other.json", "--format", "hf", "--model", "demo", *out),
            "made for opt of 5 layers with 8 heads, this model is opt of 4 layers with 8 heads",
        ),
    ):
        refused = invoke("masks", "export", *arguments)
        assert refused.exit_code == 2, refused.output
        assert told in refused.stderr
    assert not (tmp_path / "out").exists()
