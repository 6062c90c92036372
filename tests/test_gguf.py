"""GGUF files as checkpoints, against transformers' own reading and the models that were written."""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from commands import invoke
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf_files import BYTE_LEVEL_TOKENS, MERGES, SENTENCEPIECE_TOKENS, random_model, write_gguf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowmem_icl.conversion.checkpoint import Checkpoint
from lowmem_icl.conversion.gguf import config as config_module
from lowmem_icl.conversion.gguf import header as header_module
from lowmem_icl.conversion.gguf.header import GgufHeader, read_gguf_header
from lowmem_icl.conversion.gguf.source import open_gguf
from lowmem_icl.conversion.gguf.tokenizer import adds_bos
from lowmem_icl.errors import InputError
from lowmem_icl.model.store import NON_LAYER, layer_file, open_store

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
ARCHITECTURES = ("llama", "qwen2", "gemma3")
TEXT = "hello 12 w123 he\u0301llo\n\n  1"
REAL_MODELS = Path(os.environ.get("LOWMEM_ICL_GGUF_MODELS", Path.home() / ".cache" / "gguf-models"))


def accept(config: dict[str, Any]) -> None:
    """Accept any config: the architectures that the engine knows are another test's."""


def opened(path: Path) -> Checkpoint:
    return open_gguf(path, path.parent / "read", accept)


def as_transformers_reads(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def assert_equal_tensors(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    expected = dict(model.named_parameters())
    assert checkpoint.shard_of.keys() == expected.keys()
    for name, value in expected.items():
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, value), name


@pytest.mark.parametrize("form", [F32, Q8_0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_and_config_are_those_that_transformers_reads(
    tmp_path: Path, architecture: str, form: GGMLQuantizationType
) -> None:
    written = random_model(architecture)
    path = write_gguf(tmp_path / "tiny.gguf", architecture, written, form)
    checkpoint = opened(path)
    expected = as_transformers_reads(path)
    assert_equal_tensors(checkpoint, expected)
    if form == F32:
        assert_equal_tensors(checkpoint, written)
    assert checkpoint.quantisation == ("ALL_F32" if form == F32 else "Q8_0")
    config = dict(checkpoint.config)
    assert config["architectures"] == [type(expected).__name__]
    built = AutoConfig.for_model(config.pop("model_type"), **config)
    for name in ("rope_parameters", "head_dim", "tie_word_embeddings", "rms_norm_eps", "num_key_value_heads"):
        assert getattr(built, name, None) == getattr(expected.config, name, None), name


def test_heads_have_the_width_that_the_file_says(tmp_path: Path) -> None:
    """transformers' reader leaves Qwen3's at 128."""
    written = random_model("qwen3", head_dim=32)
    checkpoint = opened(write_gguf(tmp_path / "tiny.gguf", "qwen3", written))
    assert checkpoint.config["head_dim"] == 32
    assert_equal_tensors(checkpoint, written)


@pytest.mark.parametrize(("largest", "scale"), [(62, 32), (3, 64 // 4)])
def test_gemmas_attention_is_scaled_by_llama_cpps_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, scale: int
) -> None:
    """The file does not hold the scale: a head's width, but in the largest model, told by its layers."""
    assert config_module.LARGEST_GEMMA_LAYERS == {"gemma2": 46, "gemma3": 62}
    monkeypatch.setitem(config_module.LARGEST_GEMMA_LAYERS, "gemma3", largest)
    path = write_gguf(tmp_path / "tiny.gguf", "gemma3", random_model("gemma3", num_hidden_layers=3))
    assert opened(path).config["query_pre_attn_scalar"] == scale


def test_an_unembedding_of_its_own_makes_the_model_untied(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", random_model("qwen2", tied=False))
    checkpoint = opened(path)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.shard_of
    assert_equal_tensors(checkpoint, as_transformers_reads(path))
    assert any("unembedding of its own" in note for note in checkpoint.notes)


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "gemma3", random_model("gemma3"), Q8_0)
    header, reader = read_gguf_header(path), GGUFReader(path)
    scalars = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY
    }
    assert header.metadata == scalars
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.form, ours.offset) == (tensor.tensor_type, tensor.data_offset)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.byte_shape == (
            tensor.data.shape if ours.form == Q8_0 else (*ours.shape[:-1], 4 * ours.shape[-1])
        )


def reloaded(checkpoint: Checkpoint) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)


def test_smollms_digits_are_split_one_by_one_as_in_the_original(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    checkpoint = opened(path)
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    vocabulary = {token: index for index, token in enumerate(BYTE_LEVEL_TOKENS)}
    original = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    expected = original.encode(TEXT).ids
    assert reloaded(checkpoint)(TEXT)["input_ids"] == expected
    dropped = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)(TEXT)["input_ids"]
    assert dropped != expected, "transformers alone merges digits: nothing would need restoring"
    assert any("'smollm': digits one by one" in note for note in checkpoint.notes)


def test_qwens_texts_are_composed_before_they_are_split(tmp_path: Path) -> None:
    checkpoint = opened(write_gguf(tmp_path / "tiny.gguf", "qwen2", random_model("qwen2")))
    tokenizer = reloaded(checkpoint)
    assert tokenizer("he\u0301llo")["input_ids"] == tokenizer("h\u00e9llo")["input_ids"]
    assert tokenizer("12")["input_ids"] == [BYTE_LEVEL_TOKENS.index(digit) for digit in "12"]
    written = json.loads((checkpoint.folder / "tokenizer.json").read_text())
    assert written["normalizer"] == {"type": "NFC"}
    assert tokenizer.bos_token_id not in tokenizer("12")["input_ids"]


def test_gemmas_texts_begin_with_bos(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "gemma3", random_model("gemma3"))
    checkpoint = opened(path)
    tokenizer = reloaded(checkpoint)
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)("hello w12")["input_ids"]
    assert tokenizer("hello w12")["input_ids"] == expected
    assert [SENTENCEPIECE_TOKENS[token] for token in expected[:2]] == ["<bos>", "hello"]
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == expected[1:2]
    assert any("rotary base 10000 of local layers" in note for note in checkpoint.notes)


def test_llama_3s_texts_begin_with_bos_though_the_file_does_not_say(tmp_path: Path) -> None:
    def as_llama_3(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.add_bos_token")
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "llama-bpe"

    checkpoint = opened(write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), edit=as_llama_3))
    hello = BYTE_LEVEL_TOKENS.index("hello")
    assert reloaded(checkpoint)("hello")["input_ids"] == [BYTE_LEVEL_TOKENS.index("<|start|>"), hello]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"add_bos_token": False, "model": "llama"}, False),
        ({"add_bos_token": True, "model": "gpt2"}, True),
        ({"model": "llama"}, True),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "qwen2"}, False),
    ],
)
def test_bos_is_added_by_the_files_word_or_else_llama_cpps(fields: dict[str, Any], expected: bool) -> None:
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    assert adds_bos(GgufHeader(metadata, {})) is expected


