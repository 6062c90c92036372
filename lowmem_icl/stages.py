"""The experiments of a run, each from finished parts or from sweeps, each to table rows and masks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.config import RunOptions
from lowmem_icl.engine.stream import Scores, sweep, unit_gradients
from lowmem_icl.engine.waves import Job, SweepMemory, layer_tokens
from lowmem_icl.experiments import ablate, evaluate, importance, overlap, prune
from lowmem_icl.masks import Mask
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.naming import mask_name
from lowmem_icl.parts import Parts
from lowmem_icl.prepare import Prepared
from lowmem_icl.rankings import (
    lowest_ffns,
    lowest_heads,
    mean_of_ranks,
    mean_of_scores,
    random_mask,
)
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.scoring import document_scores

EVALUATE_CHUNK = 128
ABLATE_CHUNK = 16
AGGREGATE = "aggregate"

Row = dict[str, Any]
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class MadeMask:
    """A mask that a run made: for which task and shot count, by which method, from how many documents."""

    name: str
    mask: Mask
    method: str
    task: str
    shots: int
    documents: int
    seed: int | None
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass
class Gathered:
    """What the experiments of a run put together: table rows, table columns, masks and warnings."""

    results: list[Row] = field(default_factory=list)
    effects: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    masks: list[MadeMask] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rankings: dict[overlap.RankingKey, NDArray[np.float64]] = field(default_factory=dict)
    ffn_rankings: dict[overlap.RankingKey, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What every stage needs: the documents, the model, the memory for residuals, and where finished parts are."""

    options: RunOptions
    prepared: Prepared
    model: StreamedModel
    memory: SweepMemory
    parts: Parts
    progress: Progress
    spill_folder: Path

    def sweep(self, name: str, label: str, jobs: Callable[[], Sequence[Job]]) -> list[Scores]:
        """Return the scores of a part's jobs, from its file or by sweeping."""

        def make() -> dict[str, NDArray[Any]]:
            wanted = jobs()
            total = layer_tokens(wanted, self.model.skeleton.layers)
            with self.progress(label, total) as advance:
                scores = sweep(
                    self.model, wanted, memory=self.memory, spill_folder=self.spill_folder, advance=advance
                )
            arrays: dict[str, NDArray[Any]] = {"jobs": np.array(len(wanted))}
            for number, score in enumerate(scores):
                arrays |= {f"{number}.logprobs": score.logprobs, f"{number}.greedy": score.greedy}
            return arrays

        arrays = self.parts.get_or_make(name, make)
        return [
            Scores(arrays[f"{number}.logprobs"], arrays[f"{number}.greedy"])
            for number in range(int(arrays["jobs"]))
        ]

    def sweep_in_chunks(
        self,
        name: str,
        label: str,
        tasks: Sequence[TaskRows],
        masks: Sequence[tuple[Mask, ...]],
        chunk: int,
    ) -> list[Scores]:
        """Sweep tasks in chunks of documents, a part each; return the whole scores of every task.

        Packing goes by chunk, whatever the memory, so that a chunk's result is always the same.
        """
        longest = max(len(task.documents) for task in tasks)
        per_task: list[list[Scores]] = [[] for _ in tasks]
        starts = range(0, longest, chunk)
        for number, start in enumerate(starts):
            here = [place for place, task in enumerate(tasks) if start < len(task.documents)]

            def jobs(here: list[int] = here, start: int = start) -> list[Job]:
                packed = [self.prepared.pack(tasks[place], slice(start, start + chunk)).packed for place in here]
                return [Job(rows, masks[place]) for rows, place in zip(packed, here, strict=True)]

            shown = label if len(starts) == 1 else f"{label} {number + 1}/{len(starts)}"
            scores = self.sweep(f"{name}-{start:06d}", shown, jobs)
            for place, score in zip(here, scores, strict=True):
                per_task[place].append(score)
        return [
            Scores(
                np.concatenate([score.logprobs for score in chunks], axis=1),
                np.concatenate([score.greedy for score in chunks], axis=1),
            )
            for chunks in per_task
        ]


