"""What differs between architectures: a row here is all that another model family needs.

Sizes and the name of the decoder blocks come from optimum; the layers themselves are Hugging Face's, built
empty by accelerate. No other module names a field of one architecture.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from optimum.gptq.utils import get_block_name_with_pattern
from optimum.utils import NormalizedConfigManager
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_icl.errors import InputError


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps the parts that are cut, captured or run outside the layers.

    Names are relative to a decoder layer. `shared_inputs` are linears fed by one and the same tensor, so that
    it is quantised once. `embed` maps (model, token ids [T], positions [T]) to the residual [T, D] in
    float32, `unembed_input` maps (model, residual [M, D]) to what multiplies the unembedding, [M, E] in
    float32. `token_inputs` maps (model, ids [C]) to what tokens put into the residual, without position, and
    `token_outputs` to what reads their logits off it, without the final norm: [C, D] in float32. `final_norm`
    gives that norm, or None.
    """

    model_type: str
    attention_output: str
    attention_value: str
    ffn_output: str
    shared_inputs: tuple[str, ...]
    embed: Callable[[PreTrainedModel, Tensor, Tensor], Tensor]
    unembed_input: Callable[[PreTrainedModel, Tensor], Tensor]
    token_inputs: Callable[[PreTrainedModel, Tensor], Tensor]
    token_outputs: Callable[[PreTrainedModel, Tensor], Tensor]
    final_norm: Callable[[PreTrainedModel], nn.LayerNorm | None]
    adds_bos: bool


def _token_inputs_opt(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    decoder = cast(Any, model).model.decoder
    embedded: Tensor = decoder.embed_tokens(tokens).float()
    return embedded if decoder.project_in is None else decoder.project_in(embedded)


def _token_outputs_opt(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    unembedding: Tensor = cast(Any, model).get_output_embeddings().weight[tokens].float()
    project_out = cast(Any, model).model.decoder.project_out
    return unembedding if project_out is None else unembedding @ project_out.weight


def _final_norm_opt(model: PreTrainedModel) -> nn.LayerNorm | None:
    norm: nn.LayerNorm | None = cast(Any, model).model.decoder.final_layer_norm
    return norm


def _embed_opt(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> Tensor:
    decoder = cast(Any, model).model.decoder
    embedded = _token_inputs_opt(model, tokens)
    # OPT's table of positions has two rows in front; the module adds that offset itself.
    return embedded + decoder.embed_positions(None, position_ids=positions[None])[0]


def _unembed_input_opt(model: PreTrainedModel, residual: Tensor) -> Tensor:
    decoder = cast(Any, model).model.decoder
    if decoder.final_layer_norm is not None:
        residual = decoder.final_layer_norm(residual)
    if decoder.project_out is not None:
        residual = decoder.project_out(residual)
    return residual


FAMILIES = {
    "opt": Family(
        model_type="opt",
        attention_output="self_attn.out_proj",
        attention_value="self_attn.v_proj",
        ffn_output="fc2",
        shared_inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        embed=_embed_opt,
        unembed_input=_unembed_input_opt,
        token_inputs=_token_inputs_opt,
        token_outputs=_token_outputs_opt,
        final_norm=_final_norm_opt,
        adds_bos=False,
    )
}


def family_of(model_type: str) -> Family:
    """Return the family's row; raise InputError for an architecture that has none."""
    if model_type not in FAMILIES:
        raise InputError(
            f"model type '{model_type}' is not supported: expected one of {', '.join(sorted(FAMILIES))}; "
            "give an OPT checkpoint"
        )
    return FAMILIES[model_type]


class Skeleton:
    """A causal language model without weights: sizes, module names and empty layers.

    All parameters are on the meta device; `empty_layer` gives a decoder layer that a store then fills.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.family = family_of(config.model_type)
        sizes = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        self.layers: int = sizes.num_layers
        self._layers_field: str = sizes.NUM_LAYERS
        self.heads: int = sizes.num_attention_heads
        self.width: int = sizes.hidden_size
        self.vocabulary: int = sizes.vocab_size
        self.context_tokens: int = config.max_position_embeddings
        if self.width % self.heads:
            raise InputError(f"config.json: hidden size {self.width} is not a multiple of {self.heads} heads")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Skeleton":
        """Build from the content of a config.json; raise InputError where it names no supported model."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise InputError(
                "config.json: expected a field 'model_type'; give a Hugging Face checkpoint folder"
            )
        family_of(model_type)
        fields = {name: value for name, value in config.items() if name != "model_type"}
        return cls(AutoConfig.for_model(model_type, **fields))

    @property
    def head_width(self) -> int:
        """Width of one head's output."""
        return self.width // self.heads

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device, in evaluation mode, with one decoder layer like all others."""
        config = copy.deepcopy(self.config)
        setattr(config, self._layers_field, 1)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        model.tie_weights()
        return model.eval()

    @cached_property
    def blocks_name(self) -> str:
        """Dotted name of the module list that holds the decoder layers."""
        return get_block_name_with_pattern(self.model)

    def empty_layer(self) -> nn.Module:
        """Return a new decoder layer on the meta device, in evaluation mode."""
        return copy.deepcopy(self._plain_layer).eval()

    @cached_property
    def _plain_layer(self) -> nn.Module:
        return cast(nn.ModuleList, self.model.get_submodule(self.blocks_name))[0]

    def layer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of a layer's parameters, relative to the layer."""
        return {name: tuple(value.shape) for name, value in self._plain_layer.named_parameters()}

    def linear_names(self) -> list[str]:
        """Return the names of a layer's linear modules, relative to the layer."""
        return [name for name, module in self._plain_layer.named_modules() if isinstance(module, nn.Linear)]

    @cached_property
    def weights_by_part(self) -> tuple[int, int, int]:
        """How many weights of a layer each token meets: in the attention's inputs, its output, the FFN."""
        shapes = self.layer_parameters()
        sizes = {name: math.prod(shapes[f"{name}.weight"]) for name in self.linear_names()}
        attention = sum(sizes[name] for name in self.family.shared_inputs)
        projection = sizes[self.family.attention_output]
        return attention, projection, sum(sizes.values()) - attention - projection

    @cached_property
    def embedding_width(self) -> int:
        """Width of a row of the unembedding."""
        return int(cast(Any, self.model).get_output_embeddings().weight.shape[1])

    def fill_non_layer(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Fill the parameters outside the layers; from then on `model` can embed and unembed."""
        for name, tensor in tensors.items():
            # The vocabulary tables keep the source's precision, the rest is small and computes in float32.
            value = tensor if tensor.shape[0] == self.vocabulary else tensor.float()
            set_module_tensor_to_device(self.model, name, device, value=value, dtype=value.dtype)
        self.model.tie_weights()

    def non_layer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of all parameters outside the layers; a tied unembedding only once."""
        return {
            name: tuple(value.shape)
            for name, value in self.model.named_parameters()
            if not name.startswith(self.blocks_name + ".")
        }
