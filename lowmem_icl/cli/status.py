"""`lowmem-icl status`: what is told of a run that is at work, has stopped or is finished."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from lowmem_icl.cli.terminal import duration
from lowmem_icl.report.numbers import PICKED, held_out_text, significance_mark, unit_name
from lowmem_icl.system.visible import visible_line

STATES = {
    "running": "running, by a process that is at work",
    "cut off": "cut off: its process ended without a word; the same command continues",
    "stopped": "stopped; the same command continues",
    "out of time": "out of time; the same command continues",
    "failed": "failed; run.log says why",
}


LEAST_SECONDS_LEFT = 1.0


def _time_left(state: Mapping[str, Any]) -> str:
    if state["state"] == "running" and state["seconds_left"] < LEAST_SECONDS_LEFT:
        return "unknown, it takes longer than planned"
    return f"about {duration(state['seconds_left'])}"


def show_status(state: Mapping[str, Any], console: Console) -> None:
    """Print what `status_of` returns."""

    def line(text: str) -> None:
        console.print(Text(visible_line(text)), soft_wrap=True)

    line(f"folder: {state['folder']}")
    line(f"state: {STATES.get(state['state'], state['state'])}")
    if state.get("error"):
        line(f"error: {state['error']}")
    line(f"started: {state['started']}" + (f", ended: {state['ended']}" if state.get("ended") else ""))
    for name in state["experiments"]:
        seconds = state["finished"].get(name)
        line(f"  {name}: " + ("not finished" if seconds is None else f"finished in {duration(seconds)}"))
    if state["state"] != "finished":
        line(f"time left: {_time_left(state)}; finished parts: {state['parts']}")
    shot_counts = list(dict.fromkeys(unit["shots"] for unit in state["best_units"]))
    if shot_counts:
        line("costliest units alone so far, in nats of gold log-probability:")
    for shots in shot_counts:
        units = [unit for unit in state["best_units"] if unit["shots"] == shots]
        named = ", ".join(
            f"{unit_name(unit['kind'], unit['layer'], unit['head'])} {unit['value']:.2f}"
            f"{significance_mark(unit)}"
            for unit in units
        )
        line(f"  {shots} shots: {named}; {held_out_text(units, state['best_units_held_out'])}")
    if shot_counts:
        line(f"  {PICKED}")
    if state["page"]:
        line(f"page: {state['folder']}/report.html")
    for failure in state.get("failures", []):
        line(f"failed: {failure['sentence']}")
    for warning in state["warnings"]:
        line(f"warning: {warning}")
