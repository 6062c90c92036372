"""Flags to options to calls: the commands, their help and their exit codes; no logic of its own.

torch and transformers are imported by the commands that need them, so that `--help` stays quick, and after
the options were checked, so that a mistyped one is reported at once.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_icl import __version__
from lowmem_icl.cli.commands import CONTEXT_SETTINGS, command_of
from lowmem_icl.cli.commands import Group as Commands
from lowmem_icl.cli.echo import echo
from lowmem_icl.cli.errors import names_argument, reports_errors, reports_errors_and_continues
from lowmem_icl.cli.finished_runs import report, status
from lowmem_icl.cli.first_line import first_line
from lowmem_icl.cli.masks import masks_app
from lowmem_icl.cli.parameters import (
    ALL_OPTIONS,
    EVALUATE_OPTIONS,
    MEASURE_OPTIONS,
    PROMPT_OPTIONS,
    DeleteShardsOption,
    FreshOption,
    GivenOptions,
    JsonOption,
    QuietOption,
    RepairOption,
    VerifyOption,
    takes,
)
from lowmem_icl.errors import InputError
from lowmem_icl.options import Group
from lowmem_icl.protocols import LABELS

LONGEST_COUNT = 18

app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=CONTEXT_SETTINGS,
    help="""Start here:  lowmem-icl run

    Which attention heads and FFNs does in-context learning need? This answers
    it for a small bundled model: no network, about three minutes. The same for
    a real model; `plan` says beforehand what `run` would take:

    lowmem-icl plan --model facebook/opt-1.3b --tasks piqa,copa --limit 64
    lowmem-icl run  --model facebook/opt-1.3b --tasks piqa,copa --limit 64""",
)


def _show_version(asked: bool) -> None:
    if asked:
        echo(f"lowmem-icl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


def _print_json(value: Any) -> None:
    echo(json.dumps(value, indent=1, ensure_ascii=False))


@command_of(app)
@reports_errors_and_continues
@takes(*ALL_OPTIONS)
def run(
    given: GivenOptions, fresh: FreshOption = False, quiet: QuietOption = False, as_json: JsonOption = False
) -> None:
    """Plan, then run every experiment and write masks, tables and a page; run it again to continue.

    Without options it analyses the bundled demo model. On real data:

    lowmem-icl run --model facebook/opt-1.3b --tasks piqa,copa --limit 64
    """
    options = given.checked()
    from lowmem_icl.cli.terminal import Terminal

    terminal = Terminal(quiet)
    terminal.say(first_line(f"running {', '.join(options.experiments_in_order)} with", options))
    from lowmem_icl.cli.running import end_as_finished, finish_or_find
    from lowmem_icl.cli.tables import show_summary
    from lowmem_icl.report.run_tables import read_run
    from lowmem_icl.report.summary import run_summary

    folder = finish_or_find(options, terminal, fresh=fresh)
    if as_json:
        _print_json(run_summary(read_run(folder)))
    else:
        show_summary(folder, terminal.out)
    end_as_finished(folder)


@command_of(app)
@reports_errors
@takes(*ALL_OPTIONS)
def plan(
    given: GivenOptions,
    machine: Annotated[
        Path | None,
        typer.Option(
            help="Plan for the machine that `measure` wrote this file on.",
            metavar="FILE",
            show_default="this machine",
            rich_help_panel=Group.RESOURCES,
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what `run` with the same options would read, hold, compute and take, before anything starts.

    Nothing is converted and no weights are fetched; two seconds go into measuring this machine. Of a run
    that was begun, it is what is left.

    lowmem-icl plan --model facebook/opt-66b --memory 12GB
    """
    options = given.checked()
    from lowmem_icl.cli.terminal import Terminal
    from lowmem_icl.system.allocator import without_collection

    terminal = Terminal(quiet)
    terminal.say(first_line("planning a run with", options))
    with without_collection(), terminal.waiting("loading libraries, reading tasks, measuring this machine"):
        from lowmem_icl.cli.plan import plan_with_advice, show_plan

        planned = plan_with_advice(options, machine, terminal)
    if as_json:
        _print_json(planned.as_record())
    else:
        show_plan(planned, terminal.out)


