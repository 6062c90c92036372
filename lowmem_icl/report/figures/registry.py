"""All figures by name: how each is drawn, and the sentence that says what it shows."""

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl
from matplotlib.figure import Figure

from lowmem_icl.report.figures.ablation import ablate_estimates, ablate_ffns
from lowmem_icl.report.figures.accuracy import accuracy_figure
from lowmem_icl.report.figures.agreement import agreement_heads
from lowmem_icl.report.figures.curves import prune_ffns, prune_heads
from lowmem_icl.report.figures.grid import prune_grid
from lowmem_icl.report.figures.importance import (
    ablate_heads,
    ablate_in_context,
    ablate_labels,
    importance_heads,
)
from lowmem_icl.report.figures.induction import induction_capacity, induction_removal, induction_scores
from lowmem_icl.report.figures.layout import Asked, Record
from lowmem_icl.report.figures.masks import prune_masks
from lowmem_icl.report.figures.patching import function_vectors, patch_heads


@dataclass(frozen=True)
class FigureKind:
    """A figure's drawing function, and its caption.

    `draw` takes a run's results, its run.json and what is asked; it returns None where the numbers for that
    are missing. It is to be called, and its figure saved, in `figure_style`. experiment: the one that makes
    these numbers.
    """

    draw: Callable[[pl.DataFrame, Record, Asked], Figure | None]
    caption: str
    experiment: str


# Named by experiment, then by what is measured.
FIGURES: dict[str, FigureKind] = {
    "accuracy": FigureKind(
        accuracy_figure,
        "Accuracy of the whole model on every task by number of demonstrations, with 95 % intervals, chance "
        "and the accuracy of the best constant answer; hollow where it is not credibly above guessing.",
        "evaluate",
    ),
    "importance-heads": FigureKind(
        importance_heads,
        "Gradient importance of every head by layer (up) and head (across), for every task and number of "
        "demonstrations on one scale.",
        "importance",
    ),
    "ablate-heads": FigureKind(
        ablate_heads,
        "What the gold answer's log-probability loses when one head is removed alone, by layer (up) and head "
        "(across): red heads help, blue heads harm; one symmetric-log scale for all maps.",
        "ablate",
    ),
    "ablate-ffns": FigureKind(
        ablate_ffns,
        "What the gold answer's log-probability loses when the FFN of one layer is removed alone, with 95 % "
        "intervals, by layer and number of demonstrations, on a symmetric-log scale.",
        "ablate",
    ),
    "ablate-estimates": FigureKind(
        ablate_estimates,
        "First-order estimate of what removing a unit costs against the exact drop; on the line they agree; "
        "ρ: Spearman's rank correlation.",
        "ablate",
    ),
    "ablate-in-context": FigureKind(
        ablate_in_context,
        "What removing a head costs more with demonstrations than without, in nats: red heads matter more "
        "once there is something to learn from.",
        "ablate",
    ),
    "ablate-labels": FigureKind(
        ablate_labels,
        "What removing a head costs more with right labels in the demonstrations than with shuffled ones, in "
        "nats: red heads serve what the labels give.",
        "ablate",
    ),
    "prune-heads": FigureKind(
        prune_heads,
        "Accuracy when the least important heads are removed first, with 95 % intervals; circles: knees; "
        "grey: where the next random mask lies at 95 %; dotted: chance.",
        "prune",
    ),
    "prune-ffns": FigureKind(
        prune_ffns,
        "Accuracy when the least important FFNs are removed first, with 95 % intervals; circles: knees; "
        "grey: where the next random mask lies at 95 %; dotted: chance.",
        "prune",
    ),
    "prune-grid": FigureKind(
        prune_grid,
        "Accuracy when heads (up) and FFNs (across) are removed together, least important first, by "
        "number of demonstrations.",
        "prune",
    ),
    "prune-masks": FigureKind(
        prune_masks,
        "Accuracy under the greedy mask of every task and under masks of equal size, by gradient and at "
        "random, with 95 % intervals; tick: the whole model; dotted: chance.",
        "prune",
    ),
    "patch-heads": FigureKind(
        patch_heads,
        "What one unit's value from the other prompt changes, by layer (up) and head (across; last, "
        "FFNs): the clean one restores (red) in corrupted prompts, the corrupted one breaks (blue) clean "
        "ones; one symmetric-log scale.",
        "patch",
    ),
    "function-vectors": FigureKind(
        function_vectors,
        "Function-vector scores of every head by layer (up) and head (across): what its mean output over "
        "clean prompts adds to the probability of the answer's first token in corrupted ones.",
        "patch",
    ),
    "induction-scores": FigureKind(
        induction_scores,
        "Scores of every head on random sequences by layer (up) and head (across): prefix matching, copying, "
        "attention to the previous token, and copying by the eigenvalues of its weights.",
        "induction",
    ),
    "induction-capacity": FigureKind(
        induction_capacity,
        "What is left of the summed prefix-matching and copying scores of all heads when the least important "
        "heads are removed first; grey: 95 % of random orders.",
        "induction",
    ),
    "induction-removal": FigureKind(
        induction_removal,
        "Accuracy lost without the induction heads, with 95 % intervals, beside that lost without as many "
        "random heads of the same layers (grey: where the next draw lies at 95 %); dotted: all that is above "
        "chance.",
        "induction",
    ),
    "agreement-heads": FigureKind(
        agreement_heads,
        "Spearman's rank correlation of the heads' gradient scores between tasks; ceiling: the most that "
        "rankings as noisy as these could agree.",
        "overlap",
    ),
}
