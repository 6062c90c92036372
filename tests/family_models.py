"""A small random model of every family, and where plain hooks find its units.

Sizes are uneven on purpose: heads no power of two, heads of keys fewer than heads where the family allows it,
heads × head width other than the width, windows shorter than the rows, layers of every kind.
"""

from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 300
CONTEXT = 96
LAYERS = 3
HEADS = 6

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A number of heads of keys that the architecture does not have would be believed by other libraries.
UNGROUPED = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
WIDE_HEADS = {"head_dim": 12}
ALTERNATING = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
N_NAMES = {"n_embd": 36, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "vocab_size": VOCABULARY}


@dataclass(frozen=True)
class FamilyCase:
    """One architecture as tests make it; names are relative to a decoder layer, `layers` to the model.

    `written_ffn`: the module whose output reaches the residual; `ffn`: the one that hooks silence.
    """

    model_type: str
    config: dict[str, Any] = field(repr=False)
    layers: str = "model.layers"
    output: str = "self_attn.o_proj"
    ffn: str = "mlp.down_proj"
    written_ffn: str = ""
    attention: str = "eager"

    def make(self, seed: int = 0) -> Any:
        """Return the model with random weights, no norm or bias of which is trivial."""
        torch.manual_seed(seed)
        config = AutoConfig.for_model(self.model_type, **self.config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
                    parameter.normal_(0.0 if self.model_type.startswith("gemma") else centre, 0.2)
                else:
                    parameter.normal_(0, 0.25)
        model.tie_weights()
        return model.eval()

    def save(self, folder: Path) -> Path:
        """Save the model as a checkpoint."""
        self.make().save_pretrained(folder)
        return folder

    def reloaded(self, folder: Path) -> Any:
        """Return Hugging Face's own model of a checkpoint, in float32."""
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=self.attention
        ).eval()

    def module(self, model: Any, layer: int, name: str) -> Module:
        """Return a part of a layer."""
        blocks = reduce(getattr, self.layers.split("."), model)
        return reduce(getattr, name.split("."), blocks[layer])


CASES = {
    "opt": FamilyCase(
        "opt",
        {
            "vocab_size": VOCABULARY, "hidden_size": 36, "word_embed_proj_dim": 36, "ffn_dim": 52,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT,
        },
        layers="model.decoder.layers", output="self_attn.out_proj", ffn="fc2",
    ),
    "gpt2": FamilyCase(
        "gpt2", N_NAMES, layers="transformer.h", output="attn.c_proj", ffn="mlp.c_proj"
    ),
    "gpt_neox": FamilyCase(
        "gpt_neox",
        UNGROUPED | {"hidden_size": 48, "rotary_pct": 0.5},
        layers="gpt_neox.layers", output="attention.dense", ffn="mlp.dense_4h_to_h",
    ),
    "gpt_neox serial": FamilyCase(
        "gpt_neox",
        UNGROUPED | {"hidden_size": 48, "rotary_pct": 1.0, "use_parallel_residual": False},
        layers="gpt_neox.layers", output="attention.dense", ffn="mlp.dense_4h_to_h",
    ),
    "gptj": FamilyCase(
        "gptj", N_NAMES | {"n_embd": 48, "rotary_dim": 4},
        layers="transformer.h", output="attn.out_proj", ffn="mlp.fc_out",
    ),
    "llama": FamilyCase("llama", LLAMA | WIDE_HEADS | {"tie_word_embeddings": True}),
    "llama 3": FamilyCase(
        "llama",
        LLAMA | WIDE_HEADS | {
            "attention_bias": True,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 24, "rope_theta": 50.0,
            },
        },
    ),
    "mistral": FamilyCase("mistral", LLAMA | WIDE_HEADS | {"sliding_window": 7}),
    "qwen2": FamilyCase(
        "qwen2",
        LLAMA | {"hidden_size": 48, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2 windows off": FamilyCase(
        "qwen2", LLAMA | {"hidden_size": 48, "use_sliding_window": False, "sliding_window": 7}
    ),
    "qwen3": FamilyCase("qwen3", LLAMA | WIDE_HEADS),
    "smollm3": FamilyCase("smollm3", LLAMA | {"hidden_size": 48, "no_rope_layers": [1, 0, 1]}),
    "granite": FamilyCase(
        "granite",
        LLAMA | {
            "hidden_size": 48, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
        },
    ),
    "gemma": FamilyCase("gemma", LLAMA | WIDE_HEADS),
    "gemma2": FamilyCase(
        "gemma2",
        LLAMA | WIDE_HEADS | ALTERNATING | {
            "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
        written_ffn="post_feedforward_layernorm",
    ),
    "gemma3_text": FamilyCase(
        "gemma3_text",
        LLAMA | WIDE_HEADS | ALTERNATING | {
            "query_pre_attn_scalar": 5, "rope_theta": 100.0, "rope_local_base_freq": 10.0,
        },
        written_ffn="post_feedforward_layernorm",
    ),
    "gemma3_text linear": FamilyCase(
        "gemma3_text",
        LLAMA | WIDE_HEADS | ALTERNATING | {
            "query_pre_attn_scalar": 5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
        written_ffn="post_feedforward_layernorm",
    ),
    "phi3": FamilyCase("phi3", LLAMA | {"hidden_size": 48, "sliding_window": 7}),
    "phi3 longrope": FamilyCase(
        "phi3",
        LLAMA | {
            "hidden_size": 48, "max_position_embeddings": 2 * CONTEXT,
            "original_max_position_embeddings": CONTEXT,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 4.0, 6.0, 8.0],
            },
        },
    ),
    "phi3 partial": FamilyCase("phi3", LLAMA | {"hidden_size": 48, "partial_rotary_factor": 0.5}),
    "olmo2": FamilyCase(
        "olmo2", LLAMA | {"hidden_size": 48}, written_ffn="post_feedforward_layernorm"
    ),
    "falcon": FamilyCase(
        "falcon",
        UNGROUPED | {
            "hidden_size": 48, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True,
        },
        layers="transformer.h", output="self_attention.dense", ffn="mlp.dense_4h_to_h",
    ),
    "falcon 40b": FamilyCase(
        "falcon",
        UNGROUPED | {"hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
        layers="transformer.h", output="self_attention.dense", ffn="mlp.dense_4h_to_h",
    ),
    "falcon rw": FamilyCase(
        "falcon",
        UNGROUPED | {
            "hidden_size": 48, "new_decoder_architecture": False, "multi_query": False,
            "parallel_attn": False, "alibi": True, "bias": True,
        },
        # Its eager attention adds the linear biases twice.
        attention="sdpa",
        layers="transformer.h", output="self_attention.dense", ffn="mlp.dense_4h_to_h",
    ),
    "bloom": FamilyCase(
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": LAYERS, "n_head": HEADS},
        layers="transformer.h", output="self_attention.dense", ffn="mlp.dense_4h_to_h",
    ),
}  # fmt: skip
