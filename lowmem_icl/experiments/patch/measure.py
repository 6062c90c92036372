"""Effects of patches: what a unit's value from another prompt changes, with intervals over pairs.

Axis letters: N pairs, U units, O options.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from lowmem_icl.experiments.patch.prompts import Pairs
from lowmem_icl.masks.mask import Unit
from lowmem_icl.statistics.intervals import MEAN, PROPORTION, SHARE, Kind, mean_intervals
from lowmem_icl.statistics.significance import differing_signs, q_values
from lowmem_icl.tables.blocks import Block, unit_blocks
from lowmem_icl.tables.unit_table import q_metric
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair

Values = NDArray[np.float64]
Direction = Literal["restore", "break"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
"""The clean prompt's values in the corrupted one, and the reverse."""

SMALLEST_DIFFERENCE = 0.1
"""Nats between the runs of a pair: what lies less apart is no scale to normalise by."""
METHOD = "patching"
KINDS: Mapping[str, Kind] = {
    "gold_logprob": MEAN,
    "gold_prob": MEAN,
    "logit_difference": MEAN,
    "normalised": MEAN,
}


def pair_scores(pair: PromptPair, logprobs: Values) -> dict[str, Values]:
    """Return what a pair's options [..., O] score, by metric.

    gold_logprob: the best right option's log-probability; gold_prob: the share of the right options in the
    softmax over all, or the option's own probability where there is one; logit_difference: the best right
    option less the best other, NaN where there is none; acc: whether the first best option is a right one,
    likewise.
    """
    gold = np.array(pair.gold)
    best = logprobs[..., gold].max(-1)
    if gold.all():
        nothing = np.full_like(best, np.nan)
        return {
            "gold_logprob": best, "gold_prob": np.exp(best), "logit_difference": nothing, "acc": nothing,
        }  # fmt: skip
    difference = best - logprobs[..., ~gold].max(-1)
    return {
        "gold_logprob": best,
        "gold_prob": softmax(logprobs, -1)[..., gold].sum(-1),
        "logit_difference": difference,
        "acc": gold[logprobs.argmax(-1)].astype(np.float64),
    }


@dataclass(frozen=True, eq=False)
class PairEffects:
    """What patches make of N pairs, by metric: `restored` and `broken` [U, N] are scores of the corrupted
    prompt with the clean one's values and the reverse; `corrupted`, `clean` [N] those of the prompts.
    """

    restored: Mapping[str, Values]
    broken: Mapping[str, Values]
    corrupted: Mapping[str, Values]
    clean: Mapping[str, Values]

    @classmethod
    def of(
        cls, pairs: Sequence[PromptPair], into_corrupted: Sequence[Values], into_clean: Sequence[Values]
    ) -> "PairEffects":
        """Return them from the log-probabilities [1 + U, O] of every pair, the first without a patch."""

        def by_metric(found: Sequence[Values]) -> dict[str, Values]:
            scores = [pair_scores(pair, values) for pair, values in zip(pairs, found, strict=True)]
            return {name: np.stack([of[name] for of in scores], 1) for name in scores[0]}

        restored, broken = by_metric(into_corrupted), by_metric(into_clean)
        return cls(
            {name: values[1:] for name, values in restored.items()},
            {name: values[1:] for name, values in broken.items()},
            {name: values[0] for name, values in restored.items()},
            {name: values[0] for name, values in broken.items()},
        )

    @property
    def scale(self) -> str:
        """The metric that is normalised: the difference to other options, where every pair has some."""
        return "gold_logprob" if np.isnan(self.clean["logit_difference"]).any() else "logit_difference"

    def has_scale(self) -> NDArray[np.bool_]:
        """Return which pairs lie far enough apart to normalise, [N]."""
        return np.abs(self.clean[self.scale] - self.corrupted[self.scale]) >= SMALLEST_DIFFERENCE

    def changes(self, direction: Direction) -> dict[str, Values]:
        """Return patched less unpatched by metric, [U, N]; normalised, [U, pairs that have a scale]: where
        the patched run lies, 0 being the corrupted and 1 the clean run.
        """
        patched = self.restored if direction == "restore" else self.broken
        before = self.corrupted if direction == "restore" else self.clean
        found = {name: patched[name] - before[name] for name in KINDS if name in patched}
        chosen, name = self.has_scale(), self.scale
        low, high = self.corrupted[name][chosen], self.clean[name][chosen]
        found["normalised"] = (patched[name][:, chosen] - low) / (high - low)
        return found


def effect_blocks(pairs: Pairs, units: Sequence[Unit], effects: PairEffects, at: str) -> Iterator[Block]:
    """Yield the mean effects of all units in both directions, and q-values of gold log-probability's."""
    clusters = [pair.cluster for pair in pairs.pairs]
    chosen = effects.has_scale()
    same = pairs.fields | {
        "procedure": at, "method": METHOD, "labels": pairs.labels, "exact": True,
        "heads_removed": None, "ffns_removed": None,
    }  # fmt: skip
    for direction in DIRECTIONS:
        for name, values in effects.changes(direction).items():
            if not values.size or np.isnan(values).any():
                continue
            of_metric, of_pairs = same, clusters
            if name == "normalised":
                of_pairs = [cluster for cluster, is_in in zip(clusters, chosen, strict=True) if is_in]
                of_metric = same | {"documents": len(of_pairs)}
            intervals = mean_intervals(values, of_pairs, KINDS[name])
            yield from unit_blocks(units, intervals._asdict(), **of_metric, metric=f"{direction}_{name}")
            if name == "gold_logprob" and len(set(clusters)) > 1:
                columns = {"value": q_values(differing_signs(values, clusters))}
                yield from unit_blocks(units, columns, **of_metric, metric=q_metric(f"{direction}_{name}"))


def prompt_records(pairs: Pairs, effects: PairEffects, at: str) -> Iterator[dict[str, Any]]:
    """Yield what the clean and the corrupted prompts score, unpatched."""
    clusters = [pair.cluster for pair in pairs.pairs]
    kinds = {"gold_logprob": MEAN, "gold_prob": SHARE, "logit_difference": MEAN, "acc": PROPORTION}
    for labels, scores in (("right", effects.clean), (pairs.labels, effects.corrupted)):
        for name, kind in kinds.items():
            if np.isnan(scores[name]).any():
                continue
            intervals = mean_intervals(scores[name][None], clusters, kind)._asdict()
            yield pairs.fields | {
                "procedure": at, "labels": labels, "metric": name, "exact": True, "ablation": None,
                **{column: float(values[0]) for column, values in intervals.items()},
            }  # fmt: skip


def per_pair_blocks(
    pairs: Pairs, units: Sequence[Unit], effects: PairEffects, direction: Direction
) -> Iterator[Block]:
    """Yield blocks of effects.parquet: every pair's effect on gold log-probability, unit by unit."""
    documents = np.array([pair.document for pair in pairs.pairs])
    values = effects.changes(direction)["gold_logprob"]
    for kind in ("head", "ffn"):
        indices = [index for index, unit in enumerate(units) if unit.kind == kind]
        base: dict[str, Any] = {
            "experiment": "patch", "task": pairs.task, "shots": pairs.shots, "split": pairs.split,
            "document": np.tile(documents, len(indices)), "kind": kind,
            "layer": np.repeat([units[index].layer for index in indices], len(documents)),
            "metric": f"{direction}_gold_logprob", "value": values[indices].ravel(),
        }  # fmt: skip
        if kind == "head":
            base["head"] = np.repeat([units[index].head for index in indices], len(documents))
        yield base
