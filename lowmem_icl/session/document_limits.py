"""How many documents of which part of a task a run needs."""

from collections.abc import Sequence
from functools import partial

from lowmem_icl.errors import InputError
from lowmem_icl.options import RunOptions
from lowmem_icl.statistics.certificate import documents_needed
from lowmem_icl.tasks.document_counts import DocumentLimit
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.selection import Part

BOUNDED_OBJECTIVES = ("gold_prob", "acc")
"""Of one document no more than 1 can be lost, which a certificate builds on."""
TIMES_NEEDED = 2
"""By default: with only as many documents as are needed, a mask that loses anything at all has no chance."""


def certify_limit(options: RunOptions) -> int:
    """Return how many training documents beyond the search's may certify a mask; 0: no certificate."""
    if options.objective not in BOUNDED_OBJECTIVES:
        return 0
    if options.certify_limit is None:
        return TIMES_NEEDED * documents_needed(options.tolerance)
    return options.certify_limit


def check_objective(options: RunOptions, tasks: Sequence[OpenTask]) -> None:
    """Raise InputError where a search is to keep what documents of a task do not have.

    With one option gold_prob is 1 whatever is removed, so that a search would remove everything.
    """
    without = [task.name for task in tasks if not task.has_alternatives]
    if "prune" in options.experiments and options.objective == "gold_prob" and without:
        raise InputError(
            f"--objective gold_prob: documents of {', '.join(without)} have one option each, whose share is "
            "always 1; ask for --objective gold_logprob, or leave prune out of --experiments"
        )


def part_limits(options: RunOptions) -> dict[str, tuple[Part, DocumentLimit]]:
    """Return the part and the limit of the documents that a run needs, by field of Prepared.

    Those of `certify` begin with those of `train`, which have then to be left out.
    """
    limit, train_limit = options.resolved_limit, options.resolved_train_limit
    limits: dict[str, tuple[Part, DocumentLimit]] = {
        "evaluate": ("evaluate", DocumentLimit(limit)),
        "train": ("train", DocumentLimit(train_limit)),
        "importance": ("importance", DocumentLimit(options.resolved_importance_limit)),
        "curves": ("evaluate", DocumentLimit(options.resolved_curve_limit, most=limit)),
    }
    further = certify_limit(options)
    if further and "prune" in options.experiments:
        limits["certify"] = ("train", DocumentLimit(train_limit, further=further))
    return limits


def count_prompts(tasks: Sequence[OpenTask], options: RunOptions) -> int:
    """Return about how many prompts a run has with right labels."""
    limits = part_limits(options)
    return sum(
        rows if share is None else min(share, rows)
        for task in tasks
        for part, limit in {limits["evaluate"], limits.get("certify", limits["train"])}
        for counts in [[len(member.scored(part)) for member in task.members]]
        for share, rows in zip(limit.shares([partial(int, count) for count in counts]), counts, strict=True)
    ) * len(options.resolved_shots)
