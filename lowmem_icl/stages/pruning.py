"""The prune stage: greedy searches in lockstep, masks of equal size beside them, all judged on other documents."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.waves import Job
from lowmem_icl.experiments import evaluate, prune
from lowmem_icl.experiments.overlap import RankingKey
from lowmem_icl.masks import Mask
from lowmem_icl.naming import mask_name
from lowmem_icl.rankings import lowest_ffns, lowest_heads, random_mask
from lowmem_icl.stages.evaluating import evaluation_rows
from lowmem_icl.stages.work import AGGREGATE, EVALUATE_CHUNK, Gathered, MadeMask, Row, Work
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores


def run_prune(work: Work, gathered: Gathered) -> None:
    """Search greedy masks on the training documents; report them beside others of equal size on the evaluation split."""
    masks = _search_masks(work, gathered)
    tasks = work.prepared.evaluate
    of_task = [
        [made for made in masks if made.shots == task.shots and made.task in (task.task, AGGREGATE)]
        for task in tasks
    ]
    # The clean run's part is the evaluate experiment's own, whichever of the two makes it first.
    clean = evaluation_rows(work, "prune", None, {})
    scores = work.sweep_in_chunks(
        "prune",
        "prune-evaluate",
        "evaluate masks",
        tasks,
        [tuple(made.mask for made in members) for members in of_task],
        EVALUATE_CHUNK,
    )
    rows: list[Row] = []
    for task, members, score in zip(tasks, of_task, scores, strict=True):
        packed = work.prepared.pack(task)
        for made, logprobs, greedy in zip(members, score.logprobs, score.greedy, strict=True):
            rows += [
                row | {"method": made.method, "seed": made.seed}
                for row in evaluate.evaluation_rows(
                    packed, made.name, made.mask, logprobs, greedy, work.options.seed
                )
            ]
    shared = {made.name for made in masks if made.task == AGGREGATE}
    fields = ("shots", "mask", "heads_removed", "ffns_removed", "method", "seed")
    rows += list(evaluate.mean_over_tasks([row for row in rows if row["mask"] in shared], fields))
    clean += list(evaluate.mean_over_tasks(clean, ("shots", "mask")))
    gathered.results["prune"] = [{"experiment": "prune"} | row for row in rows]
    gathered.masks += [_with_scores(made, rows, clean) for made in masks]


def _with_scores(made: MadeMask, rows: Sequence[Row], clean: Sequence[Row]) -> MadeMask:
    def of(members: Sequence[Row], mask: str) -> dict[str, float]:
        return {
            row["metric"]: row["value"]
            for row in members
            if row["mask"] == mask and row["task"] == made.task and row["shots"] == made.shots
        }

    splits = {row["split"] for row in rows if row["mask"] == made.name and row.get("split")}
    scores = {
        "split": "/".join(sorted(splits)),
        "before": of(clean, evaluate.CLEAN),
        "after": of(rows, made.name),
    }
    return replace(made, scores=scores)


def _search_masks(work: Work, gathered: Gathered) -> list[MadeMask]:
    """Run the greedy searches of every task and shot count, and of all tasks together, in lockstep."""
    skeleton, tasks = work.model.skeleton, work.prepared.train
    halves = [_packed_halves(work, task) for task in tasks]
    groups: dict[str, tuple[str, int, list[int]]] = {}
    for place, task in enumerate(tasks):
        groups[mask_name("greedy", task.task, task.shots)] = (task.task, task.shots, [place])
    for shots in work.options.chosen_shots:
        places = [place for place, task in enumerate(tasks) if task.shots == shots]
        if len(places) > 1:
            groups[mask_name("greedy", AGGREGATE, shots)] = (AGGREGATE, shots, places)

    def score(step: int, asked: Mapping[str, prune.Request]) -> dict[str, prune.Answer]:
        return _score_step(work, halves, groups, step, asked)

    searches = {
        name: prune.greedy_search(skeleton.layers, skeleton.heads, work.options.tolerance) for name in groups
    }
    found = prune.in_lockstep(searches, score)
    gathered.warnings += _unsettled(found, work.options.tolerance)
    made: list[MadeMask] = []
    for name, (task_name, shots, places) in groups.items():
        result = found[name]
        documents = sum(len(tasks[place].documents) for place in places)
        made.append(MadeMask(name, result.mask, "greedy", task_name, shots, documents, None))
        heads, ffns = len(result.mask.heads), len(result.mask.ffns)
        key = RankingKey(task_name, shots, "gradient")
        if key in gathered.rankings:
            by_gradient = lowest_heads(gathered.rankings[key], heads) | lowest_ffns(
                gathered.ffn_rankings[key], ffns
            )
            other = mask_name("gradient", task_name, shots)
            made.append(MadeMask(other, by_gradient, "gradient", task_name, shots, documents, None))
        seed = work.options.seed
        drawn = random_mask(skeleton.layers, skeleton.heads, heads, ffns, seed)
        made.append(
            MadeMask(
                mask_name("random", task_name, shots), drawn, "random", task_name, shots, documents, seed
            )
        )
    return made


def _unsettled(found: Mapping[str, prune.Pruned], tolerance: float) -> list[str]:
    """Return a warning where the tolerance is finer than the documents can tell."""
    errors = {
        name: 2 * result.lost_stderr for name, result in found.items() if tolerance < 2 * result.lost_stderr
    }
    if not errors:
        return []
    worst = max(errors, key=lambda name: errors[name])
    return [
        f"prune: the tolerance {tolerance:g} is below two standard errors of the loss it is compared with for "
        f"{len(errors)} of {len(found)} masks (at most {errors[worst]:.2g}, {worst}); a larger --train-limit settles it"
    ]


def _packed_halves(work: Work, task: TaskRows) -> dict[str, PackedTask]:
    """Deal the training documents alternately over the choosing and the checking half; a single one is in both."""
    every = 2 if len(task.documents) > 1 else 1
    return {
        "choose": work.prepared.pack(task, slice(0, None, every)),
        "check": work.prepared.pack(task, slice(every - 1, None, every)),
    }


def _score_step(
    work: Work,
    halves: Sequence[dict[str, PackedTask]],
    groups: Mapping[str, tuple[str, int, list[int]]],
    step: int,
    asked: Mapping[str, prune.Request],
) -> dict[str, prune.Answer]:
    """Score what all searches ask for in one sweep; a mask that two searches ask of a task is scored once."""
    wanted: dict[tuple[int, str], dict[Mask, int]] = {}
    for name, request in asked.items():
        for place in groups[name][2]:
            masks = wanted.setdefault((place, request.half), {})
            for mask in request.masks:
                masks.setdefault(mask, len(masks))
    jobs = [Job(halves[place][half].packed, tuple(masks)) for (place, half), masks in wanted.items()]
    scores = work.sweep(
        "prune", f"prune-{step:05d}", f"prune, step {step + 1}", lambda: jobs, keep_clean=True
    )
    objective: dict[tuple[int, str], NDArray[np.float64]] = {}
    for (place, half), score in zip(wanted, scores, strict=True):
        packed = halves[place][half]
        scored = document_scores(packed.task, score.logprobs, score.greedy)
        objective[place, half] = scored[work.options.objective]
    return {
        name: tuple(
            objective[place, request.half][[wanted[place, request.half][mask] for mask in request.masks]]
            for place in groups[name][2]
        )
        for name, request in asked.items()
    }
