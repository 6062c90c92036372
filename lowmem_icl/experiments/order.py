"""The experiments in the order in which they build on each other. Adding one is a folder, a row here, and its section of the page."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowmem_icl.experiments.ablate import stage as ablate
from lowmem_icl.experiments.evaluate import stage as evaluate
from lowmem_icl.experiments.importance import stage as importance
from lowmem_icl.experiments.induction import stage as induction
from lowmem_icl.experiments.overlap import stage as overlap
from lowmem_icl.experiments.prune import stage as prune
from lowmem_icl.options import Experiment
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.work import OutOfTime, Part, Work

Share = Literal["whole", "beside", "stretched", "postponed"]


@dataclass(frozen=True)
class Stage:
    """One experiment's story.

<<<<<<< HEAD
    `needs`: the stages whose results it is given as parameters, None for those that were not asked for.
    `parts`: (prepared, **needs) to the work it asks for; the planner counts it, `run` does it.
    `run`: (work, **needs) to its result, as often as there is more to show.
    `expected`: a stand-in for its result before there is one, by which the planner describes later stages.
    `share`: what it gets of limited hours. `whole`: all it takes, the others build on it; `beside`: what it takes, as far as
    there is time; `stretched`: it goes on while there is time; `postponed`: it waits for another run where that is too little.
    `rough`: how much it takes depends on what it finds.
=======

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
>>>>>>> wt-B
    """

    name: Experiment
    needs: tuple[Experiment, ...]
    parts: Callable[..., Iterable[Part]]
    run: Callable[..., Iterator[StageResult]]
    expected: Callable[[Prepared], StageResult] = lambda prepared: StageResult()
    share: Share = "beside"
    rough: bool = False

    def given(self, results: Mapping[str, StageResult]) -> dict[str, Any]:
        """Return what it needs of the results there are."""
        return {name: results.get(name) for name in self.needs}


STAGES = (
    Stage("evaluate", (), evaluate.parts, evaluate.run, share="whole"),
    Stage("importance", (), importance.parts, importance.run, importance.expected, share="whole"),
    Stage("ablate", ("importance",), ablate.parts, ablate.run, ablate.expected, share="stretched"),
    Stage(
        "prune",
        ("importance", "ablate"),
        prune.parts,
        prune.run,
        prune.expected,
        share="postponed",
        rough=True,
    ),
    Stage("induction", ("importance", "ablate", "prune"), induction.parts, induction.run, rough=True),
    Stage("overlap", ("importance", "ablate"), overlap.parts, overlap.run),
)


def run_stages(
    work: Work, deadlines: Mapping[str, float], postponed: frozenset[str]
) -> Iterator[tuple[Stage, StageResult, bool]]:
    """Run the experiments asked for; yields each one's result whenever it has more, and whether it is over.

    deadlines: by experiment, the time by the work's clock at which it must stop. What does not get done in the time there is
    says so in its result.
    """
    results: dict[str, StageResult] = {}
    for stage in STAGES:
        if stage.name not in work.prepared.options.experiments:
            continue
        latest = StageResult()
        if stage.name in postponed:
            latest = StageResult(
                unfinished=f"{stage.name}: waits until the ablations are done; the same command continues"
            )
        else:
            try:
                timed = replace(work, deadline=deadlines.get(stage.name, float("inf")))
                for latest in stage.run(timed, **stage.given(results)):
                    yield stage, latest, False
                results[stage.name] = latest
            except OutOfTime:
                sentence = (
                    f"{stage.name}: the time was over before it was finished; the same command continues"
                )
                latest = replace(latest, unfinished=sentence)
        yield stage, latest, True
