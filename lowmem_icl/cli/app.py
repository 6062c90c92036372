"""Flags to options to calls: the commands, their help and their exit codes; no logic of its own.

torch and transformers are imported by the commands that need them, so that `--help` stays quick.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_icl import __version__
from lowmem_icl.cli.errors import reports_errors
from lowmem_icl.cli.flags import (
    BosOption,
    ConfigOption,
    CopyingWithOption,
    CurveLimitOption,
    CurvesOption,
    DataDirOption,
    DemonstrationSetsOption,
    DemonstrationsOption,
    DeviceMemoryOption,
    DeviceOption,
    DirectionOption,
    ExactOption,
    ExperimentsOption,
    HoursOption,
    ImportanceLimitOption,
    JsonOption,
    LimitOption,
    MasksDirOption,
    MemoryOption,
    ModelOption,
    ObjectiveOption,
    OrderOption,
    OutOption,
    ProtocolOption,
    QuietOption,
    RandomDrawsOption,
    RescoreOption,
    RevisionOption,
    ScreenOption,
    SeedOption,
    ShotsOption,
    StoreDirOption,
    TasksOption,
    ToleranceOption,
    TrainLimitOption,
    WeightsOption,
)
from lowmem_icl.errors import InputError
from lowmem_icl.options import RunOptions, run_options

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Take a large language model apart on one workstation: which heads and FFNs does in-context learning need?\n\n"
    "Start with [bold]lowmem-icl run[/bold]: it works on a small model that comes with the tool, in under three "
    "minutes. With --model it does the same for any OPT checkpoint.",
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lowmem-icl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


def _options(given: dict[str, Any], without: tuple[str, ...] = ()) -> RunOptions:
    """Return checked options from a command's own arguments."""
    flags = {
        name: value
        for name, value in given.items()
        if name in RunOptions.model_fields and name not in without
    }
    plain = {name: str(value) if isinstance(value, StrEnum) else value for name, value in flags.items()}
    return run_options(plain, given.get("config"))


