"""Curves whose importance is computed again on the pruned model at every level, which the paper names but
does not do.
"""

from collections.abc import Sequence
from itertools import pairwise

from lowmem_icl.experiments.importance.stage import scores_of
from lowmem_icl.experiments.prune.points import LEVELS, CurvePoint, CurveRankings, TaskShots
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import CLEAN, mask_name
from lowmem_icl.masks.rankings import RankingKey, lowest_heads, removed_count
from lowmem_icl.session.fills import fill_for, filled
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import Values
from lowmem_icl.session.work import GradientsPart, Work

# After which levels importance is computed again: not after the last, and for the first the whole model's
# serves.
RESCORED_LEVELS = LEVELS[1:-1]


def level_part(prepared: Prepared, level: int, masks: Sequence[Mask]) -> GradientsPart:
    """Return the pass that scores all tasks' models again after a level, without the units of their masks."""
    label = f"importance with {level} % of the heads removed"
    tasks = prepared.importance
    removed = tuple(
        mask.filled(fill_for(prepared.options, task.task, task.shots))
        for task, mask in zip(tasks, masks, strict=True)
    )
    return GradientsPart(f"rescore-{level:02d}", label, tasks, removed)


def rescored_points(work: Work, rankings: CurveRankings) -> list[list[CurvePoint]]:
    """Return, for every task and shot count, the levels of the curve that is scored again at each.

    A level removes the heads of the level before and, of the others, those least important to the model
    without these. All tasks share the two reads of every level.
    """
    prepared = work.prepared
    packed = [prepared.pack(task) for task in prepared.importance]

    def scores_after(level: int, masks: Sequence[Mask]) -> list[Values]:
        gradients = work.gradients(level_part(prepared, level, masks))
        return [
            scores_of(prepared, task, task_gradients).gradient_heads
            for task, task_gradients in zip(packed, gradients, strict=True)
        ]

    points = [[_point(prepared, index, 0, Mask())] for index in range(len(packed))]
    scores, masks = _first_scores(prepared, rankings), [Mask()] * len(packed)
    for before, percent in pairwise(LEVELS):
        if before:
            scores = scores_after(before, masks)
        masks = [
            _next_mask(prepared, task_scores, mask, percent)
            for task_scores, mask in zip(scores, masks, strict=True)
        ]
        for index, mask in enumerate(masks):
            points[index].append(_point(prepared, index, percent, mask))
    return points


def expected_points(prepared: Prepared, rankings: CurveRankings) -> list[list[CurvePoint]]:
    """Return stand-ins for the points: as if every level's scores were the first one's."""
    points = []
    for index, scores in enumerate(_first_scores(prepared, rankings)):
        masks = {percent: _next_mask(prepared, scores.copy(), Mask(), percent) for percent in LEVELS}
        points.append([_point(prepared, index, percent, mask) for percent, mask in masks.items()])
    return points


def _first_scores(prepared: Prepared, rankings: CurveRankings) -> list[Values]:
    return [
        rankings.heads[RankingKey(task.task, task.shots, "gradient")].copy() for task in prepared.importance
    ]


def _next_mask(prepared: Prepared, scores: Values, removed: Mask, percent: int) -> Mask:
    """Return the mask of a level: the heads removed before are its lowest."""
    for layer, head in removed.heads:
        scores[layer, head] = float("-inf")
    n_heads = prepared.skeleton.layers * prepared.skeleton.heads
    return lowest_heads(scores, removed_count(percent, n_heads))


def _point(prepared: Prepared, index: int, percent: int, mask: Mask) -> CurvePoint:
    task = prepared.importance[index]
    donor = TaskShots(task.task, task.shots)
    name = mask_name(f"rescored-heads-{percent}", *donor) if percent else CLEAN
    mask = filled(prepared.options, task, mask)
    return CurvePoint(name, mask, "rescored", "rescored", "rescored", "head", percent, donor)
