"""A model without weights: its sizes, its empty layers, and what is not in a layer.

Sizes come from optimum where it knows the architecture; the layers themselves are Hugging Face's, built empty
by accelerate.
"""

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from optimum.utils import NormalizedConfigManager, NormalizedTextConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem_icl.errors import InputError
from lowmem_icl.masks.mask import MOST_HEADS
from lowmem_icl.model.families.catalogue import family_of
from lowmem_icl.model.families.family import LogitForm, NormForm, module_at

# What lm-eval assumes where a config names no length: models whose positions are biases have none.
DEFAULT_CONTEXT_TOKENS = 2048
# Rotary angles of these depend on the length of the sequence, beyond what the model was first trained on.
LENGTH_DEPENDENT = ("dynamic", "longrope")
# Lists of a config with one entry per layer: layers that agree in all of them are of one kind.
FIELDS_BY_LAYER = ("layer_types", "no_rope_layers")

MOST = {"layers": 10_000, "heads": 10_000, "width": 1_000_000, "vocabulary": 100_000_000}
"""Of a model; more than any has, and few enough to count up to."""
LARGE_ELEMENTS = 1 << 20
"""Of a tensor that is a weight; what is made beside them, such as GPT-J's table of positions, is smaller."""
LONGEST_REASON = 300
"""Characters of another library's message that ours repeats."""


