"""Attribution patching: every patch of all pairs estimated to first order from one pass forward and back
(Nanda 2023; Kramár et al. 2024, section 2): ⟨the other prompt's value − the own one, ∂ log-probability⟩.

Axis letters: N pairs, U units, T tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.fills import Donor
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.experiments.patch.measure import DIRECTIONS, METHOD, Direction
from lowmem_icl.experiments.patch.prompts import At, Pairs
from lowmem_icl.masks.mask import Unit
from lowmem_icl.rows import Integers, Row
from lowmem_icl.session.patch_parts import PatchEstimatesPart
from lowmem_icl.statistics.agreement import spearman
from lowmem_icl.statistics.intervals import MEAN, mean_intervals
from lowmem_icl.tables.blocks import Block, unit_blocks
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair, Tokens
from lowmem_icl.tasks.prompt_rows import prompt_row

Values = NDArray[np.float64]

ATTRIBUTION = "attribution"
SPANS = 3
"""A row's tokens are told apart as those before the prompt's last, that one, and those after it."""


def estimates_part(every: Sequence[Pairs]) -> PatchEstimatesPart:
    """Return the pass over both prompts of every pair, each with its first right option."""
    rows: list[Row] = []
    donors: dict[Row, Donor] = {}
    for pairs in every:
        for pair in pairs.pairs:
            first, second = (
                _row(prompt, pair, len(rows) + place)
                for place, prompt in enumerate((pair.corrupted, pair.clean))
            )
            rows += [first, second]
            # Of prompts that do not align, tokens are told their counterparts from the end.
            after = len(first) - len(pair.corrupted)
            donors[first] = Donor(second, _from_the_end(pair.corrupted, pair.clean, after))
            donors[second] = Donor(first, _from_the_end(pair.clean, pair.corrupted, after))
    sources = tuple(source for pairs in every for source in pairs.sources for _ in range(2))
    return PatchEstimatesPart("patch-estimates", "attribution patching", tuple(rows), donors, sources)


def _row(prompt: Tokens, pair: PromptPair, number: int) -> Row:
    right = pair.options[pair.gold.index(True)]
    row = prompt_row(prompt, [right], whole=True)
    last = len(prompt) - 1
    span = np.sign(np.arange(len(row)) - last) + 1
    options = np.full_like(row.options, number)
    return replace(row, owners=SPANS * number + span, options=options)


def _from_the_end(prompt: Tokens, other: Tokens, after: int) -> Integers:
    """Return of every token of a prompt, and of those after it, the other's token as far from its end."""
    places = np.arange(len(prompt) + after) + len(other) - len(prompt)
    return np.maximum(places, 0)


@dataclass(frozen=True, eq=False)
class PatchEstimates:
    """What patches are estimated to change of gold log-probability, by direction, [U, N]: at the last token,
    and at all of the prompt.
    """

    last: Mapping[Direction, Values]
    all: Mapping[Direction, Values]

    def at(self, at: At) -> Mapping[Direction, Values]:
        """Return the estimates of patches there."""
        return self.last if at == "last" else self.all


def estimates_of(every: Sequence[Pairs], found: UnitGradients) -> list[PatchEstimates]:
    """Return the estimates of all pairs, from the pass over them."""
    owners = len(found.head_signed)
    missing = -owners % (2 * SPANS)
    # What is lost where the other's value stands in a unit's place; heads, then FFNs: [2 · pairs, SPANS, U].
    lost = np.concatenate([found.head_signed.reshape(owners, -1), found.ffn_signed], 1)
    by_row = np.pad(lost, ((0, missing), (0, 0))).reshape(-1, SPANS, lost.shape[1])
    estimates, first = [], 0
    for pairs in every:
        own = -by_row[first : first + 2 * len(pairs.pairs)]
        first += 2 * len(pairs.pairs)
        last, prompt = own[:, 1], own[:, :2].sum(1)
        estimates.append(
            PatchEstimates(
                {name: last[place::2].T for place, name in enumerate(DIRECTIONS)},
                {name: prompt[place::2].T for place, name in enumerate(DIRECTIONS)},
            )
        )
    return estimates


def estimate_blocks(
    pairs: Pairs,
    units: Sequence[Unit],
    at: At,
    estimated: Mapping[Direction, Values],
    exact: Mapping[Direction, Values],
) -> Iterator[Block]:
    """Yield the mean estimates of all units, and how they and the exact effects rank units alike."""
    same = pairs.fields | {"procedure": at, "labels": pairs.labels, "method": ATTRIBUTION}
    clusters = [pair.cluster for pair in pairs.pairs]
    for direction in DIRECTIONS:
        means = mean_intervals(estimated[direction], clusters, MEAN)
        columns = {"value": means.value, "stderr": means.stderr}
        nothing = {"heads_removed": None, "ffns_removed": None, "exact": False}
        yield from unit_blocks(units, columns, **same, **nothing, metric=f"{direction}_gold_logprob")
        rank = spearman(means.value, exact[direction].mean(1))
        if np.isfinite(rank):
            yield same | {
                "metric": f"{direction}_estimate_spearman", "value": float(rank), "chance": 0.0,
                "other_method": METHOD, "count": len(units), "exact": True,
            }  # fmt: skip
