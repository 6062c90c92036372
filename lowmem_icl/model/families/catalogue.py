"""The families: one row per architecture."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_icl.errors import InputError
from lowmem_icl.model.families.adapted import adapt_bloom, adapt_falcon
from lowmem_icl.model.families.family import Family, FusedProjection, always

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _token_inputs_opt(model: PreTrainedModel, rows: Tensor) -> Tensor:
    decoder = cast(Any, model).model.decoder
    return rows if decoder.project_in is None else decoder.project_in(rows)


def _embed_opt(model: PreTrainedModel, rows: Tensor, positions: Tensor) -> Tensor:
    decoder = cast(Any, model).model.decoder
    # OPT's table of positions has two rows in front; the module adds that offset itself.
    return _token_inputs_opt(model, rows) + decoder.embed_positions(None, position_ids=positions[None])[0]


def _before_head_opt(model: PreTrainedModel, normed: Tensor) -> Tensor:
    decoder = cast(Any, model).model.decoder
    return normed if decoder.project_out is None else decoder.project_out(normed)


def _token_outputs_opt(model: PreTrainedModel, rows: Tensor) -> Tensor:
    project_out = cast(Any, model).model.decoder.project_out
    return rows if project_out is None else rows @ project_out.weight


def _embed_gpt2(model: PreTrainedModel, rows: Tensor, positions: Tensor) -> Tensor:
    return rows + cast(Any, model).transformer.wpe(positions)


def _token_inputs_bloom(model: PreTrainedModel, rows: Tensor) -> Tensor:
    return cast(Any, model).transformer.word_embeddings_layernorm(rows)


def _embed_bloom(model: PreTrainedModel, rows: Tensor, positions: Tensor) -> Tensor:
    return _token_inputs_bloom(model, rows)


def _query_heads(config: PretrainedConfig) -> int:
    return int(config.num_attention_heads)


def _key_heads(config: PretrainedConfig) -> int:
    return int(config.num_key_value_heads)


def _falcon_groups(config: PretrainedConfig) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _norms_before(config: PretrainedConfig) -> bool:
    return bool(config.do_layer_norm_before)


def _residual_before_norms(config: PretrainedConfig) -> bool:
    return not getattr(config, "apply_residual_connection_post_layernorm", False)


def _parallel_gpt_neox(config: PretrainedConfig) -> bool:
    return bool(config.use_parallel_residual)


def _parallel_falcon(config: PretrainedConfig) -> bool:
    return bool(config.parallel_attn or config.new_decoder_architecture)


OPT = Family(
    attention_inputs=QKV,
    attention_output="self_attn.out_proj",
    ffn_inputs=("fc1",),
    ffn_output="fc2",
    final_norm="model.decoder.final_layer_norm",
    token_inputs=_token_inputs_opt,
    embed=_embed_opt,
    before_head=_before_head_opt,
    token_outputs=_token_outputs_opt,
    # The paper's protocol has none.
    adds_bos=False,
    blocks="model.decoder.layers",
    ffn_parts=("fc1", "fc2", "final_layer_norm"),
    hands_on=_norms_before,
)
GPT2 = Family(
    attention_inputs=("attn.c_attn",),
    fused=FusedProjection(stacked=True, groups=_query_heads),
    attention_output="attn.c_proj",
    ffn_inputs=("mlp.c_fc",),
    ffn_output="mlp.c_proj",
    final_norm="transformer.ln_f",
    embed=_embed_gpt2,
    blocks="transformer.h",
    ffn_parts=("mlp", "ln_2"),
    refused={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
)
GPT_NEOX = Family(
    attention_inputs=("attention.query_key_value",),
    fused=FusedProjection(stacked=False, groups=_query_heads),
    attention_output="attention.dense",
    ffn_inputs=("mlp.dense_h_to_4h",),
    ffn_output="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    rotary="gpt_neox.rotary_emb",
    stored_names={"lm_head.weight": "embed_out.weight"},
    blocks="gpt_neox.layers",
    ffn_parts=("mlp", "post_attention_layernorm"),
    parallel=_parallel_gpt_neox,
)
GPTJ = Family(
    attention_inputs=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    attention_output="attn.out_proj",
    ffn_inputs=("mlp.fc_in",),
    ffn_output="mlp.fc_out",
    final_norm="transformer.ln_f",
    rotary="transformer.rotary_emb",
    blocks="transformer.h",
    ffn_parts=("mlp",),
    parallel=always,
)
LLAMA = Family(
    attention_inputs=QKV,
    attention_output="self_attn.o_proj",
    ffn_inputs=("mlp.gate_proj", "mlp.up_proj"),
    ffn_output="mlp.down_proj",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    ffn_parts=("mlp", "post_attention_layernorm"),
    free_head_width=True,
)
# Norms before and after attention and FFN; a GGUF's or tokenizer's word that no BOS is added is wrong here.
GEMMA2 = replace(
    LLAMA,
    attention_norm="post_attention_layernorm",
    ffn_norm="post_feedforward_layernorm",
    ffn_parts=("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    normed_plus_one=True,
    adds_bos=True,
    refused={"use_bidirectional_attention": False},
)
BLOOM = Family(
    attention_inputs=("self_attention.query_key_value",),
    fused=FusedProjection(stacked=False, groups=_query_heads),
    attention_output="self_attention.dense",
    ffn_inputs=("mlp.dense_h_to_4h",),
    ffn_output="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
    layer_arguments={"alibi": None},
    token_inputs=_token_inputs_bloom,
    embed=_embed_bloom,
    adapt=adapt_bloom,
    blocks="transformer.h",
    ffn_parts=("mlp", "post_attention_layernorm"),
    hands_on=_residual_before_norms,
    refused={"slow_but_exact": False},
)

FAMILIES: Mapping[str, Family] = {
    "opt": OPT,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "granite": replace(LLAMA, scales_written=True),
    "gemma": replace(LLAMA, normed_plus_one=True, adds_bos=True),
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "phi3": replace(
        LLAMA,
        attention_inputs=("self_attn.qkv_proj",),
        fused=FusedProjection(stacked=True, groups=_key_heads),
        ffn_inputs=("mlp.gate_up_proj",),
    ),
    "olmo2": replace(
        LLAMA,
        attention_norm="post_attention_layernorm",
        ffn_norm="post_feedforward_layernorm",
        ffn_parts=("mlp", "post_feedforward_layernorm"),
        # Queries and keys are normed over all heads together.
        free_head_width=False,
    ),
    "bloom": BLOOM,
    "falcon": replace(
        BLOOM,
        fused=FusedProjection(stacked=False, groups=_falcon_groups),
        rotary="transformer.rotary_emb",
        token_inputs=Family.token_inputs,
        embed=Family.embed,
        adapt=adapt_falcon,
        parallel=_parallel_falcon,
        refused={},
    ),
}

# What a config shows of architectures that are refused, and what they would need.
_MISSING = {
    "is_encoder_decoder": "an encoder and attention to it",
    "num_experts": "routing of tokens to experts, of which a layer has several for one FFN",
    "num_local_experts": "routing of tokens to experts, of which a layer has several for one FFN",
    "n_routed_experts": "routing of tokens to experts, of which a layer has several for one FFN",
    "ssm_cfg": "state-space layers, which have no heads of attention",
    "state_size": "state-space layers, which have no heads of attention",
    "text_config": "the text model on its own: save it alone, and give that",
}


LONGEST_SHOWN = 60
"""Characters of a name that is none."""


def family_of(model_type: str, config: Mapping[str, Any] | None = None) -> Family:
    """Return the family's row; raise InputError for an architecture that has none, naming what it lacks."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    missing = {needs for name, needs in _MISSING.items() if (config or {}).get(name)}
    raise InputError(
        f"config.json: model type '{model_type[:LONGEST_SHOWN]}' is not supported"
        + (f": what is missing is {'; '.join(sorted(missing))}" if missing else "")
        + f"; expected one of {', '.join(sorted(FAMILIES))}"
    )
