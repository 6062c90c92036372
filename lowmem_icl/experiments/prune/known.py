"""What other stages know of units before a search: exact drops and estimates, on its choosing half alone.

Which units have exact drops was decided by estimates on all training documents.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from lowmem_icl.experiments.importance.stage import ImportanceResult
from lowmem_icl.experiments.prune.nested import KnownCosts
from lowmem_icl.experiments.prune.search import Answer, SearchPlan, Values
from lowmem_icl.experiments.prune.settings import Setting
from lowmem_icl.experiments.prune.steps import half_of
from lowmem_icl.masks.mask import Unit
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult
from lowmem_icl.tasks.documents import TaskRows


def known_costs(
    prepared: Prepared,
    setting: Setting,
    plan: SearchPlan,
    importance: ImportanceResult | None,
    ablate: StageResult | None,
) -> KnownCosts:
    """Return what the search of a setting may know of the documents that choose."""
    halves = [half_of(prepared.train[index], "choose") for index in setting.tasks]
    # What a unit costs in accuracy, few documents do not tell: the order is by log-probability.
    objective = "gold_logprob" if prepared.options.objective == "acc" else prepared.options.objective
    return KnownCosts(
        None if importance is None else _estimates(prepared, importance, halves),
        () if ablate is None else tuple(_exact_drops(ablate, task, objective, plan) for task in halves),
        _slope_of_probability if objective == "gold_prob" else np.ones_like,
    )


def _slope_of_probability(probability: Values) -> Values:
    """Return how much of the gold option's probability goes per nat of its log-probability, others being as
    they are.
    """
    return probability * (1 - probability)


def estimated_before(prepared: Prepared, halves: Sequence[TaskRows]) -> list[list[int]] | None:
    """Return where in importance's documents those of choosing halves are, by task; None where it lacks some.

    There are estimates of all tasks or, where importance has fewer documents than searches, of none.
    """
    if "importance" not in prepared.options.experiments:
        return None
    places = {
        (task.task, task.shots): {document.index: at for at, document in enumerate(task.documents)}
        for task in prepared.importance
    }
    found = []
    for task in halves:
        known = places.get((task.task, task.shots), {})
        if any(document.index not in known for document in task.documents):
            return None
        found.append([known[document.index] for document in task.documents])
    return found


def _estimates(prepared: Prepared, importance: ImportanceResult, halves: list[TaskRows]) -> Answer | None:
    """Return the estimates of every task's documents, [U, N]; None where gradients lack some of them."""
    places = estimated_before(prepared, halves)
    if places is None:
        return None
    return tuple(
        importance.attribution[task.task, task.shots][at].T for task, at in zip(halves, places, strict=True)
    )


def _exact_drops(ablate: StageResult, task: TaskRows, objective: str, plan: SearchPlan) -> dict[int, float]:
    """Return what removing single units costs the objective, mean over the documents, by their index."""
    drops = ablate.effects.filter(
        pl.col("metric") == f"{objective}_drop",
        pl.col("task") == task.task,
        pl.col("shots") == task.shots,
        pl.col("document").is_in([document.index for document in task.documents]),
    )
    means = drops.group_by("kind", "layer", "head").agg(pl.col("value").mean())
    return {
        plan.index(Unit(kind, layer, head)): value
        for kind, layer, head, value in means.select("kind", "layer", "head", "value").iter_rows()
    }
