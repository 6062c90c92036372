"""The induction stage: heads scored on random sequences, then the top ones removed together, beside random draws."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.copying import REFERENCE_COPYING, CopyingForm
from lowmem_icl.engine.cost import SweepCost, operations
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores, Journey, heads_cost
from lowmem_icl.engine.passes import score_heads
from lowmem_icl.engine.schedule import Job
from lowmem_icl.experiments.ablate import measure as ablate
from lowmem_icl.experiments.evaluate import measure as evaluate
from lowmem_icl.experiments.induction import measure as induction
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.families import Skeleton
from lowmem_icl.options import RunOptions
from lowmem_icl.rows import stem_of
from lowmem_icl.session.parts import SECONDS_BETWEEN_DRAFTS, Draft
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.work import Gathered, MadeMask, OutOfTime, Row, Work, chunk_jobs, joined
from lowmem_icl.statistics.intervals import means_with_intervals
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.sources import in_domain

PART = "induction"
EVALUATION_PART = "induction-evaluate"
DRAWN_DOCUMENTS = slice(0, 32)
"""Documents of every task that induction heads and all random draws beside them are removed for."""
MORE_DOCUMENTS = slice(32, 512)
"""Those that only induction heads are removed for."""
SEQUENCES_NAME = "random-sequences"


def copying_form(options: RunOptions) -> CopyingForm:
    """Return how copying is scored."""
    if options.protocol_choices.copying_of_own_token:
        return REFERENCE_COPYING
    chosen = options.copying_with
    return CopyingForm("norm" in chosen, "softmax" in chosen, "bias" in chosen)


def head_questions(options: RunOptions, prepared: Prepared) -> HeadQuestions:
    """Return the rows that heads are scored on."""
    sequences = prepared.random_sequences(options.seed)
    return HeadQuestions(
        tuple(stem_of(tokens.tolist()) for tokens in sequences.repeated),
        tuple(stem_of(tokens.tolist()) for tokens in sequences.unrepeated),
        sequences.base_tokens,
        copying_form(options),
        spurious=options.protocol_choices.spurious_prefix_entries,
    )


def causal_tasks(prepared: Prepared) -> list[TaskRows]:
    """Return the tasks and shot counts that the causal check is about: those with demonstrations."""
    return [task for task in prepared.evaluate if task.shots > 0]


def causal_masks(count: int, layer: int) -> tuple[Mask, ...]:
    """Return as many masks as the causal check sweeps, for planning: the heads' own, the draws, and the clean run."""
    return (Mask(), *(Mask(frozenset([(layer, 0)])),) * (count + 1))


def run_induction(work: Work, gathered: Gathered) -> None:
    """Score all heads; compare them with all rankings and masks there are; remove the induction heads."""
    gathered.record["induction"] = work.prepared.random_sequences(work.options.seed).told()
    questions = head_questions(work.options, work.prepared)
    scores = _scores(work, questions)
    means = {name: getattr(scores, name).mean(0) for name in ("prefix_matching", "previous_token", "copying")}
    _gather_scores(work, gathered, questions, scores, means)
    _check_cause(work, gathered, means, len(questions.base_tokens))


def _scores(work: Work, questions: HeadQuestions) -> HeadScores:
    skeleton, limits = work.model.skeleton, work.limits

    def make(draft: Draft) -> dict[str, NDArray[Any]]:
        work.check_time("induction")
        scores = HeadScores.unmade(len(questions.base_tokens), skeleton.layers, skeleton.heads)
        draft.begin(scores.arrays)
        rows = Draft(work.parts.folder / f"{PART}-rows.begun.npz")
        # On another device the rows come back only at the end.
        keeps_rows = work.model.device.type == "cpu"
        kept = work.clock()

        def begin(journey: Journey) -> None:
            wanted = journey.places.copy()
            if keeps_rows:
                rows.begin(journey.arrays)
            if not np.array_equal(journey.places, wanted):
                # Other rows of the same length: they begin anew.
                journey.places[:], journey.next_layer[:] = wanted, 0

        def after_layer() -> None:
            nonlocal kept
            try:
                work.check_time("induction")
                if work.clock() - kept < SECONDS_BETWEEN_DRAFTS:
                    return
            except OutOfTime:
                _keep(draft, rows)
                raise
            _keep(draft, rows)
            kept = work.clock()

        total = _planned_operations(work, questions)
        with work.progress("induction", total, "operations") as advance:
            score_heads(
                work.model,
                questions,
                scores,
                limits=limits,
                begin=begin,
                after_layer=after_layer,
                account=work.account(advance),
            )
        rows.discard()
        return scores.arrays()

    return HeadScores(**work.parts.get_or_make(PART, make))


