"""The options of a run, each once: its type, check and default, and what `--help` says about it.

The command line and TOML files take their options from the fields of `RunOptions`.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from lowmem_icl.options.defaults import DEMO, Defaults, defaults_of
from lowmem_icl.options.forms import (
    AnyPath,
    Count,
    Device,
    Form,
    Listed,
    NotEmpty,
    Size,
    SmallCount,
)
from lowmem_icl.protocols import LABELS, PROTOCOLS, Labels, Protocol, ProtocolName

Experiment = Literal["evaluate", "importance", "ablate", "prune", "induction", "overlap"]
EXPERIMENTS: tuple[Experiment, ...] = get_args(Experiment)
Curve = Literal["heads", "ffns", "combined", "transfer", "cross-shot", "random"]
CURVES: tuple[Curve, ...] = get_args(Curve)
Copying = Literal["norm", "softmax", "bias"]
DEFAULT_CURVES: tuple[Curve, ...] = ("heads", "ffns")
DEFAULT_EXACT = 500


class Group(StrEnum):
    """Where `--help` lists an option."""

    MODEL = "Model"
    TASKS = "Tasks"
    EXPERIMENTS = "Experiments"
    RESOURCES = "Resources"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Flag:
    """What is said about an option, apart from its type and its check.

    default: the text of a default that its value does not say, such as one that depends on other options.
    changes_results: whether anything measured depends on it; those that do make up a run's identity.
    """

    group: Group
    help: str
    default: str = ""
    changes_results: bool = True


class RunOptions(BaseModel):
    """Every option of `lowmem-icl run`; a field's name is its TOML key and, with dashes, its flag."""

    # Built when options are first checked, which `--help` never does.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    model: Annotated[
        str,
        NotEmpty,
        Flag(
            Group.MODEL,
            "demo, gemma3-270m, smollm2, a store, a checkpoint folder, a .gguf file, or a model's id on the "
            "hub.",
        ),
    ] = DEMO
    revision: Annotated[
        Annotated[str, NotEmpty] | None,
        Flag(Group.MODEL, "Branch, tag or commit of a model on the hub.", "the newest"),
    ] = None
    weights: Annotated[
        Literal["int8", "bfloat16", "float32"],
        Flag(Group.MODEL, "How the weights of linear layers are stored."),
    ] = "int8"
    store_dir: Annotated[
        AnyPath | None,
        Flag(Group.MODEL, "Folder for converted checkpoints.", "in your cache folder", changes_results=False),
    ] = None

    tasks: Annotated[
        Annotated[
            tuple[str, ...], *Listed, NotEmpty, Form("LIST", "a comma-separated list of tasks, none twice")
        ]
        | None,
        Flag(
            Group.TASKS,
            "Comma-separated: names (pairs: all word pairs), lm-eval:NAME, JSON-lines files with context, "
            "options, gold, or JSON files that list pairs of input, output.",
            "the demo's, or the paper's 14",
        ),
    ] = None
    data_dir: Annotated[
        AnyPath | None,
        Flag(
            Group.TASKS,
            "Folder of TASK/train.jsonl, validation.jsonl and test.jsonl, with the hub's field names.",
            "the hub",
        ),
    ] = None
    shots: Annotated[
        Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...], *Listed, NotEmpty] | None,
        Flag(
            Group.TASKS,
            "Numbers of demonstrations, comma-separated.",
            "0,1,5; the demo's 0,4,16; gemma3-270m, smollm2 0,5",
        ),
    ] = None
    limit: Annotated[
        Count | None,
        Flag(
            Group.TASKS, "Evaluation documents per task (MultiRC: questions).", "all; gemma3-270m, smollm2 32"
        ),
    ] = None
    train_limit: Annotated[
        Count | None,
        Flag(
            Group.TASKS,
            "Training documents per task, for importance, ablations and pruning.",
            "32, or --limit; gemma3-270m, smollm2 12",
        ),
    ] = None
    importance_limit: Annotated[
        Count | None,
        Flag(
            Group.TASKS, "Training documents per task for gradients; the paper used 2,500.", "--train-limit"
        ),
    ] = None
    demonstrations: Annotated[
        Literal["per-document", "shared"],
        Flag(
            Group.TASKS,
            "Each document draws its own demonstrations, as in the paper; or all share a few sets, which is "
            "cheaper.",
        ),
    ] = "per-document"
    demonstration_sets: Annotated[
        SmallCount, Flag(Group.TASKS, "How many sets are shared; intervals cluster by set.")
    ] = 8
    labels: Annotated[
        tuple[Labels, ...],
        *Listed,
        NotEmpty,
        Flag(
            Group.TASKS,
            "Whose answers demonstrations show when tasks are evaluated: their own; as controls, also each "
            "other's and those of other documents.",
        ),
    ] = LABELS
    protocol: Annotated[
        ProtocolName,
        Flag(
            Group.TASKS, "This tool's choices, or those of the paper's code, so that numbers can be compared."
        ),
    ] = "corrected"
    bos: Annotated[
        bool | None,
        Flag(
            Group.TASKS,
            "Put the beginning-of-sequence token before every context.",
            "as the model's tokenizer does; OPT: no, as in the paper",
        ),
    ] = None

    experiments: Annotated[
        tuple[Experiment, ...], *Listed, NotEmpty, Flag(Group.EXPERIMENTS, "What to measure.", "all")
    ] = EXPERIMENTS
    screen: Annotated[
        Literal["attribution"] | None,
        Flag(
            Group.EXPERIMENTS,
            "Ablate exactly only those units whose estimated effect is largest or least certain.",
            "every unit is ablated exactly",
        ),
    ] = None
    exact: Annotated[
        Count | None,
        Flag(
            Group.EXPERIMENTS,
            "Units ablated exactly per task and shot count, with --screen.",
            str(DEFAULT_EXACT),
        ),
    ] = None
    label_drops: Annotated[
        bool,
        Flag(
            Group.EXPERIMENTS,
            "Ablate again with shuffled labels in the demonstrations: how much of each unit's drop is about "
            "labels. Takes about as long again.",
        ),
    ] = False
    objective: Annotated[
        Literal["gold_prob", "gold_logprob", "acc"],
        Flag(Group.EXPERIMENTS, "What the greedy pruner preserves."),
    ] = "gold_prob"
    tolerance: Annotated[
        float,
        Field(gt=0, lt=1),
        Flag(Group.EXPERIMENTS, "How much of the objective the greedy pruner may lose in total."),
    ] = 0.01
    certify_limit: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Flag(
            Group.EXPERIMENTS,
            "Further training documents per task, to certify what the search removed; 0 for no certificates.",
            "twice as many as the tolerance needs",
        ),
    ] = None
    direction: Annotated[
        Literal["down", "up"],
        Flag(Group.EXPERIMENTS, "Prune greedily from the last layer down, or from the first up."),
    ] = "down"
    order: Annotated[
        Literal["heads-first", "joint"],
        Flag(Group.EXPERIMENTS, "Prune heads and then FFNs, or both together by loss per parameter."),
    ] = "heads-first"
    curves: Annotated[
        tuple[Curve, ...], *Listed, Flag(Group.EXPERIMENTS, "Which pruning curves to draw; '' for none.")
    ] = DEFAULT_CURVES
    curve_limit: Annotated[
        Count | None,
        Flag(
            Group.EXPERIMENTS,
            "Evaluation documents per task for pruning curves, at most --limit.",
            "64; gemma3-270m, smollm2 16",
        ),
    ] = None
    random_draws: Annotated[SmallCount, Flag(Group.EXPERIMENTS, "Draws for the random curves.")] = 10
    rescore: Annotated[
        bool,
        Flag(
            Group.EXPERIMENTS,
            "Also draw a curve whose importance is recomputed on the pruned model at every level.",
        ),
    ] = False
    copying_with: Annotated[
        tuple[Copying, ...],
        *Listed,
        Flag(
            Group.EXPERIMENTS,
            "What heads' outputs pass through before copying is scored.",
            "none: raw logits",
        ),
    ] = ()
    seed: Annotated[
        int,
        Field(ge=0, lt=2**32),
        Flag(
            Group.EXPERIMENTS,
            "Seed of random controls and bootstraps; documents are always drawn by Random(42).",
        ),
    ] = 42

    memory: Annotated[
        Size | None,
        Flag(
            Group.RESOURCES,
            "Memory for weights, rows and caches, such as 6GB.",
            "80 % of what is free",
            changes_results=False,
        ),
    ] = None
    device_memory: Annotated[
        Size | None,
        Flag(
            Group.RESOURCES,
            "GPU memory for layers and rows, such as 20GB.",
            "80 % of what is free",
            changes_results=False,
        ),
    ] = None
    device: Annotated[
        Device,
        # What `auto` is depends on the machine: the run's folder compares the device itself.
        Flag(Group.RESOURCES, "Where to compute: auto, cpu, cuda or cuda:N.", changes_results=False),
    ] = "auto"
    hours: Annotated[
        Annotated[float, Field(gt=0, le=10_000)] | None,
        Flag(
            Group.RESOURCES,
            "Stop after this many hours; the same command continues from there.",
            "until all is done",
            changes_results=False,
        ),
    ] = None

    out: Annotated[
        AnyPath | None,
        Flag(
            Group.OUTPUT,
            "Run folder; the same command continues the run in it.",
            "runs/MODEL-DIGEST of the options",
            changes_results=False,
        ),
    ] = None
    masks_dir: Annotated[
        AnyPath | None,
        Flag(Group.OUTPUT, "Folder that gets a copy of every mask.", "none", changes_results=False),
    ] = None

    @model_validator(mode="after")
    def _fit_together(self) -> "RunOptions":
        experiments = set(self.experiments)
        if "right" not in self.labels:
            raise ValueError(
                "--labels: expected right among them, which the controls are compared with; add it"
            )
        if self.exact is not None and self.screen is None:
            raise ValueError(
                "--exact: expected with --screen attribution, which says what is left out; add it"
            )
        if self.screen is not None and "ablate" in experiments and "importance" not in experiments:
            raise ValueError("--screen: its estimates come from importance; add that to --experiments")
        if self.rescore and not {"importance", "prune"} <= experiments:
            raise ValueError("--rescore: expected importance and prune among --experiments; add them")
        if self.label_drops and "ablate" not in experiments:
            raise ValueError("--label-drops: expected ablate among --experiments; add it")
        return self

    @property
    def defaults(self) -> Defaults:
        """What its model's runs take where the options do not say."""
        return defaults_of(self.model)

    @property
    def resolved_exact(self) -> int:
        """Units ablated exactly where ablations are screened."""
        return self.exact or DEFAULT_EXACT

    @property
    def protocol_flags(self) -> Protocol:
        """Which of its steps the protocol does in the reference's way."""
        return PROTOCOLS[self.protocol]

    @property
    def control_labels(self) -> tuple[Labels, ...]:
        """Whose answers demonstrations show besides the right ones, where tasks are evaluated."""
        controls = tuple(name for name in self.labels if name != "right")
        return controls if "evaluate" in self.experiments else ()

    @property
    def resolved_shots(self) -> tuple[int, ...]:
        """The shot counts, ascending."""
        return tuple(sorted(self.shots if self.shots is not None else self.defaults.shots))

    @property
    def resolved_limit(self) -> int | None:
        """Evaluation documents per task; None: all."""
        return self.limit or self.defaults.limit

    @property
    def resolved_train_limit(self) -> int:
        """Training documents per task."""
        return self.train_limit or self.limit or self.defaults.train_limit

    @property
    def resolved_importance_limit(self) -> int:
        """Training documents per task whose gradients are taken."""
        return self.importance_limit or self.resolved_train_limit

    @property
    def resolved_curve_limit(self) -> int:
        """Evaluation documents per task that curves are judged on."""
        wanted = self.curve_limit or self.defaults.curve_limit
        return min(wanted, self.resolved_limit or wanted)

    @property
    def resolved_store_dir(self) -> Path:
        """Folder of converted checkpoints: --store-dir, or one in the user's cache folder (XDG)."""
        if self.store_dir is not None:
            return self.store_dir
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(cache) / "lowmem-icl" / "stores"

    @property
    def identity_values(self) -> dict[str, Any]:
        """The plain JSON values of all options that results depend on; the device is not among them."""
        values = self.model_dump(mode="json", include={name for name in FLAGS if FLAGS[name].changes_results})
        resolved = {
            "limit": self.resolved_limit,
            "train_limit": self.resolved_train_limit,
            "curve_limit": self.curve_limit or self.defaults.curve_limit,
        }
        return values | {"shots": list(self.resolved_shots), **resolved}

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits over `identity_values`."""
        text = json.dumps(self.identity_values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flag(field: FieldInfo) -> Flag:
    (flag,) = (item for item in field.metadata if isinstance(item, Flag))
    return flag


FLAGS: dict[str, Flag] = {name: _flag(field) for name, field in RunOptions.model_fields.items()}
