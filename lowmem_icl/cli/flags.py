"""The flags that commands share: their types, their help and where the help lists them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lowmem_icl.options import CURVES, EXPERIMENTS


class Weights(StrEnum):
    """Forms of the weights."""

    int8 = "int8"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Mode(StrEnum):
    """How documents come by their demonstrations."""

    per_document = "per-document"
    shared = "shared"


class ProtocolChoice(StrEnum):
    """Sets of choices where the paper's code and its text differ."""

    corrected = "corrected"
    reference = "reference"


class Screen(StrEnum):
    """What ablations are screened by."""

    attribution = "attribution"


class Objective(StrEnum):
    """What the greedy pruner keeps."""

    gold_prob = "gold_prob"
    gold_logprob = "gold_logprob"
    acc = "acc"


class Direction(StrEnum):
    """Where the greedy pruner starts."""

    down = "down"
    up = "up"


class Order(StrEnum):
    """In which order the greedy pruner takes units."""

    heads_first = "heads-first"
    joint = "joint"


MODEL = "Model and where it is kept"
TASKS = "Tasks and documents"
WORK = "Experiments"
MACHINE = "Machine and files"

ModelOption = Annotated[
    str | None,
    typer.Option(help="[bold]demo[/bold], a store, a checkpoint folder, or a hub id.", rich_help_panel=MODEL,
                 show_default="demo"),
]  # fmt: skip
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=MODEL)
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(help="Form of the linear weights.", rich_help_panel=MODEL, show_default="int8"),
]
StoreDirOption = Annotated[
    Path | None,
    typer.Option(help="Where converted checkpoints are kept.", rich_help_panel=MODEL,
                 show_default="your cache folder"),
]  # fmt: skip
TasksOption = Annotated[
    str | None,
    typer.Option(help="Comma-separated names, lm-eval:NAME, or paths to JSON lines with context, options, gold.",
                 rich_help_panel=TASKS, show_default="the demo's, or the paper's 14"),
]  # fmt: skip
DataDirOption = Annotated[
    Path | None,
    typer.Option(help="Folder with <task>/{train,validation,test}.jsonl in the hub's field names.",
                 rich_help_panel=TASKS, show_default="the hub"),
]  # fmt: skip
ShotsOption = Annotated[
    str | None,
    typer.Option(help="Comma-separated numbers of demonstrations.", rich_help_panel=TASKS,
                 show_default="0,1,5; the demo's 0,4,16"),
]  # fmt: skip
DemonstrationsOption = Annotated[
    Mode | None,
    typer.Option(help="Every document draws its own (the paper's), or all share a few sets, which costs far less.",
                 rich_help_panel=TASKS, show_default="per-document"),
]  # fmt: skip
DemonstrationSetsOption = Annotated[
    int | None,
    typer.Option(help="How many sets are shared; intervals cluster by set.", rich_help_panel=TASKS, show_default="8"),
]  # fmt: skip
LimitOption = Annotated[
    int | None,
    typer.Option(
        help="Evaluation documents a task (MultiRC: questions).", rich_help_panel=TASKS, show_default="all"
    ),
]
TrainLimitOption = Annotated[
    int | None,
    typer.Option(help="Training documents a task, for importance, ablations and pruning.", rich_help_panel=TASKS,
                 show_default="32, or --limit"),
]  # fmt: skip
ProtocolOption = Annotated[
    ProtocolChoice | None,
    typer.Option(help="What this tool stands for, or what the paper's code does, so that numbers can be compared.",
                 rich_help_panel=TASKS, show_default="corrected"),
]  # fmt: skip
ImportanceLimitOption = Annotated[
    int | None,
    typer.Option(help="Training documents a task whose gradients are taken; the paper took 2,500.",
                 rich_help_panel=TASKS, show_default="--train-limit"),
]  # fmt: skip
BosOption = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Put the beginning-of-sequence token before every context.",
                 rich_help_panel=TASKS, show_default="by family; OPT: no"),
]  # fmt: skip
ExperimentsOption = Annotated[
    str | None,
    typer.Option(
        help=f"Comma-separated, of {', '.join(EXPERIMENTS)}.", rich_help_panel=WORK, show_default="all"
    ),
]
CopyingWithOption = Annotated[
    str | None,
    typer.Option(help="Of norm, softmax, bias: what heads' outputs go through before copying is scored.",
                 rich_help_panel=WORK, show_default="none: raw logits"),
]  # fmt: skip
ScreenOption = Annotated[
    Screen | None,
    typer.Option(help="Ablate exactly only the units whose estimate is largest or least certain.",
                 rich_help_panel=WORK, show_default="all are exact"),
]  # fmt: skip
ExactOption = Annotated[
    int | None,
    typer.Option(help="How many units of each task and shot count a screen leaves.", rich_help_panel=WORK,
                 show_default="500"),
]  # fmt: skip
HoursOption = Annotated[
    float | None,
    typer.Option(help="Stop after so many hours; ablations go on until then, and again with the same command.",
                 rich_help_panel=WORK, show_default="until the work is done"),
]  # fmt: skip
ObjectiveOption = Annotated[
    Objective | None,
    typer.Option(help="What the greedy pruner keeps.", rich_help_panel=WORK, show_default="gold_prob"),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        help="How much of the objective it may lose in all.", rich_help_panel=WORK, show_default="0.01"
    ),
]
DirectionOption = Annotated[
    Direction | None,
    typer.Option(help="From the last layer down, or from the first up.", rich_help_panel=WORK, show_default="down"),
]  # fmt: skip
OrderOption = Annotated[
    Order | None,
    typer.Option(help="Heads and then FFNs, or both together by what a parameter costs.", rich_help_panel=WORK,
                 show_default="heads-first"),
]  # fmt: skip
CurvesOption = Annotated[
    str | None,
    typer.Option(help=f"Pruning curves, comma-separated, of {', '.join(CURVES)}; '' for none.", rich_help_panel=WORK,
                 show_default="heads,ffns"),
]  # fmt: skip
CurveLimitOption = Annotated[
    int | None,
    typer.Option(help="Evaluation documents a task that curves are judged on.", rich_help_panel=WORK,
                 show_default="64"),
]  # fmt: skip
RandomDrawsOption = Annotated[
    int | None, typer.Option(help="Draws of the random curves.", rich_help_panel=WORK, show_default="10")
]
RescoreOption = Annotated[
    bool | None,
    typer.Option("--rescore", help="Also compute importance again on the pruned model at every level.",
                 rich_help_panel=WORK),
]  # fmt: skip
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Memory for weights, rows and caches, such as 6GB.", rich_help_panel=MACHINE,
                 show_default="80 % of what is free"),
]  # fmt: skip
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option(help="CUDA memory for layers and rows, such as 20GB.", rich_help_panel=MACHINE,
                 show_default="80 % of what is free"),
]  # fmt: skip
DeviceOption = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE, show_default="auto")
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        help="Seed of random controls and of bootstraps.", rich_help_panel=MACHINE, show_default="42"
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Run folder; the same command continues its own.", rich_help_panel=MACHINE,
                 show_default="runs/<model>-<digest of the options>"),
]  # fmt: skip
MasksDirOption = Annotated[
    Path | None, typer.Option(help="Folder that gets a copy of every mask.", rich_help_panel=MACHINE)
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(help="TOML file with any of these options; the command line wins.", rich_help_panel=MACHINE),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress and no messages on stderr.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
