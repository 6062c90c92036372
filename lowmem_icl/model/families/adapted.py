"""Attention modules of transformers that do not ask its interface for an attention function, made to ask.

Their projections, splits and rotations stay transformers' own; only the product of queries, keys and values
is ours. Axis letters: K keys, H heads.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from lowmem_icl.model.attention import RowAttention, attend_by_row


@cache
def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Return the slope of every head's linear bias, [H] (Press et al. 2022, ALiBi; their code for head counts
    that are no power of two).
    """
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / whole) for head in range(whole)]
    # The heads left over take every other slope of twice as many.
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / whole) for head in range(heads - whole)]
    return torch.tensor(slopes, device=device)


class BloomRowAttention(BloomAttention):  # type: ignore[misc]
    """BLOOM's attention by rows; its output has the residual added, as the layer expects."""

    def key_bias(self, positions: Tensor) -> Tensor:
        """Return what is added to the products with keys at these positions, [H, K]."""
        return alibi_slopes(self.num_heads, positions.device)[:, None] * positions

    def forward(
        self, hidden_states: Tensor, residual: Tensor, *, attention_mask: RowAttention, **_: Any
    ) -> tuple[Tensor, None]:
        """Return the residual with the attention's output added, [1, N, D]."""
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        z = attend_by_row(
            self, query, key, value, attention_mask, scaling=self.inv_norm_factor, key_bias=self.key_bias
        )[0]
        return residual + self.dense(z.flatten(2)), None


class FalconRowAttention(FalconAttention):  # type: ignore[misc]
    """Falcon's attention by rows, with rotary angles or linear biases."""

    def key_bias(self, positions: Tensor) -> Tensor:
        """Return what is added to the products with keys at these positions, [H, K].

        Rounded to bfloat16 and scaled like the products, as in the model.
        """
        slopes = alibi_slopes(self.num_heads, positions.device).bfloat16()[:, None]
        return (slopes * positions).float() * self.inv_norm_factor

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: RowAttention,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Return the attention's output, [1, N, D]."""
        query, key, value = (
            states.transpose(1, 2) for states in self._split_heads(self.query_key_value(hidden_states))
        )
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        z = attend_by_row(
            self, query, key, value, attention_mask, scaling=self.inv_norm_factor,
            key_bias=self.key_bias if position_embeddings is None else None,
        )[0]  # fmt: skip
        return self.dense(z.flatten(2)), None


def adapt_bloom(layer: nn.Module, config: PretrainedConfig) -> None:
    """Make a BLOOM layer attend by rows."""
    layer.get_submodule("self_attention").__class__ = BloomRowAttention


def adapt_falcon(layer: nn.Module, config: PretrainedConfig) -> None:
    """Make a Falcon layer attend by rows."""
    layer.get_submodule("self_attention").__class__ = FalconRowAttention
