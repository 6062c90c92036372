"""Names that options choose among, and which of them are chosen where none is given."""

from typing import Literal, get_args

Experiment = Literal[
    "evaluate", "importance", "ablate", "prune", "induction", "overlap", "patch", "icl-heads"
]
EXPERIMENTS: tuple[Experiment, ...] = get_args(Experiment)
ON_REQUEST: tuple[Experiment, ...] = ("patch", "icl-heads")
"""Experiments that are done only where they are named."""
DEFAULT_EXPERIMENTS = tuple(name for name in EXPERIMENTS if name not in ON_REQUEST)
Curve = Literal["heads", "ffns", "combined", "transfer", "cross-shot", "random"]
CURVES: tuple[Curve, ...] = get_args(Curve)
DEFAULT_CURVES: tuple[Curve, ...] = ("heads", "ffns", "random")
Copying = Literal["norm", "softmax", "bias"]
PatchedTokens = Literal["last", "all"]
Tracker = Literal["wandb", "mlflow", "tensorboard", "trackio"]