@command_of(app)
@reports_errors
@takes(*MEASURE_OPTIONS)
def measure(
    given: GivenOptions,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the rates.", metavar="FILE", rich_help_panel=Group.OUTPUT),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine, so that `plan --machine FILE` can plan for it elsewhere.

    lowmem-icl measure --model facebook/opt-1.3b --out machine.json
    """
    options = given.checked()
    from lowmem_icl.cli.terminal import Terminal

    terminal = Terminal(quiet)
    terminal.say(first_line("measuring this machine with", options))
    from lowmem_icl.cli.measure import measure_machine, show_machine

    machine = measure_machine(options, out, terminal)
    if as_json:
        _print_json(machine.model_dump())
    else:
        show_machine(machine, terminal)


@command_of(app)
@reports_errors_and_continues
@takes("revision", "weights", "store_dir", "no_wait")
def convert(
    given: GivenOptions,
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, .gguf file, gemma3-270m, smollm2, a model's id on the hub, or a store, "
            "whose own source is converted again.",
            metavar="SOURCE",
            show_default=False,
        ),
    ],
    store: Annotated[
        Path | None,
        typer.Argument(help="Folder of the store.", metavar="STORE", show_default="in --store-dir"),
    ] = None,
    verify: VerifyOption = False,
    repair: RepairOption = False,
    delete_shards: DeleteShardsOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert a checkpoint to a store of one file per layer; if stopped, it resumes at that layer.

    OPT-66B on a disk that holds the store (66 GB) and one shard (10 GB):

    lowmem-icl convert facebook/opt-66b --delete-shards
    """
    options = given.checked(model=source)
    from lowmem_icl.cli.terminal import Terminal

    terminal = Terminal(quiet)
    terminal.say(first_line("verifying" if verify else "repairing" if repair else "converting", options))
    from lowmem_icl.cli.convert import convert_model, repair_store, verify_files

    if verify:
        verify_files(Path(source), terminal)
    elif repair:
        repair_store(options, source, store, terminal)
    else:
        convert_model(options, store, terminal, delete_shards=delete_shards)


@command_of(app)
@reports_errors_and_continues
@takes(*EVALUATE_OPTIONS)
def evaluate(
    given: GivenOptions,
    mask: Annotated[
        list[Path],
        typer.Option(
            "--mask",
            help="Mask file, or a folder of them; can be given several times.",
            metavar="PATH",
            show_default=False,
        ),
    ],
    fresh: FreshOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score the tasks with the clean model and under each --mask, in a run folder of its own.

    lowmem-icl evaluate --mask masks/demo/greedy-recall-16shot.json --shots 16
    """
    options = given.checked(experiments=("evaluate",), labels=("right",))
    from lowmem_icl.cli.evaluate import read_masks, with_folder
    from lowmem_icl.cli.terminal import Terminal

    mask_files = read_masks(mask)
    terminal = Terminal(quiet)
    under = "1 mask" if len(mask_files) == 1 else f"{len(mask_files)} masks"
    terminal.say(first_line(f"evaluating under {under}:", options))
    from lowmem_icl.cli.evaluation import show_evaluation
    from lowmem_icl.cli.running import end_as_finished, finish_or_find
    from lowmem_icl.report.run_tables import read_run
    from lowmem_icl.report.summary import run_summary

    folder = finish_or_find(with_folder(options, mask_files), terminal, mask_files, fresh=fresh)
    if as_json:
        _print_json(run_summary(read_run(folder)))
    else:
        show_evaluation(folder, terminal.out)
    end_as_finished(folder)


@command_of(app)
@reports_errors
@takes("data_dir")
def tasks(given: GivenOptions, as_json: JsonOption = False) -> None:
    """List the known tasks, their metrics, and their sizes where their rows are available.

    lowmem-icl tasks --data-dir rows
    """
    from rich.table import Table

    from lowmem_icl.cli.terminal import plain_console
    from lowmem_icl.tasks.listing import check_data_dir, known_tasks

    data_dir = given.checked().data_dir
    check_data_dir(data_dir)
    listed = known_tasks(data_dir)
    if as_json:
        _print_json(listed)
        return
    table = Table("task", "from", "metric", "rows")
    for entry in listed:
        rows = ", ".join(f"{split} {count}" for split, count in entry["rows"].items())
        table.add_row(entry["task"], entry["from"], entry["metric"], rows or "on the hub, or in --data-dir")
    plain_console().print(table)


@command_of(app)
@reports_errors
@names_argument("--tasks", "TASK")
@takes(*PROMPT_OPTIONS)
def prompts(
    given: GivenOptions,
    task: Annotated[
        str,
        typer.Argument(
            help="A task's name, lm-eval:NAME, or a path to JSON lines or pairs.",
            metavar="TASK",
            show_default=False,
        ),
    ],
    shots: Annotated[
        str,
        typer.Option(
            help="Numbers of demonstrations, comma-separated.", metavar="LIST", rich_help_panel=Group.TASKS
        ),
    ] = "0",
    labels: Annotated[
        str,
        typer.Option(
            help=f"Whose answers demonstrations show: {', '.join(LABELS[:-1])} or {LABELS[-1]}.",
            metavar="NAME",
            autocompletion=lambda incomplete: [name for name in LABELS if name.startswith(incomplete)],
            rich_help_panel=Group.TASKS,
        ),
    ] = "right",
    count: Annotated[str, typer.Option(help="How many documents to show.", metavar="N")] = "2",
    as_json: JsonOption = False,
) -> None:
    """Show the exact texts and tokens of a task's first documents, as the model gets them.

    lowmem-icl prompts wsc --model facebook/opt-1.3b --shots 1
    """
    # No task has documents of more digits, and Python reads no number of thousands of them.
    if not (count.isdecimal() and len(count) <= LONGEST_COUNT and int(count)):
        raise InputError(f"--count: expected a whole number of at least 1, got '{count}'; correct it")
    options = given.checked(tasks=(task,), shots=shots, labels=tuple(dict.fromkeys(("right", labels))))
    from lowmem_icl.cli.terminal import Terminal

    terminal = Terminal()
    terminal.say(first_line(f"prompts of {task} for", options))
    from lowmem_icl.cli.prompts import prompt_entries, show_prompts

    entries = prompt_entries(options, int(count), options.labels[-1])
    if as_json:
        _print_json(entries)
    else:
        show_prompts(entries, terminal.out)


command_of(app)(status)
command_of(app)(report)
app.add_typer(masks_app, name="masks")
