"""The prune stage: curves by rankings, then greedy searches."""

from collections.abc import Iterator

import polars as pl

from lowmem_icl.experiments.prune import curves, greedy
from lowmem_icl.masks.mask import Mask
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import MadeMask, StageResult, rankings_of
from lowmem_icl.session.work import Part, Work


def parts(prepared: Prepared, importance: StageResult | None, ablate: StageResult | None) -> list[Part]:
    """Return the work of curves, and what searches are expected to ask for."""
    return [*curves.parts(prepared, rankings_of(importance, ablate)), *greedy.parts(prepared)]


def expected(prepared: Prepared) -> StageResult:
    """Return the masks that searches end with, as yet empty."""
    masks = [
        MadeMask(setting.mask_name(method), Mask(), method, setting.task, setting.shots, 0)
        for setting in greedy.settings_of(prepared)
        for method in greedy.METHODS
    ]
    return StageResult(masks=tuple(masks))


def run(work: Work, importance: StageResult | None, ablate: StageResult | None) -> Iterator[StageResult]:
    """Prune by rankings and by greedy search; yields when the curves are there, which come first."""
    rankings = rankings_of(importance, ablate)
    curved = curves.run(work, rankings)
    yield curved
    searched = greedy.run(work, rankings)
    yield StageResult(
        results=pl.concat([curved.results, searched.results]),
        effects=pl.concat([curved.effects, searched.effects]),
        masks=curved.masks + searched.masks,
        warnings=curved.warnings + searched.warnings,
        record=searched.record,
    )
<<<<<<< HEAD
=======
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
    rows += list(
        evaluate.mean_over_tasks(
            [row for row in rows if row["mask"] in shared and in_domain(row["task"])], fields
        )
    )
    clean += list(evaluate.mean_over_tasks(clean, ("shots", "mask")))
    gathered.results["prune"] += [{"experiment": "prune"} | row for row in rows]
    gathered.record["greedy"] = checked
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


def _search_masks(work: Work, gathered: Gathered) -> tuple[list[MadeMask], list[Row]]:
    """Run the greedy searches of every task and shot count, and of all tasks together, in lockstep.

    Returns the masks, each beside one by the gradient ranking and one drawn at random of equal size, and for run.json what
    they lose on the checking half (`check_loss`, in the objective's unit).
    """
    skeleton, tasks, options = work.model.skeleton, work.prepared.train, work.options
    halves = [_packed_halves(work, task) for task in tasks]
    groups: dict[str, tuple[str, int, list[int]]] = {}
    for place, task in enumerate(tasks):
        groups[mask_name("greedy", task.task, task.shots)] = (task.task, task.shots, [place])
    for shots in options.resolved_shots:
        places = [place for place, task in enumerate(tasks) if task.shots == shots and in_domain(task.task)]
        if len(places) > 1:
            groups[mask_name("greedy", AGGREGATE, shots)] = (AGGREGATE, shots, places)

    def score(step: int, asked: Mapping[str, prune.Request]) -> dict[str, prune.Answer]:
        part, label = f"prune-{step:05d}", f"prune, step {step + 1}"
        return _score_step(work, halves, groups, part, label, asked)

    attention, projection, ffn = skeleton.weights_by_part
    plan = prune.SearchPlan(
        skeleton.layers,
        skeleton.heads,
        options.direction,
        options.order,
        head_parameters=(attention + projection) // skeleton.heads,
        ffn_parameters=ffn,
    )
    searches = {name: prune.greedy_search(plan, options.tolerance) for name in groups}
    found = prune.in_lockstep(searches, score)
    gathered.warnings += _unsettled(found, options.tolerance)
    by_gradient: dict[str, Mask] = {}
    for name, (task_name, shots, _) in groups.items():
        key, mask = RankingKey(task_name, shots, "gradient"), found[name].mask
        if key in gathered.rankings:
            by_gradient[name] = lowest_heads(gathered.rankings[key], len(mask.heads)) | lowest_ffns(
                gathered.ffn_rankings[key], len(mask.ffns)
            )
    asked = {name: prune.Request("check", (Mask(), mask)) for name, mask in by_gradient.items()}
    answers = _score_step(work, halves, groups, "prune-compared", "compare masks", asked) if asked else {}
    made: list[MadeMask] = []
    told: list[Row] = []
    for name, (task_name, shots, places) in groups.items():
        result, mask = found[name], found[name].mask
        heads, ffns = len(mask.heads), len(mask.ffns)
        documents = sum(len(tasks[place].documents) for place in places)
        checked = [("greedy", mask, result.lost, result.lost_stderr)]
        if name in answers:
            clean, pruned = (tuple(group[at : at + 1] for group in answers[name]) for at in (0, 1))
            checked.append(("gradient", by_gradient[name], *prune.loss_with_stderr(clean, pruned)))
        for method, of_method, lost, stderr in checked:
            told.append(
                {
                    "task": task_name,
                    "shots": shots,
                    "method": method,
                    "mask": mask_name(method, task_name, shots),
                    "check_loss": lost,
                    "stderr": stderr,
                }
            )
            if method == "gradient":
                made.append(
                    MadeMask(
                        mask_name(method, task_name, shots),
                        of_method,
                        method,
                        task_name,
                        shots,
                        documents,
                        None,
                    )
                )
        instead = len(checked) == 2 and checked[1][2] < checked[0][2]
        returned = by_gradient[name] if instead else mask
        note = INSTEAD if instead else ""
        made.append(MadeMask(name, returned, "greedy", task_name, shots, documents, None, note=note))
        drawn = random_mask(skeleton.layers, skeleton.heads, heads, ffns, options.seed)
        drawn_name = mask_name("random", task_name, shots)
        made.append(MadeMask(drawn_name, drawn, "random", task_name, shots, documents, options.seed))
    return made, told


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
    part: str,
    label: str,
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
    scores = work.sweep("prune", part, label, lambda: jobs, keep_clean=True)
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
>>>>>>> wt-B
