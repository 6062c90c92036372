"""The experiments of a run in order, each from finished parts or from sweeps, each to table rows and masks."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from numpy.typing import NDArray

from lowmem_icl.engine.gradients import UnitGradients
from lowmem_icl.engine.stream import unit_gradients
from lowmem_icl.engine.waves import gradients_cost, operations
from lowmem_icl.experiments import evaluate, importance, overlap
from lowmem_icl.experiments.overlap import RankingKey
from lowmem_icl.masks import Mask
from lowmem_icl.parts import Draft
from lowmem_icl.rankings import mean_of_ranks, mean_of_scores
from lowmem_icl.stages.ablating import run_ablate
from lowmem_icl.stages.evaluating import evaluation_rows
from lowmem_icl.stages.inducing import run_induction
from lowmem_icl.stages.pruning import run_prune
from lowmem_icl.stages.work import AGGREGATE, Gathered, OutOfTime, Work


def run_evaluate(work: Work, gathered: Gathered, masks: Mapping[str, Mask]) -> None:
    """Evaluate all tasks clean and under given masks, on the evaluation split."""
    rows = evaluation_rows(work, "evaluate", gathered.answers, masks)
    rows += list(evaluate.mean_over_tasks(rows, ("shots", "mask", "heads_removed", "ffns_removed")))
    gathered.results["evaluate"] = [{"experiment": "evaluate"} | row for row in rows]


def run_importance(work: Work, gathered: Gathered) -> None:
    """Score heads and FFNs of all tasks by their gradients, on the training documents, in two reads."""
    tasks, skeleton = work.prepared.train, work.model.skeleton

    def make(draft: Draft) -> dict[str, NDArray[Any]]:
        packed = [work.prepared.pack(task, gold_only=True) for task in tasks]
        gradients = [
            UnitGradients.unmade(
                len(task.task.documents), task.packed.option_count, skeleton.layers, skeleton.heads
            )
            for task in packed
        ]

        def arrays() -> dict[str, NDArray[Any]]:
            return {
                f"{number}.{name}": array
                for number, gradient in enumerate(gradients)
                for name, array in gradient.arrays().items()
            }

        def after_block() -> None:
            draft.now_and_then()
            work.check_time("importance")

        draft.begin(arrays)
        total = operations(gradients_cost([task.packed for task in packed], skeleton.layers), skeleton)
        with work.progress("importance", total, "operations") as advance:
            unit_gradients(
                work.model,
                [task.packed.rows for task in packed],
                [partial(importance.choose_gold, task) for task in packed],
                gradients,
                limits=work.limits,
                cache=work.cache,
                after_block=after_block,
                account=work.account(advance),
            )
        return arrays()

    arrays = work.parts.get_or_make("importance", make)
    columns: list[dict[str, Any]] = []
    by_shots: dict[int, list[importance.Importance]] = {}
    for number, task in enumerate(work.prepared.pack(task) for task in tasks):
        fields = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed", "logprobs")
        scores = importance.importance(task, *(arrays[f"{number}.{name}"] for name in fields))
        columns += importance.importance_columns(task, scores)
        name, shots = task.task.task, task.task.shots
        gathered.importance[name, shots] = scores
        gathered.rankings[RankingKey(name, shots, "gradient")] = scores.gradient_heads
        gathered.rankings[RankingKey(name, shots, "attribution")] = scores.attribution_heads.mean(0)
        gathered.ffn_rankings[RankingKey(name, shots, "gradient")] = scores.gradient_ffns
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
                base = {"task": AGGREGATE, "shots": shots, "split": "train", "documents": documents}
                columns += importance.unit_columns(base, metric, {"value": of_heads}, {"value": of_ffns})
            gathered.rankings[RankingKey(AGGREGATE, shots, "gradient")] = ranks
            gathered.ffn_rankings[RankingKey(AGGREGATE, shots, "gradient")] = ffn_ranks
    gathered.columns["importance"] = columns


def run_overlap(work: Work, gathered: Gathered) -> None:
    """Compare all rankings that the run has made."""
    if not gathered.rankings:
        gathered.warnings.append("overlap: no rankings to compare; run it with importance or ablate")
    gathered.results["overlap"] = [
        {"experiment": "overlap"} | row for row in overlap.overlap_rows(gathered.rankings)
    ]


def run_stages(work: Work, gathered: Gathered, masks: Mapping[str, Mask]) -> Iterator[str | None]:
    """Run the experiments asked for, in the order in which they build on each other.

    Yields each one's name when it is over, and None whenever there is more to show before that. What does not get done
    in the time there is is named in `gathered.left`.
    """
    stages: dict[str, Callable[[], Iterator[None] | None]] = {
        "evaluate": lambda: run_evaluate(work, gathered, masks),
        "importance": lambda: run_importance(work, gathered),
        "ablate": lambda: run_ablate(work, gathered),
        "prune": lambda: run_prune(work, gathered),
        "induction": lambda: run_induction(work, gathered),
        "overlap": lambda: run_overlap(work, gathered),
    }
    for name, stage in stages.items():
        if name not in work.options.experiments:
            continue
        if name in work.skipped:
            gathered.left.append(f"{name}: waits until the ablations are done; the same command goes on")
            continue
        try:
            yield from stage() or ()
        except OutOfTime:
            gathered.left.append(
                f"{name}: the time was over before it was finished; the same command goes on"
            )
        yield name
