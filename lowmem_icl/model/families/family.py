"""What a family says of its architecture, and the forms that most of them share.

Axis letters: T tokens, C ids, M rows of hidden states, D width, E width of a row of the vocabulary's tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

Embed = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]
ThroughEnd = Callable[[PreTrainedModel, Tensor], Tensor]
OfConfig = Callable[[PretrainedConfig], bool]


def scaled_rows(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Return rows of the embedding [C, E] as tokens put them into the residual: times a scale, if there is
    one.
    """
    module = model.get_input_embeddings()
    # Gemma's embedding multiplies by itself, in the model's own precision: here always float32.
    scale = getattr(module, "scalar_embed_scale", None) or getattr(model.config, "embedding_multiplier", None)
    return rows if scale is None else rows * float(scale)


def embed_rows(model: PreTrainedModel, rows: Tensor, positions: Tensor) -> Tensor:
    """Return the residual of tokens whose positions enter inside the layers."""
    return scaled_rows(model, rows)


def unchanged(model: PreTrainedModel, values: Tensor) -> Tensor:
    """Return the values as they are."""
    return values


def always(config: PretrainedConfig) -> bool:
    """Return True, whatever a config says."""
    return True


def never(config: PretrainedConfig) -> bool:
    """Return False, whatever a config says."""
    return False


@dataclass(frozen=True)
class FusedProjection:
    """How a fused projection's rows are dealt out: by `groups` of query heads and their one key and value.

    `stacked`: all queries, then all keys, then all values; else every group has its queries, its key and its
    value together.
    """

    stacked: bool
    groups: Callable[[PretrainedConfig], int]

    def value_rows(self, rows: int, config: PretrainedConfig, head_width: int) -> list[int]:
        """Return which rows of a projection with so many give the values, group by group."""
        groups = self.groups(config)
        if self.stacked:
            return list(range(rows - groups * head_width, rows))
        size = rows // groups
        return [group * size + row for group in range(groups) for row in range(size - head_width, size)]


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps the parts that are cut, captured or run outside the layers.

    Names of layer parts are relative to a decoder layer. `attention_inputs` and `ffn_inputs` are linears fed
    by one and the same tensor, so that it is quantised once; the last of the former gives the values, or all
    three where it is `fused`. `attention_norm`, `ffn_norm`: norms of what attention and FFN write, before it
    reaches the residual. `layer_arguments`: what a layer must be called with besides residual, mask and
    angles.

    Names outside the layers are the model's. `rotary` computes the angles that layers take as
    `position_embeddings`; `final_norm` stands before the unembedding. `token_inputs` maps (model, rows of the
    embedding [C, E]) to what tokens put into the residual, [C, D]; `embed` (model, rows [T, E], positions
    [T]) to the residual, positions included; `before_head` (model, normed residual [M, D]) to what multiplies
    the unembedding, [M, E]; `token_outputs` (model, rows of the unembedding [C, E]) to what reads their
    logits off the normed residual, [C, D]. All in float32.

    `adds_bos`: None, as the model's own tokenizer does. `adapt` changes an empty layer whose attention is not
    called through transformers' interface. `normed_plus_one`: norms multiply by 1 + weight.
    """

    attention_inputs: tuple[str, ...]
    attention_output: str
    ffn_inputs: tuple[str, ...]
    ffn_output: str
    final_norm: str
    fused: FusedProjection | None = None
    attention_norm: str | None = None
    ffn_norm: str | None = None
    normed_plus_one: bool = False
    rotary: str | None = None
    layer_arguments: Mapping[str, Any] = field(default_factory=dict)
    token_inputs: ThroughEnd = scaled_rows
    embed: Embed = embed_rows
    before_head: ThroughEnd = unchanged
    token_outputs: ThroughEnd = unchanged
    adapt: Callable[[nn.Module, PretrainedConfig], None] | None = None
    adds_bos: bool | None = None
    blocks: str = "model.layers"
    """Where a causal model has its decoder layers; without its head it has them under the same name less the
    first part."""
    ffn_parts: tuple[str, ...] = ()
    """Parts of a layer that belong to its FFN, the norms in front and behind included."""
    parallel: OfConfig = never
    """Whether both halves of a layer read what enters it, so that neither stands without the other."""
    hands_on: OfConfig = always
    """Whether the residual passes through a layer without heads and FFN as it is."""
    scales_written: bool = False
    """Whether what attention and FFN write is multiplied by a number of the config before it is added."""
    free_head_width: bool = False
    """Whether a config may name a width of heads that is not the model's divided by their number, and no norm
    spans several heads: then a model can have fewer heads."""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """What checkpoints call a parameter outside the layers where transformers has renamed it since."""
    refused: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a config that change what layers do in a way that is not implemented, and their harmless
    value."""


@dataclass(frozen=True)
class LogitForm:
    """What happens between the unembedding's product and the logits: h · scale, then cap · tanh(h / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LogitForm":
        """Read the fields of a config that change logits."""
        divided_by = getattr(config, "logits_scaling", None)
        return cls(
            scale=1.0 / divided_by if divided_by else float(getattr(config, "logit_scale", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
        )


@dataclass(frozen=True, eq=False)
class NormForm:
    """A norm as numbers: (x − its mean, if `centred`) / deviation · scale + shift, [D] each."""

    scale: Tensor
    shift: Tensor | None
    epsilon: float
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, *, plus_one: bool) -> "NormForm":
        """Read a layer norm or an RMS norm."""
        given: Any = norm
        epsilon = getattr(given, "eps", None)
        weight = given.weight.detach().float()
        bias = getattr(given, "bias", None)
        return cls(
            scale=weight + 1.0 if plus_one else weight,
            shift=None if bias is None else bias.detach().float(),
            epsilon=float(given.variance_epsilon if epsilon is None else epsilon),
            centred=isinstance(norm, nn.LayerNorm),
        )


def module_at(model: nn.Module, name: str) -> Any:
    """Return a module by its dotted name; None where the model has nothing there."""
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
