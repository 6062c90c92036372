"""Attention of many short branches that grow from one stem: one product with the stem's keys for all of them.

What a branch gets does not depend on how many others there are, nor on its place among them: products have
one size, and a branch's own keys always stand behind the stem's.

Axis letters: V variants, T tokens of a branch, P of the stem, filled up, C variants in one product, H query
heads, G heads of keys and values, E query heads per such head, d head width.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

BRANCH_TOKENS = 64
LONG_BRANCH = 8
STEM_MULTIPLE = 16
"""Rows of products begin on full vectors: MKL's differ in the last bit between aligned and unaligned ones."""


def attend_branches(
    states: tuple[Tensor, Tensor, Tensor],
    stem: tuple[Tensor, Tensor],
    seen: Tensor,
    scaled: tuple[float, float | None],
) -> Tensor:
    """Return the output of every branch, [V, T, H, d].

    states: queries [V, H, T, d], keys and values [V, G, T, d]; stem: its keys and values [G, P, d]; seen:
    what is added to the products with stem and own keys, [T, P + T], or [H, T, P + T] by query head; scaled:
    what products are multiplied with before that, and the cap that tanh puts on them, if any.
    """
    queries, keys, values = states
    variants, heads, tokens, _ = queries.shape
    groups, stem_tokens = stem[0].shape[:2]
    missing = -stem_tokens % STEM_MULTIPLE
    stem_keys, stem_values = (pad(part, (0, 0, 0, missing)) for part in stem)
    unseen = seen.new_full((*seen.shape[:-1], missing), float("-inf"))
    added = torch.cat([seen[..., :stem_tokens], unseen, seen[..., stem_tokens:]], -1)
    if added.dim() == 3:
        added = added.unflatten(0, (groups, heads // groups))[:, :, None]
    together = max(1, BRANCH_TOKENS // tokens)
    out = queries.new_empty(variants, tokens, heads, queries.shape[-1])
    for first in range(0, variants, together):
        part = slice(first, min(first + together, variants))
        filling = (0, 0) * 3 + (0, together - (part.stop - first))
        q, k, v = (pad(x[part], filling) for x in (queries, keys, values))
        z = _attended(q, (k, v), (stem_keys, stem_values), added, scaled)
        out[part] = z[: part.stop - first]
    return out


def _attended(
    queries: Tensor,
    own: tuple[Tensor, Tensor],
    stem: tuple[Tensor, Tensor],
    added: Tensor,
    scaled: tuple[float, float | None],
) -> Tensor:
    """Return the output [C, T, H, d] of a full set of branches; added: [T, P + T] or [G, E, 1, T, P + T]."""
    groups, stem_tokens, width = stem[0].shape
    # [G, E, C, T, d]: all that is multiplied with the keys of a group stands together.
    q = queries.unflatten(1, (groups, -1)).permute(1, 2, 0, 3, 4).contiguous()
    keys, values = (part.transpose(0, 1)[:, None, :, None] for part in own)
    with_stem = (q.view(groups, -1, width) @ stem[0].transpose(1, 2)).view(*q.shape[:-1], stem_tokens)
    # Of long branches the product of every pair of tokens would be larger than all else.
    is_long = q.shape[3] > LONG_BRANCH
    with_own = q @ own[0].transpose(0, 1)[:, None].mT if is_long else (q.unsqueeze(-2) * keys).sum(-1)
    scaling, softcap = scaled
    products = torch.cat([with_stem, with_own], -1) * scaling
    if softcap is not None:
        products = (products / softcap).tanh() * softcap
    weights = (products + added).softmax(-1)
    of_stem = weights[..., :stem_tokens].reshape(groups, -1, stem_tokens) @ stem[1]
    own_weights = weights[..., stem_tokens:]
    if is_long:
        of_own = own_weights @ own[1].transpose(0, 1)[:, None]
    else:
        of_own = (own_weights.unsqueeze(-1) * values).sum(-2)
    return (of_stem.view(q.shape) + of_own).permute(2, 3, 0, 1, 4).flatten(2, 3)
