"""The two protocols: `corrected`, which the tool stands for, and `reference`, which does what the paper's
code does.

Every choice in which they differ is a field here, and nowhere else is a protocol asked for by its name. The
reference is the code published with Bansal et al. 2023 (amazon-science/llm-interpret at 9e09daa).
"""

from dataclasses import dataclass
from typing import Literal, get_args

ProtocolName = Literal["corrected", "reference"]
Ablation = Literal["zero", "mean", "resample"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)
"""What may be put in place of a removed unit's output."""


@dataclass(frozen=True)
class Protocol:
    """Choices by which numbers of the paper's code differ from ours.

    training_in_file_order: training documents are a file's first, not a shuffle's first.
    may_show_scored: demonstrations of a training document may hold that document.
    bare_continuations: gradients are of the gold answer without the space that stands before it when it is
        scored (BARE_TASKS); MathQA's demonstrations lack it everywhere.
    first_answer_only: gradients are of the first accepted answer, not of the best-scoring one (ReCoRD).
    one_split_for_all: a task without a training split (LAMBADA) is ranked and judged on the same documents,
        not on halves.
    last_layer_by_continuation: the last layer's importance is divided by answer tokens, other layers' by all
        tokens.
    aggregate_of_raw_scores: heads are ranked for all tasks by the plain mean of scores, not of ranks.
    ffns_by_evaluation: FFNs are ranked by what removing them costs on the evaluation documents themselves.
    spurious_prefix_entries: prefix matching counts three entries that follow no earlier occurrence.
    copying_of_own_token: copying is scored by what a head makes of the token at a position itself, with every
        layer reading the embeddings.
    """

    name: ProtocolName
    training_in_file_order: bool = False
    may_show_scored: bool = False
    bare_continuations: bool = False
    first_answer_only: bool = False
    one_split_for_all: bool = False
    last_layer_by_continuation: bool = False
    aggregate_of_raw_scores: bool = False
    ffns_by_evaluation: bool = False
    spurious_prefix_entries: bool = False
    copying_of_own_token: bool = False


CORRECTED = Protocol("corrected")
REFERENCE = Protocol(
    "reference",
    training_in_file_order=True,
    may_show_scored=True,
    bare_continuations=True,
    first_answer_only=True,
    one_split_for_all=True,
    last_layer_by_continuation=True,
    aggregate_of_raw_scores=True,
    ffns_by_evaluation=True,
    spurious_prefix_entries=True,
    copying_of_own_token=True,
)
PROTOCOLS: dict[ProtocolName, Protocol] = {"corrected": CORRECTED, "reference": REFERENCE}

Labels = Literal["right", "shuffled", "foreign"]
"""Whose answers the demonstrations of a prompt show: their own, each other's, or those of other documents."""
LABELS: tuple[Labels, ...] = get_args(Labels)

Corruption = Literal["shuffled", "wrong", "queries"]
"""How the prompt of a few-shot document is corrupted: its demonstrations show each other's answers (the
control of that name), none shows its own answer's text, or another document's query is asked after them."""
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
PromptForm = Labels | Corruption
"""What was done to the prompts of documents; `right`: nothing."""

AGGREGATE = "aggregate"
"""The task that stands for the mean over tasks."""
OUT_OF_DOMAIN_TASKS = ("mathqa", "lambada")
"""The paper's tasks that are pruned by rankings of the others and have no part in any mean."""


def in_domain(task: str) -> bool:
    """Tell whether a task counts in means over tasks."""
    return task not in OUT_OF_DOMAIN_TASKS


# Tasks whose gradients the reference takes of the answer without its leading space.
BARE_TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "mathqa")
# Tasks whose demonstrations it shows without that space, too.
BARE_DEMONSTRATION_TASKS = ("mathqa",)


@dataclass(frozen=True)
class Difference:
    """What the reference does, in a sentence; whether that is a plain bug, and whether this tool does the
    same.
    """

    sentence: str
    plain_bug: bool
    imitated: bool = True


DIFFERENCES = (
    Difference(
        "Training documents are the first of the file, so MultiRC's come from a few dozen paragraphs.",
        False,
    ),
    Difference(
        "Demonstrations of a training document may hold that document itself.",
        True,
    ),
    Difference(
        "Gradients of HellaSwag, PIQA, ARC, OpenBookQA and MathQA are of the answer without the space "
        "before it, which is not the text that is scored; MathQA's demonstrations lack the space, too.",
        True,
    ),
    Difference(
        "Gradients of ReCoRD are of the first accepted entity, not of the best-scoring one.",
        False,
    ),
    Difference(
        "LAMBADA, which has no training split, is ranked and judged on the same documents.",
        False,
    ),
    Difference(
        "The last layer's importance is divided by answer tokens, the other layers' by all tokens, so the "
        "last layer's heads rank high by construction.",
        True,
    ),
    Difference(
        "All tasks' ranking is the mean of raw scores, in which tasks with short prompts count most.",
        False,
    ),
    Difference(
        "FFNs are ranked on the documents they are then judged on.",
        False,
    ),
    Difference(
        "Rank correlations are taken between lists of head numbers in order of importance instead of "
        "between scores; they are reported as spearman_of_order, next to spearman, under both protocols.",
        True,
    ),
    Difference(
        "Prefix matching adds three entries that follow no earlier occurrence of the token.",
        True,
    ),
    Difference(
        "Copying is scored from what a head makes of the token at a position itself, with embeddings fed to "
        "every layer, not from what it attends to.",
        True,
    ),
    Difference(
        "A limit counts MultiRC's answers, so that a question may be cut in two; here it counts questions.",
        False,
        imitated=False,
    ),
    Difference(
        "Too long prompts are not cut when gradients are taken, and run over the positions.",
        True,
        imitated=False,
    ),
    Difference(
        "Log-probabilities and gradients are summed in half precision, which makes ties.",
        True,
        imitated=False,
    ),
    Difference(
        "Neither the visiting order nor the random sequences have a seed.",
        True,
        imitated=False,
    ),
)
