"""Which masks pruning curves are made of.

A curve removes ever more of the least important units, ⌊p·n/100⌋ of n at p per cent, by one ranking of the
intact model (Bansal et al. 2023, section 5); its levels are masks, so all curves of a task are one sweep.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Kind, Mask
from lowmem_icl.masks.naming import CLEAN, mask_name
from lowmem_icl.masks.rankings import RankingKey, lowest_ffns, lowest_heads, random_mask, removed_count
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.statistics.agreement import spearman

LEVELS = tuple(range(0, 100, 10))
TRANSFER_LEVELS = (10, 30, 50, 70, 90)
LEVELS_BY_NAME = {"all": LEVELS, "half": (0, *TRANSFER_LEVELS)}
GRID_HEADS = tuple(range(0, 80, 10))
GRID_FFNS = tuple(range(0, 60, 10))
EVERY_RANDOM_LEVEL = 3
"""A draw at all levels would cost as much as a curve, and a band takes several draws."""
# Pruned by the ranking of the task that agrees most, or least, with one's own.
TRANSFERS = ("gradient-highest", "gradient-lowest")

Values = NDArray[np.float64]


class TaskShots(NamedTuple):
    """A task at a shot count."""

    task: str
    shots: int


@dataclass(frozen=True)
class CurvePoint:
    """One level of one curve: what is removed, and by whose ranking.

    `method`: how the curve is called, by the method of its ranking (`ranking`) unless a curve has a name of
    its own. `kind` is None where heads and FFNs are removed together. `percent`: of the heads, or of the FFNs
    where only these go; `donor`: whose ranking it is, None for random draws; `seed`: of a random draw;
    `on_training`: whether it also runs on the training documents, where knees are chosen.
    """

    name: str
    mask: Mask
    procedure: str
    method: str
    ranking: str
    kind: Kind | None
    percent: int
    donor: TaskShots | None = None
    seed: int | None = None
    on_training: bool = False


@dataclass(frozen=True, eq=False)
class CurveRankings:
    """Scores by task, shot count and method: of heads [L, H] and of FFNs [L]; higher is more important.

    `ffn_method`: the method by which FFNs are ranked; `donors`: the tasks whose rankings others may be pruned
    by.
    """

    heads: Mapping[RankingKey, Values]
    ffns: Mapping[RankingKey, Values]
    ffn_method: str
    donors: tuple[str, ...]

    @cached_property
    def _lowest(self) -> dict[tuple[RankingKey, int], Mask]:
        return {}

    def lowest_heads(self, key: RankingKey, count: int) -> Mask:
        """Return the mask of the `count` heads with the lowest scores of a ranking."""
        # Several curves take the same masks, and of a large model each is thousands of heads.
        if (key, count) not in self._lowest:
            self._lowest[key, count] = lowest_heads(self.heads[key], count)
        return self._lowest[key, count]


@dataclass(frozen=True)
class CurveOptions:
    """Which curves are drawn (heads, ffns, combined, transfer, cross-shot, random), at which shot counts, how
    many draws, and at which levels those of heads and FFNs are measured; draws are at every third of these.
    """

    curves: tuple[str, ...]
    shots: tuple[int, ...]
    random_draws: int
    seed: int
    levels: tuple[int, ...] = LEVELS


def curve_points(own: TaskShots, options: CurveOptions, rankings: CurveRankings) -> Iterator[CurvePoint]:
    """Yield the points of all curves asked for of one task and shot count; a curve whose ranking is missing
    is left out.
    """
    curves, shared = options.curves, TaskShots(AGGREGATE, own.shots)
    if "heads" in curves:
        for donor in (own, shared):
            yield from _on_training(_head_curve("curve-heads", "gradient", donor, options.levels, rankings))
        yield from _head_curve("curve-heads", "icl_effect", own, TRANSFER_LEVELS, rankings)
    if "ffns" in curves:
        for donor in (own, shared):
            yield from _on_training(_ffn_curve(donor, options.levels, rankings))
    if "combined" in curves:
        yield from _grid(own, shared, rankings)
    if "transfer" in curves:
        for method, task in transfer_donors(own, rankings).items():
            donor = TaskShots(task, own.shots)
            for point in _head_curve("transfer", "gradient", donor, TRANSFER_LEVELS, rankings):
                yield replace(point, method=method)
    if "cross-shot" in curves:
        for count in options.shots:
            if count != own.shots:
                donor = TaskShots(own.task, count)
                yield from _head_curve("cross-shot", "gradient", donor, TRANSFER_LEVELS, rankings)
    if "random" in curves:
        yield from _random(rankings, options)


def _on_training(points: Iterator[CurvePoint]) -> Iterator[CurvePoint]:
    return (replace(point, on_training=True) for point in points)


def _head_curve(
    procedure: str, method: str, donor: TaskShots, levels: Sequence[int], rankings: CurveRankings
) -> Iterator[CurvePoint]:
    key = RankingKey(*donor, method)
    if key not in rankings.heads:
        return
    for percent in levels:
        name = mask_name(f"{method}-heads-{percent}", *donor) if percent else CLEAN
        mask = rankings.lowest_heads(key, removed_count(percent, rankings.heads[key].size))
        yield CurvePoint(name, mask, procedure, method, method, "head", percent, donor)


def _ffn_curve(donor: TaskShots, levels: Sequence[int], rankings: CurveRankings) -> Iterator[CurvePoint]:
    method = rankings.ffn_method
    scores = rankings.ffns.get(RankingKey(*donor, method))
    if scores is None:
        return
    for percent in levels:
        name = mask_name(f"{method}-ffns-{percent}", *donor) if percent else CLEAN
        mask = lowest_ffns(scores, removed_count(percent, scores.size))
        yield CurvePoint(name, mask, "curve-ffns", method, method, "ffn", percent, donor)


def _grid(own: TaskShots, shared: TaskShots, rankings: CurveRankings) -> Iterator[CurvePoint]:
    """Yield the grid of heads and FFNs by the rankings of all tasks (the paper's figure 7), or by its own if
    alone.
    """
    for donor in (shared, own):
        key = RankingKey(*donor, "gradient")
        heads = rankings.heads.get(key)
        ffns = rankings.ffns.get(RankingKey(*donor, rankings.ffn_method))
        if heads is None or ffns is None:
            continue
        for head_percent in GRID_HEADS:
            for ffn_percent in GRID_FFNS:
                removed = rankings.lowest_heads(key, removed_count(head_percent, heads.size))
                # Not a union: that would copy thousands of heads.
                mask = replace(removed, ffns=lowest_ffns(ffns, removed_count(ffn_percent, ffns.size)).ffns)
                prefix = f"combined-heads-{head_percent}-ffns-{ffn_percent}"
                name = mask_name(prefix, *donor) if head_percent or ffn_percent else CLEAN
                yield CurvePoint(
                    name, mask, "curve-combined", "combined", "combined", None, head_percent, donor
                )
        return


def transfer_donors(own: TaskShots, rankings: CurveRankings) -> dict[str, str]:
    """Return the tasks whose gradient ranking agrees most and least with a task's own, by the curve's method.

    The paper took them from a list; here rank correlations decide. Empty with fewer than two other tasks.
    """
    scores = rankings.heads.get(RankingKey(*own, "gradient"))
    if scores is None or own.task not in rankings.donors:
        return {}
    agreement = {
        task: spearman(scores.ravel(), other.ravel())
        for task in rankings.donors
        if task != own.task
        and (other := rankings.heads.get(RankingKey(task, own.shots, "gradient"))) is not None
    }
    agreement = {task: value for task, value in agreement.items() if np.isfinite(value)}
    if len(agreement) < 2:
        return {}
    ascending = sorted(agreement, key=lambda task: agreement[task])
    return dict(zip(TRANSFERS, (ascending[-1], ascending[0]), strict=True))


def _random(rankings: CurveRankings, options: CurveOptions) -> Iterator[CurvePoint]:
    """Yield the random control: nested draws of heads and of FFNs, the same ones for all tasks and shot
    counts, at every third level.
    """
    layers, heads = next(iter(rankings.heads.values())).shape
    kinds: tuple[tuple[Kind, int], ...] = (("head", layers * heads), ("ffn", layers))
    for draw in range(options.random_draws):
        seed = options.seed + draw
        for kind, n_units in kinds:
            for percent in options.levels[::EVERY_RANDOM_LEVEL]:
                removed = removed_count(percent, n_units)
                n_heads, n_ffns = (removed, 0) if kind == "head" else (0, removed)
                # One permutation per seed: its levels are nested, as those of a ranking are.
                mask = random_mask(layers, heads, n_heads, n_ffns, seed)
                name = f"random-{kind}s-{percent}-draw{draw}" if percent else CLEAN
                yield CurvePoint(name, mask, "random", "random", "random", kind, percent, seed=seed)
