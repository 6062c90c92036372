"""From a checkpoint's tensors to those of a model without some units, one at a time.

Weights are [outputs, inputs] here, also where a checkpoint has them the other way round. Axis letters: H
query heads, G heads of keys and values, d head width, Z = H · d, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.conversion.checkpoint import Checkpoint
from lowmem_icl.errors import InputError
from lowmem_icl.export.structure import LayerFacts, LayerRecipe
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.skeleton import Skeleton


@dataclass(frozen=True)
class Made:
    """A parameter of a new layer: what it is called there, and the source that it is made of."""

    name: str
    source: str
    recipe: LayerRecipe
    short: str


@dataclass(frozen=True, eq=False)
class LayerTensors:
    """The layers of a checkpoint, and what a mask puts in place of units."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    means: UnitMeans | None = None

    @cached_property
    def facts(self) -> LayerFacts:
        """What the family and the config say about taking layers apart."""
        skeleton, family, config = self.skeleton, self.skeleton.family, self.skeleton.config
        return LayerFacts(
            layers=skeleton.layers,
            heads=skeleton.heads,
            groups=self.groups,
            parallel=family.parallel(config),
            hands_on=family.hands_on(config),
            biased=(self._has(f"{family.attention_output}.bias"), self._has(f"{family.ffn_output}.bias")),
            normed=family.attention_norm is not None,
        )

    @cached_property
    def groups(self) -> int:
        """Heads of keys and values, G; as many as heads where a model cannot have fewer."""
        config, skeleton = self.skeleton.config, self.skeleton
        if not skeleton.family.free_head_width:
            return skeleton.heads
        return int(getattr(config, "num_key_value_heads", None) or skeleton.heads)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.skeleton.layer_parameters()

    def _has(self, short: str) -> bool:
        return short in self._shapes

    def stored_name(self, layer: int, short: str) -> str:
        """Return what the checkpoint calls a layer's parameter."""
        return self.checkpoint.source_name(f"{self.skeleton.blocks_name}.{layer}.{short}")

    def read(self, layer: int, short: str) -> Tensor:
        """Return a layer's parameter, weights as [outputs, inputs]; raise InputError for another shape."""
        name = self.stored_name(layer, short)
        tensor = self._turned(short, self.checkpoint.tensor(name))
        if tuple(tensor.shape) != self._shapes[short] or not tensor.is_floating_point():
            raise InputError(
                f"{self.checkpoint.folder}: parameter '{name}': expected floating point of shape "
                f"{list(self._shapes[short])}, got {tensor.dtype} {list(tensor.shape)}; config.json and "
                "weights do not belong together"
            )
        return tensor

    def _turned(self, short: str, tensor: Tensor) -> Tensor:
        return tensor.t() if short in self.skeleton.transposed_weights else tensor

    def leaves_bias(self, layer: int) -> bool:
        """Tell whether a layer's attention still adds something when all its heads are gone."""
        return self.facts.biased[0] and bool((self.read(layer, self._attention_bias) != 0).any())

    @property
    def _attention_bias(self) -> str:
        return f"{self.skeleton.family.attention_output}.bias"

    def check_means(self, mask: Mask) -> None:
        """Raise InputError where there is no bias that could hold what a mask puts in place of units."""
        family = self.skeleton.family
        if self.means is None:
            return
        lacks = [
            kind
            for kind, units, biased in (
                ("heads", mask.heads, self.facts.biased[0]),
                ("FFNs", mask.ffns, self.facts.biased[1] and family.ffn_norm is None),
            )
            if units and not biased
        ]
        if lacks:
            raise InputError(
                f"mask: its means of {' and '.join(lacks)} would have to become a bias, which "
                f"{self.skeleton.config.model_type} has none of here; use the mask on the model as it is "
                "(docs/masks-elsewhere.md), or export one of ablation zero"
            )

    def made(self, recipes: Sequence[LayerRecipe]) -> Iterator[Made]:
        """Yield every parameter of new layers with its source."""
        family = self.skeleton.family
        for number, recipe in enumerate(recipes):
            for short in self._shapes:
                of_ffn = any(short == part or short.startswith(f"{part}.") for part in family.ffn_parts)
                layer = recipe.ffn if of_ffn else recipe.attention
                source = self.stored_name(layer, short)
                front = source.removesuffix(f".{layer}.{short}")
                yield Made(f"{front}.{number}.{short}", source, recipe, short)

    def tensor(self, made: Made) -> Tensor:
        """Return a new layer's parameter in the source's form and precision."""
        family, recipe, short = self.skeleton.family, made.recipe, made.short
        owner, _, kind = short.rpartition(".")
        if owner == family.attention_output:
            tensor = self._output_weight(recipe) if kind == "weight" else self._output_bias(recipe)
        elif owner == family.ffn_output:
            tensor = self._ffn_weight(recipe) if kind == "weight" else self._ffn_bias(recipe)
        elif owner in family.attention_inputs:
            tensor = self._input(recipe, short)
        else:
            return self.checkpoint.tensor(made.source)
        return self._turned(short, tensor).contiguous()

    def _columns(self, heads: Sequence[int]) -> NDArray[np.int64]:
        """Return which of the heads' outputs side by side are those of some heads."""
        width = self.skeleton.head_width
        starts = np.array(heads, dtype=np.int64) * width
        return (starts[:, None] + np.arange(width)).flatten()

    def _output_weight(self, recipe: LayerRecipe) -> Tensor:
        weight = self.read(recipe.attention, f"{self.skeleton.family.attention_output}.weight")
        weight = weight[:, self._columns(recipe.slots.heads)].clone()
        dead = [slot for slot, head in enumerate(recipe.slots.heads) if head not in recipe.slots.live]
        weight[:, self._columns(dead)] = 0
        return weight

    def _output_bias(self, recipe: LayerRecipe) -> Tensor:
        bias = self.read(recipe.attention, self._attention_bias)
        total = bias.double() if recipe.keeps_bias else torch.zeros_like(bias, dtype=torch.float64)
        dead = [head for head in recipe.slots.heads if head not in recipe.slots.live]
        if self.means is not None and dead:
            columns = self._columns(dead)
            weight = self.read(recipe.attention, f"{self.skeleton.family.attention_output}.weight")
            total += (
                weight[:, columns].double()
                @ torch.from_numpy(self.means.heads[recipe.attention][columns]).double()
            )
        return self._with_biases(total, recipe.attention_adds).to(bias.dtype)

    def _ffn_weight(self, recipe: LayerRecipe) -> Tensor:
        weight = self.read(recipe.ffn, f"{self.skeleton.family.ffn_output}.weight")
        return weight if recipe.has_ffn else torch.zeros_like(weight)

    def _ffn_bias(self, recipe: LayerRecipe) -> Tensor:
        bias = self.read(recipe.ffn, f"{self.skeleton.family.ffn_output}.bias")
        total = bias.double() if recipe.has_ffn else torch.zeros_like(bias, dtype=torch.float64)
        if self.means is not None and not recipe.has_ffn:
            total = torch.from_numpy(self.means.ffns[recipe.ffn]).double()
        return self._with_biases(total, recipe.ffn_adds).to(bias.dtype)

    def _with_biases(self, total: Tensor, layers: Sequence[int]) -> Tensor:
        for layer in layers:
            total = total + self.read(layer, self._attention_bias).double()
        return total

    def _input(self, recipe: LayerRecipe, short: str) -> Tensor:
        """Return a projection to queries, keys or values, or all of them, with the rows of chosen heads."""
        family, slots = self.skeleton.family, recipe.slots
        tensor = self.read(recipe.attention, short)
        if slots.heads == tuple(range(self.skeleton.heads)):
            return tensor
        queries, others = self._columns(slots.heads), self._columns(slots.groups)
        if family.fused is not None:
            assert family.fused.stacked, "all queries, then all keys, then all values"
            keys = self.skeleton.heads * self.skeleton.head_width
            values = keys + self.groups * self.skeleton.head_width
            return tensor[np.concatenate([queries, keys + others, values + others])]
        is_queries = short.startswith(f"{family.attention_inputs[0]}.")
        return tensor[queries if is_queries else others]
