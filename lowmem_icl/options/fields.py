"""The options of a run, each once: its type, check and default, and what `--help` says about it.

The command line and TOML files take their options from the fields of `RunFields`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from lowmem_icl.options.choices import (
    DEFAULT_CURVES,
    DEFAULT_EXPERIMENTS,
    Copying,
    Curve,
    Experiment,
    PatchedTokens,
    Tracker,
)
from lowmem_icl.options.defaults import DEMO
from lowmem_icl.options.forms import (
    AnyPath,
    Count,
    Device,
    Form,
    Limit,
    Listed,
    ModelName,
    NotEmpty,
    Size,
    SmallCount,
)
from lowmem_icl.options.groups import Flag, Group
from lowmem_icl.protocols import LABELS, Ablation, Corruption, Labels, ProtocolName

DEFAULT_EXACT = 500


class RunFields(BaseModel):
    """Every option of `lowmem-icl run`; a field's name is its TOML key and, with dashes, its flag."""

    # Built when options are first checked, which `--help` never does.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    model: Annotated[
        ModelName,
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
        Literal["int8", "nf4", "bfloat16", "float32"],
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
        Limit | None,
        Flag(
            Group.TASKS,
            "Evaluation documents per task (MultiRC: questions); 0.1: a tenth of each task's.",
            "all; gemma3-270m, smollm2 32",
        ),
    ] = None
    train_limit: Annotated[
        Limit | None,
        Flag(
            Group.TASKS,
            "Training documents per task, for importance, ablations and pruning; or a fraction of them.",
            "32, or --limit where that is no fraction; gemma3-270m, smollm2 12",
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

    preset: Annotated[
        Literal["night"] | None,
        Flag(
            Group.EXPERIMENTS,
            "Options for a purpose; those that are given stand before them. night: all experiments, as much "
            "of each as a very large model allows in a night.",
            "none",
            # What it sets makes up a run's identity itself.
            changes_results=False,
        ),
    ] = None
    experiments: Annotated[
        tuple[Experiment, ...],
        *Listed,
        NotEmpty,
        Flag(Group.EXPERIMENTS, "What to measure.", "all but patch and icl-heads"),
    ] = DEFAULT_EXPERIMENTS
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
    ablation: Annotated[
        Ablation,
        Flag(
            Group.EXPERIMENTS,
            "What stands in place of a removed unit's output: zeros, as in the paper, its mean over the "
            "task's training documents, or what it gives in another document, drawn by --seed.",
        ),
    ] = "zero"
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
    search: Annotated[
        Literal["exact", "nested"] | None,
        Flag(
            Group.EXPERIMENTS,
            "Measure all heads that are left again after each removal; or nested sets of them, in few sweeps "
            "per layer.",
            "exact up to 5 times the operations of the ablations, else nested",
        ),
    ] = None
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
    curve_levels: Annotated[
        Literal["all", "half"],
        Flag(
            Group.EXPERIMENTS,
            "At which percentages curves are measured: 0, 10, 20 to 90; or half of these: 0, 10, 30 to 90.",
        ),
    ] = "all"
    random_draws: Annotated[
        SmallCount,
        Flag(Group.EXPERIMENTS, "Draws for the random curves, at every third level; 5 or more have a band."),
    ] = 5
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
    corrupt: Annotated[
        Corruption,
        Flag(
            Group.EXPERIMENTS,
            "How prompts are corrupted for patching: demonstrations show each other's answers, or never "
            "their own, or another query is asked.",
        ),
    ] = "shuffled"
    at: Annotated[
        tuple[PatchedTokens, ...],
        *Listed,
        NotEmpty,
        Flag(Group.EXPERIMENTS, "Where units are patched: at a prompt's last token, at all of its tokens."),
    ] = ("last",)
    pairs: Annotated[
        AnyPath | None,
        Flag(
            Group.EXPERIMENTS,
            "JSON-lines file of pairs of prompts to patch: context, corrupted, options, gold.",
            "pairs are made of the tasks' documents",
        ),
    ] = None
    clean: Annotated[
        AnyPath | None,
        Flag(
            Group.EXPERIMENTS,
            "JSON-lines file of prompts that function vectors are means of: context or tokens, and target.",
            "the tasks' documents",
        ),
    ] = None
    corrupted: Annotated[
        AnyPath | None,
        Flag(
            Group.EXPERIMENTS,
            "The same, of prompts that function vectors are put into; with --clean.",
            "the tasks' documents, corrupted",
        ),
    ] = None
    text: Annotated[
        AnyPath | None,
        Flag(
            Group.EXPERIMENTS,
            "UTF-8 text on which icl-heads measures how loss falls with context.",
            "a page of the tool's own",
        ),
    ] = None
    seed: Annotated[
        int,
        Field(ge=0, lt=2**32),
        Flag(
            Group.EXPERIMENTS,
            "Seed of random controls, bootstraps and resampling; documents are always drawn by Random(42).",
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
    no_wait: Annotated[
        bool,
        Flag(Group.RESOURCES, "Do not wait where another process makes the store.", changes_results=False),
    ] = False

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
    track: Annotated[
        tuple[Tracker, ...],
        *Listed,
        Flag(
            Group.OUTPUT,
            "Experiment trackers that follow the run; each is an extra of this package.",
            "none",
            changes_results=False,
        ),
    ] = ()


def _flag(field: FieldInfo) -> Flag:
    (flag,) = (item for item in field.metadata if isinstance(item, Flag))
    return flag


FLAGS: dict[str, Flag] = {name: _flag(field) for name, field in RunFields.model_fields.items()}
