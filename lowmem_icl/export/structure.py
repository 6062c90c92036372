"""What is left of a model's layers under a mask: every half that still does something, packed into layers.

A layer adds what its attention writes to the residual, then what its FFN writes. A half without units adds
nothing, or the bias of its projection, and the halves that stay are packed anew: an attention and the next
FFN make a layer.

Axis letters: H query heads, G heads of keys and values.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lowmem_icl.masks.mask import Mask


@dataclass(frozen=True)
class HeadSlots:
    """Which heads of a layer's source stand where: `groups` of keys and values in order, and all their query
    heads; of those that are not `live` the output projection's columns are zeros.
    """

    groups: tuple[int, ...]
    heads: tuple[int, ...]
    live: frozenset[int]


@dataclass(frozen=True)
class LayerRecipe:
    """How a layer is made of others: whose attention it has, and whose FFN.

    `slots`: its heads. `has_ffn`: else its FFN's last linear is zeros. `keeps_bias`: else the bias of its
    attention's output projection is zeros. `attention_adds`, `ffn_adds`: layers that are gone and whose bias
    there is added to the attention's, or to the FFN's.
    """

    attention: int
    ffn: int
    slots: HeadSlots
    has_ffn: bool
    keeps_bias: bool = True
    attention_adds: tuple[int, ...] = ()
    ffn_adds: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerFacts:
    """What a family and a config say about taking layers apart.

    `parallel`: both halves read the layer's input. `hands_on`: a layer without units changes nothing.
    `biased`: whether what attention and FFN write has a bias of its own; `normed`: whether it is normed
    before it is added.
    """

    layers: int
    heads: int
    groups: int
    parallel: bool
    hands_on: bool
    biased: tuple[bool, bool]
    normed: bool


@dataclass
class _Half:
    is_ffn: bool
    layer: int
    adds: list[int] = field(default_factory=list)


def all_slots(facts: LayerFacts, mask: Mask, layer: int) -> HeadSlots:
    """Return all heads where they are, those that a mask removes not live."""
    heads = tuple(range(facts.heads))
    return HeadSlots(tuple(range(facts.groups)), heads, frozenset(heads) - set(mask.heads_in(layer)))


def zeroed_layers(mask: Mask, facts: LayerFacts) -> list[LayerRecipe]:
    """Return every layer as it is, with zeros where a mask removes units."""
    return [
        LayerRecipe(layer, layer, all_slots(facts, mask, layer), layer not in mask.ffns)
        for layer in range(facts.layers)
    ]


def packed_layers(mask: Mask, facts: LayerFacts, leaves_bias: Callable[[int], bool]) -> list[LayerRecipe]:
    """Return the layers that are left under a mask, each with all its heads' slots; at least one.

    `leaves_bias` tells whether the bias of a layer's attention is other than zeros: it stays when all heads
    are gone, and goes into the bias of what stands before it.
    """
    if not facts.hands_on:
        return zeroed_layers(mask, facts)
    if facts.parallel:
        return _whole_layers(mask, facts, leaves_bias)
    halves = list(_halves(mask, facts, leaves_bias))
    return list(_paired(halves, mask, facts)) or zeroed_layers(mask, facts)[:1]


def _halves(mask: Mask, facts: LayerFacts, leaves_bias: Callable[[int], bool]) -> list[_Half]:
    """Return the halves that do something, in order, and what is added to them."""
    halves: list[_Half] = []
    for layer in range(facts.layers):
        live = len(mask.heads_in(layer)) < facts.heads
        if live or leaves_bias(layer):
            if not live and halves and not facts.normed and facts.biased[halves[-1].is_ffn]:
                halves[-1].adds.append(layer)
            else:
                halves.append(_Half(False, layer))
        if layer not in mask.ffns:
            halves.append(_Half(True, layer))
    return halves


def _paired(halves: Sequence[_Half], mask: Mask, facts: LayerFacts) -> Iterator[LayerRecipe]:
    """Yield layers of an attention and the FFN that follows it; where one is missing, it is of zeros."""
    waiting: _Half | None = None
    for half in [*halves, None]:
        if waiting is not None and (half is None or not half.is_ffn):
            slots = all_slots(facts, mask, waiting.layer)
            adds = tuple(waiting.adds)
            yield LayerRecipe(waiting.layer, waiting.layer, slots, False, attention_adds=adds)
        if half is not None and half.is_ffn:
            adds = tuple(half.adds)
            if waiting is None:
                dead = replace(all_slots(facts, mask, half.layer), live=frozenset())
                yield LayerRecipe(half.layer, half.layer, dead, True, keeps_bias=False, ffn_adds=adds)
            else:
                slots = all_slots(facts, mask, waiting.layer)
                yield LayerRecipe(
                    waiting.layer, half.layer, slots, True,
                    attention_adds=tuple(waiting.adds), ffn_adds=adds,
                )  # fmt: skip
        waiting = half if half is not None and not half.is_ffn else None


def _whole_layers(mask: Mask, facts: LayerFacts, leaves_bias: Callable[[int], bool]) -> list[LayerRecipe]:
    """Return the layers that have any unit; where both halves read one input they go together."""
    kept: list[LayerRecipe] = []
    for recipe in zeroed_layers(mask, facts):
        if recipe.slots.live or recipe.has_ffn:
            kept.append(recipe)
        elif leaves_bias(recipe.attention):
            if kept and facts.biased[1]:
                kept[-1] = replace(kept[-1], ffn_adds=(*kept[-1].ffn_adds, recipe.attention))
            elif kept and facts.biased[0]:
                kept[-1] = replace(kept[-1], attention_adds=(*kept[-1].attention_adds, recipe.attention))
            else:
                kept.append(recipe)
    return kept or zeroed_layers(mask, facts)[:1]


def least_heads(recipes: Iterable[LayerRecipe], facts: LayerFacts) -> tuple[int, int]:
    """Return how many groups of keys and values, and how many query heads in each, hold every layer's."""
    per_group = facts.heads // facts.groups
    groups, heads = 1, 1
    for recipe in recipes:
        live = [head // per_group for head in recipe.slots.live]
        groups = max(groups, len(set(live)))
        heads = max([heads, *(live.count(group) for group in set(live))])
    return groups, heads


def with_heads(recipe: LayerRecipe, facts: LayerFacts, groups: int, heads: int) -> LayerRecipe:
    """Return a layer with so many groups of so many query heads: those that live first, then others, whose
    columns are zeros.
    """
    per_group, live = facts.heads // facts.groups, recipe.slots.live
    in_use = sorted({head // per_group for head in live})
    others = [group for group in range(facts.groups) if group not in in_use]
    chosen = sorted([*in_use, *others[: groups - len(in_use)]])
    slots: list[int] = []
    for group in chosen:
        members = range(group * per_group, (group + 1) * per_group)
        alive = [head for head in members if head in live]
        spare = [head for head in members if head not in live]
        slots += sorted([*alive, *spare[: heads - len(alive)]])
    return replace(recipe, slots=HeadSlots(tuple(chosen), tuple(slots), live))
