"""A plan for people: what a run will hold, read and compute, and how fast this machine is."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_icl.cli.terminal import Terminal, count, duration, size
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.advice import advice
from lowmem_icl.planning.fitting import exact_that_fits
from lowmem_icl.planning.machine_file import read_machine
from lowmem_icl.planning.plan import Advice, Plan, StagePlan, make_plan
from lowmem_icl.session.folder import check_output, parts_of
from lowmem_icl.session.prepare import prepare_plan


def plan_with_advice(options: RunOptions, machine: Path | None, terminal: Terminal) -> Plan:
    """Return the plan of a run, with what would save most and what fits its hours; for the machine of a file
    where one is given.
    """
    other = None if machine is None else read_machine(machine)
    finished = parts_of(check_output(options)).has
    # Alternatives are of the same tasks, which are opened once.
    prepare = partial(prepare_plan, progress=terminal.progress, opened={})
    prepared = prepare(options)
    plan = make_plan(prepared, hours=options.hours, finished=finished, machine=other, kept_rates=True)
    found = advice(prepared, plan, prepare, finished, other)
    return replace(plan, advice=found, exact_that_fits=exact_that_fits(prepared, plan, finished))


def show_plan(plan: Plan, console: Console) -> None:
    """Print what a run will hold, read and compute, and what was measured of this machine."""
    memory, rates = plan.memory, plan.rates
    layer_seconds = rates.attention_seconds + rates.projection_seconds + rates.ffn_seconds
    where = f"measured on {plan.machine}" if plan.machine else "measured here"
    if plan.rates_age_seconds:
        where += f" {duration(plan.rates_age_seconds)} ago"
    lines = [
        f"on disk: store {size(plan.store_bytes)}"
        + (f", made first from {size(plan.convert_bytes)}" if plan.convert_bytes else "")
        + f"; activations that memory cannot hold, at most {size(memory.spill_bytes)}",
        f"memory {size(memory.allowance_bytes)}"
        + (f", on the device {size(memory.device_bytes)}" if memory.device_bytes else "")
        + f": embeddings {size(memory.non_layer_bytes)}"
        + ("" if memory.tables_in_memory else " (their tables are read from disk)")
        + ", "
        f"layers in use {size(memory.streaming_bytes)}, working space {size(memory.working_bytes)}, "
        f"layers kept {size(memory.resident_bytes)}, residuals {size(memory.alive_bytes)}, "
        f"their cache {size(memory.cache_bytes)}",
        f"{where}: {size(rates.disk_bytes_per_second)}/s from disk, "
        f"{1 / layer_seconds:,.0f} tokens/s through a layer, "
        f"{1 / rates.answer_seconds:,.0f}/s through the vocabulary",
    ]
    console.print("\n".join(lines), soft_wrap=True)
    console.print(plan_table(plan))
    if plan.exact_that_fits is not None:
        console.print(
            f"all of it fits {plan.hours:.3g} hours with --exact {plan.exact_that_fits}"
            if plan.exact_that_fits
            else f"not all of it fits {plan.hours:.3g} hours, however few units are ablated exactly",
            soft_wrap=True,
        )
    for one in plan.advice:
        console.print(Text(_advice_text(one)), soft_wrap=True)
    for note in plan.notes:
        console.print(Text(note), soft_wrap=True)


def _advice_text(advice: Advice) -> str:
    shares = {"the time": advice.seconds, "what is read": advice.read_bytes, "operations": advice.operations}
    saved = [f"{share:.0%} of {name}" for name, share in shares.items() if share >= 0.005]
    return f"{advice.options} would save {', '.join(saved)}"


def plan_table(plan: Plan) -> Table:
    """Return the plan's experiments as a table."""
    hours = "" if plan.hours is None else f" for {plan.hours:.3g} hours"
    table = Table(title=f"plan{hours}", title_justify="left")
    for column in ("experiment", "operations", "layers read", "from disk", "expected"):
        table.add_column(column, justify="left" if column == "experiment" else "right")
    for stage in plan.stages:
        about = "~" if stage.rough else ""
        table.add_row(
            stage.experiment,
            f"{about}{count(stage.operations)}",
            f"{about}{count(stage.layers_read)}",
            size(stage.read_bytes),
            f"{about}{_expected(stage)}",
        )
    return table


def _expected(stage: StagePlan) -> str:
    if stage.postponed:
        return f"{duration(stage.seconds)}: once the ablations are done"
    if stage.documents is not None:
        return f"{duration(stage.seconds)}: {stage.documents} documents per task"
    return duration(stage.seconds)
