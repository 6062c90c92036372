"""The experiments of a run in order, each from finished parts or from sweeps, each to table rows and masks."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lowmem_icl.experiments.ablate.stage import run_ablate
from lowmem_icl.experiments.evaluate import measure as evaluate
from lowmem_icl.experiments.evaluate.stage import evaluation_rows
from lowmem_icl.experiments.importance import measure as importance
from lowmem_icl.experiments.importance.stage import importance_of, unit_gradient_arrays
from lowmem_icl.experiments.induction.stage import run_induction
from lowmem_icl.experiments.overlap import measure as overlap
from lowmem_icl.experiments.prune.stage import run_prune
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey, mean_of_normalised, mean_of_ranks, mean_of_scores
from lowmem_icl.session.work import AGGREGATE, Gathered, OutOfTime, Work
from lowmem_icl.statistics.resampling import DocumentRanking, DocumentScores
from lowmem_icl.tasks.sources import in_domain


def run_evaluate(work: Work, gathered: Gathered, masks: Mapping[str, Mask]) -> None:
    """Evaluate all tasks clean and under given masks, on the evaluation split."""
    rows = evaluation_rows(work, "evaluate", gathered.answers, masks)
    shared = [row for row in rows if in_domain(row["task"])]
    rows += list(evaluate.mean_over_tasks(shared, ("shots", "mask", "heads_removed", "ffns_removed")))
    gathered.results["evaluate"] = [{"experiment": "evaluate"} | row for row in rows]


def run_importance(work: Work, gathered: Gathered) -> None:
    """Score heads and FFNs of all tasks by their gradients, on the training documents, in two reads."""
    tasks = work.prepared.importance
    arrays = unit_gradient_arrays(work, "importance", "importance", "importance")
    columns: list[dict[str, Any]] = []
    by_shots: dict[int, list[importance.Importance]] = {}
    for number, task in enumerate(work.prepared.pack(task) for task in tasks):
        scores = importance_of(work, task, number, arrays)
        columns += importance.importance_columns(task, scores)
        name, shots = task.task.task, task.task.shots
        gathered.importance[name, shots] = scores
        gathered.rankings[RankingKey(name, shots, "gradient")] = scores.gradient_heads
        gathered.rankings[RankingKey(name, shots, "attribution")] = scores.attribution_heads.mean(0)
        gathered.ffn_rankings[RankingKey(name, shots, "gradient")] = scores.gradient_ffns
        attribution = scores.attribution_heads.reshape(len(scores.attribution_heads), -1)
        for method, of_documents in (
            ("gradient", scores.head_documents),
            ("attribution", DocumentScores.of_mean(name, attribution, task.task.clusters)),
        ):
            key = RankingKey(name, shots, method)
            gathered.document_rankings[key] = DocumentRanking((of_documents,))
        if in_domain(name):
            by_shots.setdefault(shots, []).append(scores)
    for shots, members in by_shots.items():
        if len(members) > 1:
            heads = [member.gradient_heads for member in members]
            ffns = [member.gradient_ffns for member in members]
            ranks, ffn_ranks = mean_of_ranks(heads), mean_of_ranks(ffns)
            documents = sum(
                len(task.documents) for task in tasks if task.shots == shots and in_domain(task.task)
            )
            for metric, of_heads, of_ffns in (
                ("gradient", mean_of_scores(heads), mean_of_scores(ffns)),
                ("gradient_rank", ranks, ffn_ranks),
                ("gradient_normalised", mean_of_normalised(heads), mean_of_normalised(ffns)),
            ):
                base = {"task": AGGREGATE, "shots": shots, "split": "train", "documents": documents}
                columns += importance.unit_columns(base, metric, {"value": of_heads}, {"value": of_ffns})
            raw = work.options.protocol_choices.aggregate_of_raw_scores
            key = RankingKey(AGGREGATE, shots, "gradient")
            gathered.rankings[key] = mean_of_scores(heads) if raw else ranks
            gathered.ffn_rankings[key] = mean_of_scores(ffns) if raw else ffn_ranks
            gathered.document_rankings[key] = DocumentRanking(
                tuple(member.head_documents for member in members), "scores" if raw else "ranks"
            )
    gathered.columns["importance"] = columns


def run_overlap(work: Work, gathered: Gathered) -> None:
    """Compare all rankings that the run has made."""
    if not gathered.rankings:
        gathered.warnings.append("overlap: no rankings to compare; run it with importance or ablate")
    rows = overlap.overlap_rows(gathered.rankings, gathered.document_rankings, work.options.seed)
    gathered.results["overlap"] = [{"experiment": "overlap"} | row for row in rows]


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
