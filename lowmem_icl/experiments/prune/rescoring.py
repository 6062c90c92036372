"""Curves whose importance is computed again on the pruned model at every level, which the paper names but does not do."""

from itertools import pairwise

import numpy as np

from lowmem_icl.experiments.importance.stage import importance_of, unit_gradient_arrays
from lowmem_icl.experiments.prune.curves import CLEAN, LEVELS, CurvePoint, Rankings
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import mask_name
from lowmem_icl.masks.rankings import RankingKey, lowest_heads, removed_count
from lowmem_icl.session.work import Work

# After which levels importance is computed again: not after the last, and for the first the whole model's serves.
RESCORED_LEVELS = LEVELS[1:-1]


def rescoring_part(level: int) -> str:
    """Return the name of the part that holds the importance after a level."""
    return f"rescore-{level:02d}"


def rescored_points(work: Work, rankings: Rankings) -> list[list[CurvePoint]]:
    """Return, for every task and shot count, the levels of the curve that is scored again at each.

    A level removes the heads of the level before and, of the others, those least important to the model without these.
    All tasks share the two reads of every level.
    """
    tasks, skeleton = work.prepared.importance, work.model.skeleton
    masks = [Mask()] * len(tasks)
    scores = [rankings.heads[RankingKey(task.task, task.shots, "gradient")].copy() for task in tasks]
    points = [[CurvePoint(CLEAN, Mask(), "rescored", "head", 0)] for _ in tasks]
    packed = [work.prepared.pack(task) for task in tasks]
    for before, percent in pairwise(LEVELS):
        if before:
            # What is cached is of the whole model, or of the level before.
            work.cache.clear()
            part, label = rescoring_part(before), f"importance with {before} % of the heads removed"
            arrays = unit_gradient_arrays(work, "prune", part, label, masks)
            scores = [
                importance_of(work, task, number, arrays).gradient_heads for number, task in enumerate(packed)
            ]
        for place, task in enumerate(tasks):
            for layer, head in masks[place].heads:
                scores[place][layer, head] = -np.inf
            masks[place] = lowest_heads(
                scores[place], removed_count(percent, skeleton.layers * skeleton.heads)
            )
            name = mask_name(f"rescored-heads-{percent}", task.task, task.shots)
            points[place].append(CurvePoint(name, masks[place], "rescored", "head", percent))
    work.cache.clear()
    return points
