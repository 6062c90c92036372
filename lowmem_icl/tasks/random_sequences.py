"""Sequences of random tokens, by which induction heads are found: different ones, four times over.

Bansal et al. 2023, appendix A.4; seeded here, the same on every machine. Axis letters: B base tokens.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.errors import InputError

SEQUENCES = 100
SHORTEST_BASE_TOKENS = 25
BASE_TOKENS_STEP = 2
COPIES = 4
CUT_PERCENT = 4
SMALLEST_BASE_TOKENS = 2

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Drawable:
    """The ids that random tokens are drawn from; `ordered_by` merges (most frequent first) or ids."""

    ids: Integers
    ordered_by: str


@dataclass(frozen=True, eq=False)
class RandomSequences:
    """What heads are scored on.

    Sequence s has `base_tokens[s]` different tokens four times over, [4B + 1] with the BOS. `unrepeated` are
    as long and repeat nothing.
    """

    repeated: tuple[Integers, ...]
    unrepeated: tuple[Integers, ...]
    base_tokens: tuple[int, ...]
    drawable: Drawable

    def as_record(self) -> dict[str, Any]:
        """Return what was used, for run.json."""
        return {
            "sequences": len(self.base_tokens),
            "base_tokens": [min(self.base_tokens), max(self.base_tokens)],
            "base_tokens_wanted": [SHORTEST_BASE_TOKENS, _wanted(SEQUENCES - 1)],
            "drawable_ids": len(self.drawable.ids),
            "drawable_ids_ordered_by": self.drawable.ordered_by,
        }


def drawable_ids(tokenizer: Mapping[str, Any], special: Collection[int], vocabulary: int) -> Drawable:
    """Return the ids to draw from, by a tokenizer in the form of tokenizer.json.

    A BPE's merges stand in the order of how frequent they make their tokens; the first and last 4 % are left
    out. Of a tokenizer without merges the middle 92 % of the ids are taken. Special tokens are never among
    them, nor ids beyond the model's vocabulary.
    """
    model = tokenizer.get("model", {})
    ids_of_texts = model.get("vocab", {})
    merged = [
        "".join(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model.get("merges", ())
    ]
    ids = [ids_of_texts[text] for text in dict.fromkeys(merged) if text in ids_of_texts]
    # Cut before anything else is left out: the ranks of the merges are what 4 % is of.
    kept = _middle(ids) if ids else _middle(sorted(set(range(vocabulary)) - set(special)))
    allowed = [number for number in kept if number < vocabulary and number not in special]
    return Drawable(np.array(allowed, dtype=np.int64), "merges" if ids else "ids")


def _middle(ids: list[int]) -> list[int]:
    cut = CUT_PERCENT * len(ids) // 100
    return ids[cut : len(ids) - cut]


def _wanted(sequence: int) -> int:
    return BASE_TOKENS_STEP * sequence + SHORTEST_BASE_TOKENS


def random_sequences(
    drawable: Drawable, bos: int, context_tokens: int, seed: int, count: int = SEQUENCES
) -> RandomSequences:
    """Draw the sequences: tokens without replacement, base lengths 25, 27, ….

    They are cut to what context and vocabulary allow. Raises InputError where they allow too little.
    """
    longest = min((context_tokens - 1) // COPIES, len(drawable.ids) // COPIES)
    if longest < SMALLEST_BASE_TOKENS:
        raise InputError(
            "--experiments induction: expected a context of at least "
            f"{COPIES * SMALLEST_BASE_TOKENS + 1} tokens and as many ids to draw from, "
            f"got {context_tokens} and {len(drawable.ids)}; leave induction out"
        )
    lengths = tuple(min(_wanted(sequence), longest) for sequence in range(count))
    repeated, unrepeated = [], []
    for sequence, length in enumerate(lengths):
        # A generator each: a sequence is the same whatever the others are.
        rng = np.random.default_rng([seed, sequence])
        base = rng.choice(drawable.ids, length, replace=False)
        others = rng.choice(drawable.ids, COPIES * length, replace=False)
        repeated.append(np.concatenate([[bos], np.tile(base, COPIES)]))
        unrepeated.append(np.concatenate([[bos], others]))
    return RandomSequences(tuple(repeated), tuple(unrepeated), lengths, drawable)
