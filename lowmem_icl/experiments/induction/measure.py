"""Induction heads: their scores, what pruning leaves of them, whether important heads are such, and what they
cause.

Axis letters: S sequences, L layers, H heads, U all heads in a row.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey, ascending, highest_heads
from lowmem_icl.statistics.bands import prediction_band
from lowmem_icl.statistics.detection import Measure, area_under_curve, r_precision, rank_correlation
from lowmem_icl.statistics.intervals import MEAN, mean_intervals
from lowmem_icl.tables.blocks import Block

Values = NDArray[np.float64]

HEAD_SCORE = 0.3
"""From this score on a head counts as an induction head (prefix matching) or a previous-token head."""
LARGEST_SHARE = 4
"""Of all heads at most one of so many is removed as an induction head."""
BOUNDS = dict.fromkeys(("acc", "em", "f1", "gold_prob", "top_answer_share"), (0.0, 1.0)) | {
    "acc_drop": (-1.0, 1.0)
}
"""Of metrics that cannot lie outside them."""
RANDOM_DRAWS = 20
RANDOM_ORDERS = 200
PERCENT_STEP = 5
CAPACITIES = ("prefix_matching", "copying")
HEADS_MASK = "induction-heads"
RANDOM_MASK = "induction-random"


def score_blocks(metric: str, method: str, by_sequence: Values) -> Iterator[Block]:
    """Yield blocks of a score [S, L, H]: its mean over sequences, and their variance as another metric."""
    sequences = len(by_sequence)
    value = by_sequence.mean(0)
    variance = np.full(value.shape, np.nan) if sequences < 2 else by_sequence.var(0, ddof=1)
    alone = [str(sequence) for sequence in range(sequences)]
    intervals = mean_intervals(by_sequence.reshape(sequences, -1).T, alone, MEAN)
    base = _head_fields(value) | {"method": method, "documents": sequences}
    yield base | {"metric": metric} | intervals._asdict()
    yield base | {"metric": f"{metric}_variance", "value": variance.ravel()}


def weight_block(metric: str, method: str, values: Values) -> Block:
    """Return a block of a score that is of the weights alone, [L, H]."""
    return _head_fields(values) | {"method": method, "metric": metric, "value": values.ravel()}


def _head_fields(values: Values) -> dict[str, Any]:
    layer, head = np.indices(values.shape)
    return {
        "procedure": "scores",
        "kind": "head",
        "layer": layer.ravel(),
        "head": head.ravel(),
        "exact": True,
    }


def percents() -> NDArray[np.int64]:
    """Return the percentages of heads removed, 0 to 100."""
    return np.arange(0, 101, PERCENT_STEP)


def retained(scores: Values, orders: NDArray[np.int64]) -> Values:
    """Return which share of the summed scores [U] is left when heads go in these orders [..., U], at every
    percentage.

    Σ_{rank ≥ i} score / Σ score with i = ⌊p · U / 100⌋ heads removed (Bansal et al. 2023, section 6.4): [...,
    percents].
    """
    gone = np.cumsum(scores[orders], axis=-1)
    gone = np.concatenate([np.zeros((*gone.shape[:-1], 1)), gone], axis=-1)
    counts = percents() * orders.shape[-1] // 100
    # Exactly 0 where all are gone.
    return np.where(counts == orders.shape[-1], 0.0, 1 - gone[..., counts] / scores.sum())


def capacity_blocks(
    capacity: str, scores: Values, ranked: Mapping[RankingKey, Values], seed: int
) -> Iterator[Block]:
    """Yield blocks: how much of a capacity [L, H] is left under every ranking [L, H], lowest first.

    ranked: by task, shot count and method. `chance` is what is left on average when heads go at random; a
    block of the method `random` has that with the band of 200 orders.
    """
    heads = scores.size
    counts = percents() * heads // 100
    base = {
        "procedure": "capacity",
        "kind": "head",
        "metric": "capacity_retained",
        "other_method": capacity,
        "percent": percents(),
        "heads_removed": counts,
        "chance": 1 - counts / heads,
        "exact": True,
    }
    for (task, shots, method), ranking in ranked.items():
        order = np.array(ascending(ranking))
        yield base | {
            "task": task,
            "shots": shots,
            "method": method,
            "value": retained(scores.ravel(), order),
        }
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(heads), (RANDOM_ORDERS, 1)), axis=1)
    drawn = retained(scores.ravel(), orders)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    yield base | {"method": "random", "value": drawn.mean(0), "low": low, "high": high, "seed": seed}


def capacity_of_mask(capacity: str, scores: Values, removed: Mask) -> dict[str, Any]:
    """Return a record: how much of a capacity [L, H] a mask leaves, and how much a random one of its
    size would.
    """
    indices = np.array(sorted(removed.heads), dtype=np.int64).reshape(-1, 2)
    gone = scores[indices[:, 0], indices[:, 1]].sum()
    return {
        "procedure": "capacity",
        "kind": "head",
        "metric": "capacity_retained",
        "other_method": capacity,
        "heads_removed": len(removed.heads),
        "ffns_removed": len(removed.ffns),
        "value": float(1 - gone / scores.sum()),
        "chance": 1 - len(removed.heads) / scores.size,
        "exact": True,
    }


def important_heads_records(prefix_matching: Values, ranked: Mapping[RankingKey, Values]) -> Iterator[Block]:
    """Yield how far important heads are induction heads, under every ranking [L, H], with chance and
    interval over layers.

    induction_spearman: rank correlation with prefix matching; induction_precision: the share of induction
    heads among the `count` most important, as many as there are; induction_auc: how often an induction head
    is the more important one.
    """
    members = prefix_matching >= HEAD_SCORE
    count = int(members.sum())
    for (task, shots, method), ranking in ranked.items():
        base = {
            "procedure": "important-heads",
            "kind": "head",
            "task": task,
            "shots": shots,
            "method": method,
            "other_method": "prefix_matching",
            "exact": True,
        }
        measures: dict[str, tuple[int | None, Measure]] = {
            "induction_spearman": (None, rank_correlation(ranking, prefix_matching))
        }
        if 0 < count < members.size:
            measures |= {
                "induction_precision": (count, r_precision(ranking, members)),
                "induction_auc": (count, area_under_curve(ranking, members)),
            }
        for metric, (n_top, measure) in measures.items():
            if np.isfinite(measure.value):
                yield base | {"metric": metric, "count": n_top} | measure._asdict()


def top_induction_heads(prefix_matching: Values) -> Mask:
    """Return the heads that reach the score, at most a quarter of all: the highest of [L, H]."""
    reached = int((prefix_matching >= HEAD_SCORE).sum())
    return highest_heads(prefix_matching, min(reached, prefix_matching.size // LARGEST_SHARE))


def random_draws(
    removed: Mask, prefix_matching: Values, previous_token: Values, seed: int, draws: int = RANDOM_DRAWS
) -> list[Mask]:
    """Return masks of as many other heads as `removed` has, of the same layers: as many of each, as far as
    there are.

    Induction heads and previous-token heads, which feed these, are never drawn; scores: [L, H]. What a layer
    lacks comes from the other layers; where all of them lack it there are no draws.
    """
    wanted = Counter(layer for layer, _ in removed.heads)
    free = (prefix_matching < HEAD_SCORE) & (previous_token < HEAD_SCORE)
    pools = {layer: np.flatnonzero(free[layer]) for layer in sorted(wanted)}
    if not wanted or sum(map(len, pools.values())) < len(removed.heads):
        return []
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(draws):
        chosen: list[tuple[int, int]] = []
        spare: list[tuple[int, int]] = []
        for layer, pool in pools.items():
            heads = [(layer, int(head)) for head in rng.permutation(pool)]
            chosen += heads[: wanted[layer]]
            spare += heads[wanted[layer] :]
        lacking = len(removed.heads) - len(chosen)
        chosen += [spare[int(index)] for index in rng.permutation(len(spare))[:lacking]]
        masks.append(Mask(frozenset(chosen)))
    return masks


def band_records(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield, for every task, shot count and metric, the median over random draws with the band that holds
    the next draw at 95 %.

    records: those of all draws, method `random`; the median's record has the mask's name without a number.
    """
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in records:
        grouped.setdefault((row["task"], row["shots"], row["metric"]), []).append(row)
    for (_, _, metric), members in grouped.items():
        values = np.array([row["value"] for row in members])
        low, high = prediction_band(values, *BOUNDS.get(metric, ()))
        yield dict(members[0]) | {
            "mask": RANDOM_MASK,
            "method": "random-median",
            "value": float(np.median(values)),
            "stderr": None,
            "low": low,
            "high": high,
        }
