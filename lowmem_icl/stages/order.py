"""The experiments of a run in order, each from finished parts or from sweeps, each to table rows and masks."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from numpy.typing import NDArray

from lowmem_icl.engine.stream import unit_gradients
from lowmem_icl.experiments import ablate, evaluate, importance, overlap
from lowmem_icl.masks import Mask
from lowmem_icl.rankings import mean_of_ranks, mean_of_scores
from lowmem_icl.stages.evaluating import evaluation_rows
from lowmem_icl.stages.pruning import run_prune
from lowmem_icl.stages.work import ABLATE_CHUNK, AGGREGATE, Gathered, Work


def run_evaluate(work: Work, gathered: Gathered, masks: Mapping[str, Mask]) -> None:
    """Evaluate all tasks clean and under given masks, on the evaluation split."""
    rows = evaluation_rows(work, gathered.answers, masks)
    rows += list(evaluate.mean_over_tasks(rows, ("shots", "mask", "heads_removed", "ffns_removed")))
    gathered.results += [{"experiment": "evaluate"} | row for row in rows]


def run_importance(work: Work, gathered: Gathered) -> None:
    """Score heads and FFNs of all tasks by their gradients, on the training documents, in two reads."""
    tasks = work.prepared.train
    packed = [work.prepared.pack(task, gold_only=True) for task in tasks]
    fields = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed", "logprobs")

    def make() -> dict[str, NDArray[Any]]:
        total = 2 * work.model.skeleton.layers * sum(task.packed.token_count for task in packed)
        with work.progress("importance", total, "layer-tokens") as advance:
            gradients = unit_gradients(
                work.model,
                [task.packed.rows for task in packed],
                [len(task.task.documents) for task in packed],
                [partial(importance.choose_gold, task) for task in packed],
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
