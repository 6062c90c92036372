"""A plan for people: what a run will hold, read and compute, and how fast this machine is."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_icl.cli.terminal import Terminal, count, duration, size
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.advice import advice
from lowmem_icl.planning.amounts import Amount
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
    memory, rates, held = plan.memory, plan.rates, plan.held
    layer_seconds = rates.attention_seconds + rates.projection_seconds + rates.ffn_seconds
    where = f"measured on {plan.machine}" if plan.machine else "measured here"
    if plan.rates_age_seconds:
        where += f" {duration(plan.rates_age_seconds)} ago"
    spill = f"{size(held.spill_bytes)} of activations for a while" if held.spill_bytes else "no activations"
    lines = [
        f"on disk: store {size(plan.store_bytes)}"
        + (f", made first from {size(plan.convert_bytes)}" if plan.convert_bytes else "")
        + f"; {spill}",
        f"in memory: {_in_memory(plan)} of {size(memory.allowance_bytes)} allowed"
        + (f" and {size(memory.device_bytes)} on the device" if memory.device_bytes else "")
        + ("" if memory.tables_in_memory else "; tables of embeddings are read from disk"),
        f"{where}: {size(rates.disk_bytes_per_second)}/s from disk, "
        f"{1 / layer_seconds:,.0f} tokens/s through a layer, "
        f"{1 / rates.answer_seconds:,.0f}/s through the vocabulary",
    ]
    console.print("\n".join(lines), soft_wrap=True)
    if plan.stages:
        console.print(plan_table(plan))
        console.print("ablation: a document scored without a unit or mask", soft_wrap=True)
        for reached in filter(None, map(_reached, plan.stages)):
            console.print(reached, soft_wrap=True)
    else:
        console.print("nothing is left to compute")
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


def _in_memory(plan: Plan) -> str:
    """Return what is expected to lie in memory, in all and in its parts."""
    memory, held = plan.memory, plan.held
    parts = {
        "embeddings": memory.non_layer_bytes,
        "layers": memory.streaming_bytes + memory.resident_bytes,
        "working space": memory.working_bytes,
        "residuals": held.alive_bytes + held.cache_bytes,
    }
    named = ", ".join(f"{name} {size(amount)}" for name, amount in parts.items())
    return f"about {size(sum(parts.values()))} ({named})"


def plan_table(plan: Plan) -> Table:
    """Return the plan's experiments as a table, with a line for all together."""
    hours = "" if plan.hours is None else f" for {plan.hours:.3g} hours"
    table = Table(title=f"plan{hours}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("experiment", "documents", "tokens", "ablations", "operations", "read", "expected"):
        table.add_column(
            column, justify="left" if column == "experiment" else "right", no_wrap=column != "expected"
        )
    for stage in plan.stages:
        table.add_row(*_row(stage), end_section=stage is plan.stages[-1])
    total = replace(
        plan.stages[0],
        experiment="all",
        operations=sum(stage.operations for stage in plan.stages),
        read_bytes=sum(stage.read_bytes for stage in plan.stages),
        seconds=sum(stage.seconds for stage in plan.stages),
        rough=any(stage.rough for stage in plan.stages),
        amount=sum((stage.amount for stage in plan.stages), start=Amount()),
    )
    table.add_row(*_row(total))
    return table


def _row(stage: StagePlan) -> tuple[str, ...]:
    about = "~" if stage.rough else ""
    amount = stage.amount
    return (
        stage.experiment,
        *(
            f"{about}{count(value)}" if value else ""
            for value in (amount.documents, amount.tokens, amount.ablations, stage.operations)
        ),
        size(stage.read_bytes),
        f"{about}{duration(stage.seconds)}",
    )


def _reached(stage: StagePlan) -> str:
    """Return how far a stage gets within the hours; empty where it is finished in them."""
    if stage.postponed:
        return f"{stage.experiment}: waits until the ablations are done"
    if stage.documents is not None:
        return f"{stage.experiment}: {stage.documents} documents per task in that time"
    return ""