@app.command()
@reports_errors
def run(
    model: ModelOption = None,
    revision: RevisionOption = None,
    weights: WeightsOption = None,
    store_dir: StoreDirOption = None,
    tasks: TasksOption = None,
    data_dir: DataDirOption = None,
    shots: ShotsOption = None,
    limit: LimitOption = None,
    train_limit: TrainLimitOption = None,
    importance_limit: ImportanceLimitOption = None,
    demonstrations: DemonstrationsOption = None,
    demonstration_sets: DemonstrationSetsOption = None,
    protocol: ProtocolOption = None,
    bos: BosOption = None,
    experiments: ExperimentsOption = None,
    copying_with: CopyingWithOption = None,
    screen: ScreenOption = None,
    exact: ExactOption = None,
    hours: HoursOption = None,
    objective: ObjectiveOption = None,
    tolerance: ToleranceOption = None,
    direction: DirectionOption = None,
    order: OrderOption = None,
    curves: CurvesOption = None,
    curve_limit: CurveLimitOption = None,
    random_draws: RandomDrawsOption = None,
    rescore: RescoreOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    out: OutOption = None,
    masks_dir: MasksDirOption = None,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Plan, then every experiment, masks, tables and a page; run the same command again to continue.

    Without options it takes the bundled demo model apart. On real data:
    [dim]lowmem-icl run --model facebook/opt-1.3b --tasks piqa,copa --shots 0,1 --limit 64[/dim]
    """
    from lowmem_icl.cli.tables import show_summary
    from lowmem_icl.cli.terminal import Terminal
    from lowmem_icl.report.numbers import summary
    from lowmem_icl.run import run as run_everything

    terminal = Terminal(quiet)
    finished = run_everything(_options(locals()), terminal)
    if as_json:
        typer.echo(json.dumps(summary(finished.folder), indent=1))
    else:
        show_summary(finished.folder, terminal.out)


@app.command()
@reports_errors
def plan(
    model: ModelOption = None,
    revision: RevisionOption = None,
    weights: WeightsOption = None,
    store_dir: StoreDirOption = None,
    tasks: TasksOption = None,
    data_dir: DataDirOption = None,
    shots: ShotsOption = None,
    limit: LimitOption = None,
    train_limit: TrainLimitOption = None,
    importance_limit: ImportanceLimitOption = None,
    demonstrations: DemonstrationsOption = None,
    demonstration_sets: DemonstrationSetsOption = None,
    protocol: ProtocolOption = None,
    bos: BosOption = None,
    experiments: ExperimentsOption = None,
    copying_with: CopyingWithOption = None,
    screen: ScreenOption = None,
    exact: ExactOption = None,
    hours: HoursOption = None,
    order: OrderOption = None,
    curves: CurvesOption = None,
    curve_limit: CurveLimitOption = None,
    random_draws: RandomDrawsOption = None,
    rescore: RescoreOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    device: DeviceOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the same options would read, hold, compute and take, before anything starts.

    Nothing is converted and no weights are fetched; two seconds go into measuring this machine.
    """
    from lowmem_icl.cli.terminal import Terminal, show_plan
    from lowmem_icl.planning.costs import lay_out
    from lowmem_icl.planning.plan import make_plan
    from lowmem_icl.session.prepare import prepare

    terminal = Terminal()
    options = _options(locals())
    prepared = prepare(options)
    planned = make_plan(options, prepared, lay_out(options, prepared), hours=options.hours)
    if as_json:
        typer.echo(json.dumps(planned.as_json(), indent=1))
    else:
        show_plan(planned, terminal.out)


@app.command()
@reports_errors
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    store: Annotated[
        Path | None, typer.Argument(help="Folder of the store; your cache folder if left out.")
    ] = None,
    revision: RevisionOption = None,
    weights: WeightsOption = None,
    store_dir: StoreDirOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="SOURCE is a store: compare all its bytes.")
    ] = False,
    delete_shards: Annotated[
        bool,
        typer.Option(
            "--delete-shards",
            help="Fetch a hub id's weight files one by one, deleting each when it is converted.",
        ),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Convert a checkpoint to a store of one file a layer; stopped, it resumes at the layer where it was.

    OPT-66B on a disk that holds the store (66 GB) and one shard (10 GB):
    [dim]lowmem-icl convert facebook/opt-66b --delete-shards[/dim]
    """
    from dataclasses import replace

    from lowmem_icl.cli.terminal import Terminal, size
    from lowmem_icl.conversion.locate import ensure_store, locate
    from lowmem_icl.model.store import open_store, verify_store

    terminal = Terminal(quiet)
    if verify:
        opened = open_store(Path(source))
        with terminal.progress("verifying", opened.size_bytes, "bytes") as advance:
            verify_store(opened, advance)
        typer.echo(f"{source}: {len(opened.manifest.files)} files, {size(opened.size_bytes)}, all as written")
        return
    options = run_options(
        {
            "model": source,
            "revision": revision,
            "weights": str(weights) if weights else None,
            "store_dir": store_dir,
        }
    )
    located = locate(source, revision, options.weights, options.chosen_store_dir)
    if store is not None:
        located = replace(located, store_folder=store)
    made = ensure_store(
        located,
        options.weights,
        delete_shards=delete_shards,
        announce=terminal.say,
        progress=terminal.progress,
    )
    outliers = made.manifest.outliers
    if outliers is not None:
        share = outliers.beyond_outside / max(1, outliers.activations)
        terminal.say(
            f"outlier columns: {outliers.columns}; activations of {outliers.threshold:g} or more outside them: {share:.2g}"
        )
    typer.echo(f"{made.folder}")


@app.command()
@reports_errors
def evaluate(
    mask: Annotated[list[Path], typer.Option("--mask", help="Mask file; may be given several times.")],
    model: ModelOption = None,
    revision: RevisionOption = None,
    weights: WeightsOption = None,
    store_dir: StoreDirOption = None,
    tasks: TasksOption = None,
    data_dir: DataDirOption = None,
    shots: ShotsOption = None,
    limit: LimitOption = None,
    demonstrations: DemonstrationsOption = None,
    demonstration_sets: DemonstrationSetsOption = None,
    protocol: ProtocolOption = None,
    bos: BosOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    out: OutOption = None,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Scores of the tasks clean and under each --mask, in a run folder of its own."""
    from lowmem_icl.cli.tables import show_evaluation
    from lowmem_icl.cli.terminal import Terminal
    from lowmem_icl.experiments.evaluate.masks_given import evaluate_masks
    from lowmem_icl.report.numbers import summary

    terminal = Terminal(quiet)
    finished = evaluate_masks(_options(locals() | {"experiments": "evaluate"}), mask, terminal)
    if as_json:
        typer.echo(json.dumps(summary(finished.folder), indent=1))
    else:
        show_evaluation(finished.folder, terminal.out)


@app.command()
@reports_errors
def tasks(as_json: JsonOption = False, data_dir: DataDirOption = None) -> None:
    """The tasks it knows, their metrics, and their sizes where rows are at hand."""
    from rich.console import Console
    from rich.table import Table

    from lowmem_icl.tasks.listing import known_tasks

    listed = known_tasks(data_dir)
    if as_json:
        typer.echo(json.dumps(listed, indent=1))
        return
    table = Table()
    for column in ("task", "from", "metric", "rows"):
        table.add_column(column)
    for entry in listed:
        rows = ", ".join(f"{split} {count}" for split, count in entry["rows"].items())
        table.add_row(entry["task"], entry["from"], entry["metric"], rows or "from the hub, or --data-dir")
    Console().print(table)


@app.command()
@reports_errors
def prompts(
    task: Annotated[str, typer.Argument(help="A task's name, lm-eval:NAME, or a path to JSON lines.")],
    model: ModelOption = None,
    data_dir: DataDirOption = None,
    shots: Annotated[int, typer.Option(help="Number of demonstrations.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="How many documents.", min=1)] = 2,
    demonstrations: DemonstrationsOption = None,
    demonstration_sets: DemonstrationSetsOption = None,
    protocol: ProtocolOption = None,
    bos: BosOption = None,
    store_dir: StoreDirOption = None,
    weights: WeightsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The exact texts and tokens of a task's first documents, as the model gets them."""
    from lowmem_icl.cli.prompts import prompt_entries, show_prompts

    given = locals() | {"tasks": task, "shots": str(shots), "limit": count}
    entries = prompt_entries(_options(given))
    if as_json:
        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
    else:
        show_prompts(entries)


@app.command()
@reports_errors
def status(folder: Annotated[Path, typer.Argument(help="Run folder.")], as_json: JsonOption = False) -> None:
    """How far a run is: its stages, finished parts and warnings."""
    from rich.console import Console

    from lowmem_icl.cli.tables import show_status
    from lowmem_icl.report.numbers import status_of

    state = status_of(folder)
    if as_json:
        typer.echo(json.dumps(state, indent=1))
    else:
        show_status(state, Console())


@app.command()
@reports_errors
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html of the only folder if left out.")
    ] = None,
) -> None:
    """Write the page again, of one run or of several together."""
    from lowmem_icl.report.page import write_report

    if out is None and len(folders) > 1:
        raise InputError("--out: expected a file for the page of several runs; give --out PAGE.html")
    page = out or folders[0] / "report.html"
    write_report(folders, page)
    typer.echo(str(page))


def _register_masks() -> None:
    from lowmem_icl.cli.masks import masks_app

    app.add_typer(masks_app, name="masks")


_register_masks()