def run_evaluate(work: Work, gathered: Gathered, masks: Mapping[str, Mask]) -> None:
    """Evaluate all tasks clean and under given masks, on the evaluation split."""
    tasks = work.prepared.evaluate
    names = [evaluate.CLEAN, *masks]
    wanted = (Mask(), *masks.values())
    scores = work.sweep_in_chunks("evaluate", "evaluate", tasks, [wanted] * len(tasks), EVALUATE_CHUNK)
    rows: list[Row] = []
    for task, score in zip(tasks, scores, strict=True):
        packed = work.prepared.pack(task)
        for name, mask, logprobs, greedy in zip(names, wanted, score.logprobs, score.greedy, strict=True):
            rows += evaluate.evaluation_rows(packed, name, mask, logprobs, greedy, work.options.seed)
            gathered.answers.append(evaluate.answer_columns(packed, name, logprobs))
    rows += list(evaluate.mean_over_tasks(rows, ("shots", "mask", "heads_removed", "ffns_removed")))
    gathered.results += [{"experiment": "evaluate"} | row for row in rows]


def run_importance(work: Work, gathered: Gathered) -> None:
    """Score heads and FFNs of all tasks by their gradients, on the training documents, in two reads."""
    tasks = work.prepared.train
    packed = [work.prepared.pack(task, gold_only=True) for task in tasks]
    fields = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed", "logprobs")

    def make() -> dict[str, NDArray[Any]]:
        total = 2 * work.model.skeleton.layers * sum(task.packed.token_count for task in packed)
        with work.progress("importance", total) as advance:
            gradients = unit_gradients(
                work.model,
                [task.packed.rows for task in packed],
                [len(task.task.documents) for task in packed],
                [lambda values, task=task: importance.choose_gold(task, values) for task in packed],
                option_counts=[task.packed.option_count for task in packed],
                memory=work.memory,
                spill_folder=work.spill_folder,
                advance=advance,
            )
        return {
            f"{number}.{name}": getattr(gradient, name)
            for number, gradient in enumerate(gradients)
            for name in fields
        }

    arrays = work.parts.get_or_make("importance", make)
    by_shots: dict[int, list[importance.Importance]] = {}
    for number, task in enumerate(packed):
        scores = importance.importance(task, *(arrays[f"{number}.{name}"] for name in fields))
        gathered.results += importance.importance_rows(task, scores)
        name, shots = task.task.task, task.task.shots
        gathered.rankings[overlap.RankingKey(name, shots, "gradient")] = scores.gradient_heads
        gathered.rankings[overlap.RankingKey(name, shots, "attribution")] = scores.attribution_heads.mean(0)
        gathered.ffn_rankings[overlap.RankingKey(name, shots, "gradient")] = scores.gradient_ffns
        by_shots.setdefault(shots, []).append(scores)
    for shots, members in by_shots.items():
        if len(members) > 1:
            heads = [member.gradient_heads for member in members]
            ffns = [member.gradient_ffns for member in members]
            ranks, ffn_ranks = mean_of_ranks(heads), mean_of_ranks(ffns)
            documents = sum(len(task.documents) for task in tasks if task.shots == shots)
            for metric, of_heads, of_ffns in (
                ("gradient", mean_of_scores(heads), mean_of_scores(ffns)),
                ("gradient_rank", ranks, ffn_ranks),
            ):
                gathered.results += importance.unit_rows(
                    {"task": AGGREGATE, "shots": shots, "split": "train", "documents": documents},
                    metric,
                    of_heads,
                    of_ffns,
                )
            gathered.rankings[overlap.RankingKey(AGGREGATE, shots, "gradient")] = ranks
            gathered.ffn_rankings[overlap.RankingKey(AGGREGATE, shots, "gradient")] = ffn_ranks


def run_ablate(work: Work, gathered: Gathered) -> None:
    """Remove every head and every FFN alone, on the training documents."""
    skeleton, tasks = work.model.skeleton, work.prepared.train
    units = ablate.ablated_units(skeleton.layers, skeleton.heads)
    masks = ablate.ablation_masks(skeleton.layers, skeleton.heads)
    scores = work.sweep_in_chunks("ablate", "ablate", tasks, [masks] * len(tasks), ABLATE_CHUNK)
    head_count = skeleton.layers * skeleton.heads
    for task, score in zip(tasks, scores, strict=True):
        packed = work.prepared.pack(task)
        lost = ablate.drops(packed, score.logprobs, score.greedy)
        gathered.results += [
            {"experiment": "ablate"} | row for row in ablate.drop_rows(packed, units, lost, work.options.seed)
        ]
        gathered.effects.append({"experiment": "ablate"} | ablate.effect_columns(packed, units, lost))
        mean_drop = lost.by_document["gold_logprob"].mean(1)[:head_count]
        key = overlap.RankingKey(task.task, task.shots, "ablation")
        gathered.rankings[key] = mean_drop.reshape(skeleton.layers, skeleton.heads)