class Skeleton:
    """A causal language model without weights: sizes, module names and empty layers.

    All parameters are on the meta device; `empty_layers` gives decoder layers that a store then fills.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.family = family_of(config.model_type)
        for name, harmless in self.family.refused.items():
            if (value := getattr(config, name, harmless)) not in (harmless, None):
                raise InputError(f"config.json: '{name}' = {value!r} is not supported; expected {harmless!r}")
        sizes = _sizes(config)
        self.layers: int = sizes.num_layers
        self.layers_field: str = sizes.NUM_LAYERS
        self.heads: int = sizes.num_attention_heads
        self.width: int = sizes.hidden_size
        self.vocabulary: int = sizes.vocab_size
        _check_sizes(self)
        self.context_tokens = _context_tokens(config)
        self.logit_form = LogitForm.of(config)
        if self.width % self.heads and not getattr(config, "head_dim", None):
            raise InputError(f"config.json: hidden size {self.width} is not a multiple of {self.heads} heads")

    @property
    def size(self) -> tuple[int, int]:
        """Layers and width."""
        return self.layers, self.width

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Skeleton":
        """Build from the content of a config.json; raise InputError where it names no supported model."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise InputError(
                "config.json: expected a field 'model_type'; give a Hugging Face checkpoint folder"
            )
        family_of(model_type, config)
        if config.get("quantization_config"):
            raise InputError(
                "config.json: the checkpoint is quantised ('quantization_config'), and its scales would be "
                "lost; give the checkpoint that it was made from, or a GGUF file"
            )
        fields = {name: value for name, value in config.items() if name != "model_type"}
        try:
            skeleton = cls(AutoConfig.for_model(model_type, **fields))
            _ = skeleton.model
        except InputError:
            raise
        except Exception as error:
            # transformers' and torch's own checks of a stranger's fields raise anything.
            reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
            raise InputError(
                f"config.json: no model of type '{model_type}' can be made of it ({reason}); "
                "fetch the file again"
            ) from error
        return skeleton

    @cached_property
    def kind_of_layer(self) -> tuple[int, ...]:
        """The kind of every layer: layers of one kind differ in nothing but their weights."""
        kinds: dict[tuple[Any, ...], int] = {}
        return tuple(kinds.setdefault(self._differences(layer), len(kinds)) for layer in range(self.layers))

    @cached_property
    def _first_of_kind(self) -> list[int]:
        return [self.kind_of_layer.index(kind) for kind in range(max(self.kind_of_layer) + 1)]

    def _differences(self, layer: int) -> tuple[Any, ...]:
        lists = (getattr(self.config, name, None) for name in FIELDS_BY_LAYER)
        return tuple(values[layer] for values in lists if values)

    def layer_type(self, kind: int) -> str | None:
        """Return what the config calls a kind of layers, where it has a name for them."""
        types = getattr(self.config, "layer_types", None)
        return types[self._first_of_kind[kind]] if types else None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device, in evaluation mode, with as many layers as show every kind."""
        config = copy.deepcopy(self.config)
        shown = self._first_of_kind[-1] + 1
        for name in FIELDS_BY_LAYER:
            if values := getattr(config, name, None):
                setattr(config, name, values[:shown])
        setattr(config, self.layers_field, shown)
        with init_empty_weights(), _LargeTensorsEmpty():
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        model.tie_weights()
        return model.eval()

    @cached_property
    def blocks_name(self) -> str:
        """Dotted name of the module list that holds the decoder layers."""
        # Lists inside a layer, of experts for one, come after the list that holds it.
        return next(name for name, part in self.model.named_modules() if isinstance(part, nn.ModuleList))

    def empty_layers(self) -> list[nn.Module]:
        """Return a new decoder layer of every kind, on the meta device, in evaluation mode."""
        return [copy.deepcopy(layer).eval() for layer in self._plain_layers]

    @cached_property
    def _plain_layers(self) -> list[nn.Module]:
        blocks = cast(nn.ModuleList, self.model.get_submodule(self.blocks_name))
        layers = [blocks[number] for number in self._first_of_kind]
        for layer in layers:
            for name in self.transposed_weights:
                owner, leaf = _owner(layer, name.removesuffix(".weight"))
                outputs, inputs = tuple(reversed(getattr(owner, leaf).weight.shape))
                setattr(owner, leaf, nn.Linear(inputs, outputs, device="meta"))
            if self.family.adapt is not None:
                self.family.adapt(layer, self.config)
        return layers

    @cached_property
    def transposed_weights(self) -> frozenset[str]:
        """Weights of a layer that a checkpoint stores as [inputs, outputs] (GPT-2's Conv1D)."""
        first = cast(nn.ModuleList, self.model.get_submodule(self.blocks_name))[0]
        return frozenset(
            f"{name}.weight" for name, module in first.named_modules() if isinstance(module, Conv1D)
        )

    def layer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of a layer's parameters, relative to the layer."""
        return {name: tuple(value.shape) for name, value in self._plain_layers[0].named_parameters()}

    def linear_names(self) -> list[str]:
        """Return the names of a layer's linear modules, relative to the layer."""
        modules = self._plain_layers[0].named_modules()
        return [name for name, module in modules if isinstance(module, nn.Linear)]

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of a layer's linears, [outputs, inputs], by the linear's name."""
        shapes = self.layer_parameters()
        return {name: shapes[f"{name}.weight"] for name in self.linear_names()}

    @cached_property
    def weights_by_part(self) -> tuple[int, int, int]:
        """How many weights of a layer each token meets: in the attention's inputs, its output, the FFN."""
        sizes = {name: math.prod(shape) for name, shape in self.linear_shapes.items()}
        attention = sum(sizes[name] for name in self.family.attention_inputs)
        projection = sizes[self.family.attention_output]
        return attention, projection, sum(sizes.values()) - attention - projection

    @cached_property
    def attention_width(self) -> int:
        """Width of z, the heads' outputs side by side, [H · d]; need not be the model's."""
        return self.linear_shapes[self.family.attention_output][1]

    @property
    def head_width(self) -> int:
        """Width of one head's output, d."""
        return self.attention_width // self.heads

    @cached_property
    def ffn_width(self) -> int:
        """Outputs of the FFN's first linears together: twice as many where they are gated."""
        return sum(self.linear_shapes[name][0] for name in self.family.ffn_inputs)

    @cached_property
    def embedding_width(self) -> int:
        """Width of a row of the unembedding."""
        return int(cast(Any, self.model).get_output_embeddings().weight.shape[1])

    @property
    def rotary(self) -> nn.Module | None:
        """The module that computes the angles of positions; None where positions enter otherwise."""
        uses_biases = getattr(self.config, "alibi", False)
        return (
            None if self.family.rotary is None or uses_biases else module_at(self.model, self.family.rotary)
        )

    @property
    def attention_products(self) -> int:
        """How many tensors of queries by keys and heads, [H, Q, K], attention makes besides torch's own.

        Where products are capped it is computed step by step; linear biases make a mask by head.
        """
        if getattr(self.config, "attn_logit_softcapping", None):
            return 4
        return int("alibi" in self.family.layer_arguments and self.rotary is None)

    def final_norm(self) -> NormForm | None:
        """Return the filled norm before the unembedding; None where the model has none."""
        norm = module_at(self.model, self.family.final_norm)
        return None if norm is None else NormForm.of(norm, plus_one=self.family.normed_plus_one)

    @property
    def last_norms(self) -> list[nn.Module]:
        """The norm before the unembedding, if there is one."""
        norm = module_at(self.model, self.family.final_norm)
        return [] if norm is None else [norm]

    def before_head(self, residual: Tensor) -> Tensor:
        """Return what multiplies the unembedding, [M, E], for residuals after the last layer [M, D]."""
        norm = module_at(self.model, self.family.final_norm)
        return self.family.before_head(self.model, residual if norm is None else norm(residual))

    @cached_property
    def embedding_name(self) -> str:
        """The parameter whose rows are the tokens' embeddings."""
        return self._name_of(cast(Any, self.model).get_input_embeddings().weight)

    @cached_property
    def unembedding_name(self) -> str:
        """The parameter whose rows read tokens' logits; the embedding's where both are tied."""
        return self._name_of(cast(Any, self.model).get_output_embeddings().weight)

    def _name_of(self, wanted: Tensor) -> str:
        return next(name for name, value in self.model.named_parameters() if value is wanted)

    def fill_non_layer(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Fill the parameters outside the layers and the vocabulary's tables, in float32."""
        for name, tensor in tensors.items():
            set_module_tensor_to_device(self.model, name, device, value=tensor.float(), dtype=torch.float32)

    def non_layer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of all parameters outside the layers; a tied unembedding only once."""
        return {
            name: tuple(value.shape)
            for name, value in self.model.named_parameters()
            if not name.startswith(self.blocks_name + ".")
        }


class _LargeTensorsEmpty(TorchFunctionMode):
    """Makes large parameters without their memory from the start: else it is asked for before it is given
    back, and a stranger's config can ask for any amount.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is torch.empty and args and named.get("device") is None:
            size = args if isinstance(args[0], int) else args[0]
            if torch.Size(size).numel() > LARGE_ELEMENTS:
                named = {**named, "device": "meta"}
        if func is torch.arange and any(isinstance(end, int) and end > LARGE_ELEMENTS for end in args):
            raise ValueError(f"a table of more than {LARGE_ELEMENTS:,} positions")
        return func(*args, **named)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a part of this dotted name as its child, and the child's own name."""
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def _check_sizes(skeleton: Skeleton) -> None:
    """Raise InputError for a size that no model has: counting up to it would take for ever."""
    for name, most in MOST.items():
        value = getattr(skeleton, name)
        if type(value) is not int or not 1 <= value <= most:
            shown = str(value)[:LONGEST_REASON]
            raise InputError(
                f"config.json: expected {name} from 1 to {most:,}, got {shown}; fetch the file again"
            )
    if skeleton.layers * skeleton.heads > MOST_HEADS:
        raise InputError(
            f"config.json: expected at most {MOST_HEADS:,} heads in all layers, got {skeleton.layers} times "
            f"{skeleton.heads}; fetch the file again"
        )


def _sizes(config: PretrainedConfig) -> Any:
    """Return optimum's view of a config's sizes; by transformers' own names where optimum knows none."""
    try:
        return NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:
        return NormalizedTextConfig(config)


def _context_tokens(config: PretrainedConfig) -> int:
    """Return how many positions a model has, as far as angles do not depend on the sequence's length."""
    positions = int(getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT_TOKENS)
    rotary = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one by type of layer.
    sets = [value for value in rotary.values() if isinstance(value, dict)] or [rotary]
    originals = [
        parameters.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or positions
        for parameters in sets
        if parameters.get("rope_type") in LENGTH_DEPENDENT
    ]
    return min([positions, *map(int, originals)])