def _keep(draft: Draft, rows: Draft) -> None:
    """Keep scores first: rows say how far they are, and must not be ahead."""
    draft.keep()
    rows.keep()


def _planned_operations(work: Work, questions: HeadQuestions) -> int:
    """Return the operations that are told as progress: those of the layers."""
    cost = questions_cost(questions, work.model.skeleton, work.limits.micro_batch_tokens, 0)
    return operations(replace(cost, answers=0), work.model.skeleton)


def questions_cost(
    questions: HeadQuestions, skeleton: Skeleton, micro_batch_tokens: int, layers_read: float
) -> SweepCost:
    """Return what scoring heads on these rows takes."""
    copied = sum(len(row) for row in questions.unrepeated)
    tokens = copied + sum(len(row) for row in questions.repeated)
    return heads_cost(tokens, copied, skeleton, questions.form, micro_batch_tokens, layers_read)


def _gather_scores(
    work: Work,
    gathered: Gathered,
    questions: HeadQuestions,
    scores: HeadScores,
    means: Mapping[str, NDArray[np.float64]],
) -> None:
    form = questions.form
    chosen = {"norm": form.final_norm, "softmax": form.softmax, "bias": form.bias}
    copying = "reference" if form.own_token else "+".join(["output", *(n for n in chosen if chosen[n])])
    methods = {
        "prefix_matching": "reference" if questions.spurious else "exact",
        "previous_token": "exact",
        "duplicate_token": "exact",
        "copying": copying,
    }
    columns: list[dict[str, Any]] = []
    for name, method in methods.items():
        columns += induction.score_columns(name, method, getattr(scores, name))
    columns.append(induction.weight_columns("copying_eigenvalues", "weights", scores.copying_eigenvalues))
    ranked = {(key.task, key.shots, key.method): ranking for key, ranking in gathered.rankings.items()}
    rows: list[Row] = list(induction.overlap_rows(means["prefix_matching"], ranked))
    for capacity in induction.CAPACITIES:
        columns += induction.capacity_columns(capacity, means[capacity], ranked, work.options.seed)
        for made in gathered.masks:
            rows.append(
                induction.capacity_of_mask(capacity, means[capacity], made.mask)
                | {"task": made.task, "shots": made.shots, "method": made.method, "mask": made.name}
            )
    gathered.columns["induction"], gathered.results["induction"] = columns, rows


def _check_cause(
    work: Work, gathered: Gathered, means: Mapping[str, NDArray[np.float64]], sequences: int
) -> None:
    """Remove the top induction heads together, and as many others of the same layers, many times over."""
    seed = work.options.seed
    removed = induction.top_induction_heads(means["prefix_matching"])
    tasks = causal_tasks(work.prepared)
    if not removed.heads:
        gathered.warnings.append(
            f"induction: no head reaches a prefix-matching score of {induction.HEAD_SCORE}; none is removed"
        )
        return
    if not tasks:
        gathered.warnings.append("induction: no task has demonstrations; induction heads are not removed")
        return
    drawn = induction.random_draws(removed, means["prefix_matching"], means["previous_token"], seed)
    if not drawn:
        gathered.warnings.append(
            "induction: their layers have too few other heads for a random draw; they are removed without one"
        )
    masks = {evaluate.CLEAN: Mask(), induction.HEADS_MASK: removed}
    masks |= {f"{induction.RANDOM_MASK}-{number + 1:02d}": mask for number, mask in enumerate(drawn)}
    rows = _effect_rows(work, tasks, masks)
    fields = ("shots", "mask", "heads_removed", "ffns_removed", "method", "seed")
    rows += list(evaluate.mean_over_tasks([row for row in rows if in_domain(row["task"])], fields))
    rows += list(induction.band_rows([row for row in rows if row["method"] == "random"]))
    gathered.results["induction"] += [{"experiment": "induction"} | row for row in rows]
    gathered.masks += [
        MadeMask(
            name, mask, str(_made_by(name, seed)["method"]), SEQUENCES_NAME, 0, sequences, seed,
            {"split": "evaluation", "acc": _accuracies(rows, name), "acc_clean": _accuracies(rows, evaluate.CLEAN)},
        )
        for name, mask in masks.items()
        if name != evaluate.CLEAN
    ]  # fmt: skip