def run_prune(work: Work, gathered: Gathered) -> None:
    """Search greedy masks on the training documents; report them beside others of equal size on the evaluation split."""
    masks = _search_masks(work, gathered)
    tasks = work.prepared.evaluate
    of_task = [
        [made for made in masks if made.shots == task.shots and made.task in (task.task, AGGREGATE)]
        for task in tasks
    ]
    scores = work.sweep_in_chunks(
        "prune-evaluate",
        "evaluate masks",
        tasks,
        [(Mask(), *(made.mask for made in members)) for members in of_task],
        EVALUATE_CHUNK,
    )
    rows: list[Row] = []
    clean: list[Row] = []
    for task, members, score in zip(tasks, of_task, scores, strict=True):
        packed = work.prepared.pack(task)
        clean += evaluate.evaluation_rows(
            packed, evaluate.CLEAN, Mask(), score.logprobs[0], score.greedy[0], work.options.seed
        )
        for made, logprobs, greedy in zip(members, score.logprobs[1:], score.greedy[1:], strict=True):
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
    gathered.results += [{"experiment": "prune"} | row for row in rows]
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
    return MadeMask(**(vars(made) | {"scores": scores}))


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
    made: list[MadeMask] = []
    for name, (task_name, shots, places) in groups.items():
        result = found[name]
        documents = sum(len(tasks[place].documents) for place in places)
        made.append(MadeMask(name, result.mask, "greedy", task_name, shots, documents, None))
        if work.options.tolerance < 2 * result.lost_stderr:
            gathered.warnings.append(
                f"{name}: the tolerance {work.options.tolerance:g} is below two standard errors "
                f"({2 * result.lost_stderr:.3g}) of the loss it is compared with; more --train-limit would settle it"
            )
        heads, ffns = len(result.mask.heads), len(result.mask.ffns)
        key = overlap.RankingKey(task_name, shots, "gradient")
        if key in gathered.rankings:
            by_gradient = lowest_heads(gathered.rankings[key], heads) | lowest_ffns(gathered.ffn_rankings[key], ffns)
            other = mask_name("gradient", task_name, shots)
            made.append(MadeMask(other, by_gradient, "gradient", task_name, shots, documents, None))
        seed = work.options.seed
        drawn = random_mask(skeleton.layers, skeleton.heads, heads, ffns, seed)
        made.append(MadeMask(mask_name("random", task_name, shots), drawn, "random", task_name, shots, documents, seed))
    return made


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
    """Score what all searches ask for in one sweep: the half asked for of each of a search's tasks."""
    wanted = [
        (name, halves[place][request.half], request.masks)
        for name, request in asked.items()
        for place in groups[name][2]
    ]
    scores = work.sweep(
        f"prune-{step:05d}",
        f"prune, step {step + 1}",
        lambda: [Job(packed.packed, masks) for _, packed, masks in wanted],
    )
    answers: dict[str, list[NDArray[np.float64]]] = {name: [] for name in asked}
    for (name, packed, _), score in zip(wanted, scores, strict=True):
        objective = [
            document_scores(packed.task, packed.by_document(logprobs), packed.by_document(greedy))[
                work.options.objective
            ]
            for logprobs, greedy in zip(score.logprobs, score.greedy, strict=True)
        ]
        answers[name].append(np.stack(objective))
    return {name: tuple(members) for name, members in answers.items()}


def run_overlap(work: Work, gathered: Gathered) -> None:
    """Compare all rankings that the run has made."""
    if not gathered.rankings:
        gathered.warnings.append("overlap: no rankings to compare; run it with importance or ablate")
    gathered.results += [{"experiment": "overlap"} | row for row in overlap.overlap_rows(gathered.rankings)]


STAGES: dict[str, Callable[[Work, Gathered], None]] = {
    "evaluate": lambda work, gathered: run_evaluate(work, gathered, {}),
    "importance": run_importance,
    "ablate": run_ablate,
    "prune": run_prune,
    "overlap": run_overlap,
}


def run_stages(work: Work, gathered: Gathered) -> Iterator[str]:
    """Run the experiments asked for, in the order in which they build on each other; yield each one's name."""
    for name, stage in STAGES.items():
        if name in work.options.experiments:
            stage(work, gathered)
            yield name