def test_a_file_is_read_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    first = opened(path)
    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", None)
        assert opened(path).config == first.config
    os.utime(path, ns=(1, 1))
    assert opened(path).folder != first.folder


def test_conversion_writes_a_store_that_names_the_quantisation(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), Q8_0)
    done = invoke("convert", path, "--store-dir", tmp_path / "stores", "--weights", "float32")
    assert done.exit_code == 0, done.stderr
    assert "dequantised from GGUF Q8_0" in done.stderr
    store = open_store(Path(done.stdout.strip()))
    assert store.manifest.source.quantisation == "Q8_0"
    assert store.manifest.source.notes
    assert "tokenizer/tokenizer.json" in store.manifest.files
    expected = dict(as_transformers_reads(path).named_parameters())
    stored = load_file(store.folder / layer_file(1))
    for name, value in stored.items():
        assert torch.equal(value, expected[f"model.layers.1.{name}"]), name
    outside = load_file(store.folder / NON_LAYER)
    assert torch.equal(outside["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    again = invoke("convert", path, "--store-dir", tmp_path / "stores", "--weights", "float32")
    assert (again.stdout, again.stderr) == (done.stdout, f"converting {path} in float32 …\n")


def llama_cpps_divisors(base: float, width: int, factor: float) -> torch.Tensor:
    """As llama.cpp's converter writes them for `rope_type: llama3`, frequency by frequency."""
    divisors = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * base ** (index / width)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


def test_llama_3s_rotary_scaling_is_restored(tmp_path: Path) -> None:
    divisors = llama_cpps_divisors(20000.0, 16, 32.0)
    assert divisors.unique().numel() == 3, "one frequency is between the bands"
    path = write_gguf(
        tmp_path / "tiny.gguf",
        "llama",
        random_model("llama"),
        edit=lambda writer: writer.add_tensor("rope_freqs.weight", divisors.numpy()),
    )
    checkpoint = opened(path)
    config = dict(checkpoint.config)
    built = AutoConfig.for_model(config.pop("model_type"), **config)
    plain = 20000.0 ** -(torch.arange(0, 16, 2) / 16)
    frequencies = LlamaRotaryEmbedding(built).inv_freq
    assert torch.allclose(frequencies, plain / divisors, rtol=1e-5)
    assert_equal_tensors(checkpoint, as_transformers_reads(path))
    assert any("scaled as in Llama 3.1, by 32" in note for note in checkpoint.notes)


def too_many_layers(writer: GGUFWriter) -> None:
    writer.kv_data[0]["llama.block_count"].value = 1 << 31


def other_divisors(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", torch.arange(1.0, 9.0).numpy())


def extra_tensor(writer: GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_rel_b.weight", torch.ones(8).numpy())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (extra_tensor, r"tensor 'blk\.0\.attn_rel_b\.weight' belongs to no parameter"),
        (too_many_layers, "block_count is 2147483648, but there are tensors of 3 layers"),
        (other_divisors, r"'rope_freqs\.weight' scales rotary frequencies in another way"),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            r"rope\.scaling\.type is yarn",
        ),
        (lambda writer: writer.add_key_length(32), r"llama\.rope\.dimension_count is 16"),
        (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts"),
        (lambda writer: writer.add_logit_scale(0.5), r"llama\.logit_scale is 0\.5"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(
    tmp_path: Path, edit: Callable[[GGUFWriter], None], message: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), edit=edit)
    with pytest.raises(InputError, match=message):
        opened(path)
    assert not (tmp_path / "read").exists()


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "hyperllama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused = invoke("convert", tmp_path / "x.gguf", "--store-dir", tmp_path / "stores")
    assert refused.exit_code == 2
    assert "architecture 'hyperllama'" in refused.stderr


def patched(content: bytes, place: int, form: str, value: int) -> bytes:
    return content[:place] + struct.pack(form, value) + content[place + struct.calcsize(form) :]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[: len(content) // 20],
        lambda content: content[:-5],
        lambda content: b"GGML" + content[4:],
        lambda content: patched(content, 4, "<I", 99),
        lambda content: patched(content, 8, "<Q", 1 << 60),
        lambda content: patched(content, 16, "<Q", 1 << 60),
        lambda content: patched(content, 24, "<Q", 1 << 63),
        lambda content: content.replace(
            b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0", b"tokenizer.ggml.tokens\x09\0\0\0\x09\0\0\0"
        ),
        lambda content: content.replace(b"general.architecture", b"general.architectur\xff"),
        lambda content: content.replace(b"blk.1.attn_k.weight\x02", b"blk.1.attn_k.weight\xff"),
    ],
)
def test_broken_files_are_refused_in_a_line(tmp_path: Path, break_it: Callable[[bytes], bytes]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    whole = path.read_bytes()
    broken = break_it(whole)
    assert broken != whole
    path.write_bytes(broken)
    with pytest.raises(InputError, match=r"tiny\.gguf: not a whole GGUF file \(.+\); fetch the file again"):
        opened(path)


def test_an_array_that_no_vocabulary_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    monkeypatch.setattr(header_module, "MOST_ELEMENTS", len(BYTE_LEVEL_TOKENS) - 1)
    with pytest.raises(InputError, match=f"an array of its metadata has {len(BYTE_LEVEL_TOKENS)} elements"):
        opened(path)


def test_a_file_without_a_tensor_or_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    content = path.read_bytes()
    for found, changed, message in (
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.t0kens", "no tokenizer|no config"),
        (b"blk.1.attn_k.weight", b"blk.1.attn_x.weight", "belongs to no parameter"),
    ):
        path.write_bytes(content.replace(found, changed))
        with pytest.raises(InputError, match=message):
            opened(path)


def test_a_missing_file_and_a_folder_of_gguf_files_are_named(tmp_path: Path) -> None:
    refused = invoke("plan", "--model", tmp_path / "none.gguf")
    assert refused.exit_code == 2
    assert "none.gguf does not exist" in " ".join(refused.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"])
def test_real_files_are_read_as_transformers_reads_them(tmp_path: Path, name: str) -> None:
    path = REAL_MODELS / f"{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is missing: ../shared/models/get.py {name} makes it")
    assert_equal_tensors(open_gguf(path, tmp_path, accept), as_transformers_reads(path))