def causal_jobs(prepared: Prepared, tasks: Sequence[TaskRows], masks: Sequence[Mask]) -> list[Job]:
    """Return what the causal check sweeps: some documents under all masks, more under the first two, clean and heads."""
    return [
        *chunk_jobs(prepared, tasks, [tuple(masks)] * len(tasks), DRAWN_DOCUMENTS),
        *chunk_jobs(prepared, tasks, [tuple(masks[:2])] * len(tasks), MORE_DOCUMENTS),
    ]


def _effect_rows(work: Work, tasks: Sequence[TaskRows], masks: Mapping[str, Mask]) -> list[Row]:
    """Return the result rows of all masks, of which the first is the clean run and the second the induction heads."""
    swept = work.sweep(
        "induction",
        EVALUATION_PART,
        "induction heads removed",
        lambda: causal_jobs(work.prepared, tasks, list(masks.values())),
    )
    some, more = swept[: len(tasks)], iter(swept[len(tasks) :])
    rows: list[Row] = []
    for task, score in zip(tasks, some, strict=True):
        both = Scores(score.logprobs[:2], score.greedy[:2])
        if len(task.documents) > MORE_DOCUMENTS.start:
            both = joined([both, next(more)])
        everything = work.prepared.pack(task, slice(0, MORE_DOCUMENTS.stop))
        first_two = dict(list(masks.items())[:2])
        rows += _rows_of(everything, first_two, both, first_two, work.options.seed)
        drawn = {name: mask for name, mask in masks.items() if name not in first_two}
        if drawn:
            rows += _rows_of(
                work.prepared.pack(task, DRAWN_DOCUMENTS), masks, score, drawn, work.options.seed
            )
    return rows


def _rows_of(
    packed: PackedTask, masks: Mapping[str, Mask], scores: Scores, wanted: Mapping[str, Mask], seed: int
) -> Iterator[Row]:
    """Yield the result rows of the masks wanted, with the accuracy that each costs on the same documents."""
    lost = ablate.drops(packed, scores.logprobs, scores.greedy)
    drops = means_with_intervals(lost.accuracy, lost.accuracy_clusters, seed=seed)
    for place, (name, mask) in enumerate(masks.items()):
        if name not in wanted:
            continue
        made = _made_by(name, seed)
        for row in evaluate.evaluation_rows(
            packed, name, mask, scores.logprobs[place], scores.greedy[place], seed
        ):
            yield row | made
            shared = row
        if place:
            of_mask = {field: float(values[place - 1]) for field, values in drops._asdict().items()}
            yield shared | made | {"metric": "acc_drop", "chance": None} | of_mask


def _made_by(name: str, seed: int) -> dict[str, Any]:
    if name == evaluate.CLEAN:
        return {"method": None, "seed": None}
    return {"method": "induction" if name == induction.HEADS_MASK else "random", "seed": seed}


def _accuracies(rows: list[Row], mask: str) -> dict[str, float]:
    return {
        f"{row['task']}-{row['shots']}shot": row["value"]
        for row in rows
        if row["mask"] == mask and row["metric"] in ("acc", "em")
    }
