"""Small GGUF files of random models, written with the `gguf` package as llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONTROL, NORMAL, BYTE = 3, 1, 6
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "12 3", "Ġ w", "Ġ 1"]
BYTE_LEVEL_TOKENS = [
    "<|end|>",
    "<|start|>",
    *bytes_to_unicode().values(),
    *(merge.replace(" ", "") for merge in MERGES),
]
PIECES = ["▁", "h", "e", "l", "o", "w", "he", "ll", "hell", "hello", "▁w", "1", "2", "12"]
SENTENCEPIECE_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *PIECES,
]
ALWAYS: Callable[[GGUFWriter], None] = lambda writer: None  # noqa: E731


def random_model(architecture: str, *, tied: bool = True, **changes: Any) -> PreTrainedModel:
    """Return a random model of transformers whose norms and biases are not what they begin with."""
    from transformers import AutoConfig

    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    tokens = SENTENCEPIECE_TOKENS if architecture == "gemma3" else BYTE_LEVEL_TOKENS
    own = {"head_dim": 32, "sliding_window": 16} if architecture == "gemma3" else {}
    fields = SIZES | own | {"vocab_size": len(tokens), "tie_word_embeddings": tied} | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                # Sixteenths, so that adding 1 and subtracting it loses nothing.
                parameter.copy_(torch.randint(-8, 8, parameter.shape) / 16)
    return model.eval()


def write_gguf(
    path: Path,
    architecture: str,
    model: PreTrainedModel,
    form: GGMLQuantizationType = GGMLQuantizationType.F32,
    edit: Callable[[GGUFWriter], None] = ALWAYS,
) -> Path:
    """Write a model; its matrices in a form, `edit` adding what a test wants."""
    writer = GGUFWriter(path, architecture)
    _add_sizes(writer, architecture, model)
    _add_tokenizer(writer, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if form == GGMLQuantizationType.Q8_0 else 0)
    edit(writer)
    (arch,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = _as_llama_cpp_stores_it(architecture, name, parameter.detach().numpy())
        stored = GGMLQuantizationType.F32 if values.ndim == 1 else form
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp_stores_it(architecture: str, name: str, values: Any) -> Any:
    if architecture == "gemma3" and "norm" in name:
        return values + np.float32(1)
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return np.ascontiguousarray(values)


def _add_sizes(writer: GGUFWriter, architecture: str, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(20000.0)
    writer.add_vocab_size(config.vocab_size)
    if architecture in ("gemma3", "qwen3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def _add_tokenizer(writer: GGUFWriter, architecture: str) -> None:
    if architecture == "gemma3":
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(SENTENCEPIECE_TOKENS)
        writer.add_token_scores([-float(index) for index in range(len(SENTENCEPIECE_TOKENS))])
        writer.add_token_types([CONTROL] * 4 + [BYTE] * 256 + [NORMAL] * len(PIECES))
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(3)
        writer.add_pad_token_id(0)
        writer.add_add_bos_token(True)
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(BYTE_LEVEL_TOKENS)
    writer.add_token_types([CONTROL] * 2 + [NORMAL] * (len(BYTE_LEVEL_TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
